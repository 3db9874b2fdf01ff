r"""Base class of all architectures: a `Sparsifier` is a frozen dataclass with pure methods, and its own config.

Training differentiates `Sparsifier.loss`; evaluation and users call `encode` and `decode` (through `sae.model.SAE`).
The loss is an architecture's objective plus AuxK:

.. math:: L = \text{objective} + \alpha\, s^2\, \mathrm{aux}

aux is dimensionless (`aux_k`). :math:`s^2 = E\|y - \bar y\|^2` of the targets y, from the batch and without a
gradient, gives it the unit of mse. So alpha means the same at every scale of the data. With TopK the loss is that of
Gao et al. (mse / s^2 + alpha aux) times s^2. With centred data of E||x||^2 = 1 it is the loss of dictionary_learning's
TopK trainer, up to the factor min(n_dead / k_aux, 1). With `skip` the objective's target is what x W_skip leaves over,
and the gradient flows into W_skip.
"""

import abc
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from saejax.errors import UserError
from saejax.fields import leaves, registry
from saejax.kernels import encode_top_k, matmul, row_norm, sparse_decode, sparse_encode
from saejax.sae import aux_k, constraint, encoders, sites
from saejax.sae.encoding import Encoding
from saejax.sae.layout import EncoderKind, Family, Layout
from saejax.sae.layout import MatmulDtype as MatmulDtype
from saejax.sae.layout import check as check
from saejax.sae.layout import check_enum as check_enum
from saejax.sae.parameters import Aux as Aux
from saejax.sae.parameters import SAEParams as SAEParams


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sparsifier(Layout, abc.ABC):
    """One SAE architecture with its sizes and coefficients: static, hashable, all methods pure.

    An architecture gives `activate` and `objective`. All else has a default: parameters of its own (`extra`, `leaves`),
    their scale (`fold_extra`) and bounds (`constrain_extra`), statistics (`track`), the fields in which members of an
    ensemble may differ (`knobs`), products of its own (`more_products`), and what other tools know (`exported`).
    """

    name: ClassVar[str]
    preferred_norm: ClassVar[str] = "unit"
    """Scale of the input that its coefficients suit: unit (E||x||^2 = 1) or sqrt_d (E||x|| = sqrt(d_in))."""
    leaves: ClassVar[dict[str, int | None]] = {}
    """Arrays of `extra`: the axis with one entry per latent, along which a mesh splits them; None: on every device."""
    knobs: ClassVar[tuple[str, ...]] = ()
    """Fields in which members of an ensemble may differ; they change neither a shape (except k) nor the data."""
    whitens: ClassVar[bool] = True
    """Whether a whitening of the rows folds into the weights."""

    @property
    def k_sparse(self) -> bool:
        """Whether encodings name their active latents (`values`, `indices`) instead of being dense."""
        return False

    @property
    def signed(self) -> bool:
        """Whether latents may be negative."""
        return False

    @property
    def row_norm(self) -> row_norm.RowNorm | None:
        """Normalisation of every row by itself; None without one."""
        return None

    @property
    def n_active(self) -> int | None:
        """Latents that take part in decoding and gradients, per row on average; None where all of them do."""
        return None

    # What an architecture gives.

    @abc.abstractmethod
    def activate(
        self, params: SAEParams, pre_acts: Float[Array, "b d_sae"], step: Int[Array, ""] | None = None
    ) -> Encoding:
        """Returns the latents of given pre-activations.

        Args:
          params: Parameters (thresholds are among `extra`).
          pre_acts: Pre-activations of the encoder.
          step: Optimiser steps already taken, in training; None at inference.

        Returns:
          A dense encoding with its gradient, or where `k_sparse` a selection, which gets its gradient later.
        """

    @abc.abstractmethod
    def objective(
        self, params: SAEParams, x: Float[Array, "b d_in"], target: Float[Array, "b d_out"], step: Int[Array, ""]
    ) -> tuple[Float[Array, ""], Aux]:
        """Returns the training loss of one batch without AuxK, and its auxiliary results."""

    def n_best(self, step: Int[Array, ""] | None) -> int | None:
        """Returns how many of a row's largest pre-activations decide its code; None where all do."""
        return None

    def keep(self, values: Float[Array, "b n"], indices: Int[Array, "b n"], step: Int[Array, ""] | None) -> Encoding:
        """Returns the encoding of rows with these best pre-activations, largest first, where `n_best` asks for them."""
        raise NotImplementedError

    def extra(self) -> dict[str, jax.Array]:
        """Returns the architecture's extra parameters at their start."""
        return {}

    def fold_extra(
        self, params: SAEParams, mean: Float[Array, " d_in"], scale: Float[Array, ""]
    ) -> dict[str, jax.Array]:
        """Returns `extra()`'s parameters for x itself, trained on `(x - mean) * scale`; scale 1 where W_enc took it."""
        return {}

    def constrain_extra(self, params: SAEParams) -> dict[str, jax.Array]:
        """Returns the bounded ones of `extra()`'s parameters, mapped back into their bounds."""
        return {}

    def track(self, params: SAEParams, aux: Aux, step: Int[Array, ""]) -> SAEParams:
        """Returns parameters whose running statistics have seen one more batch; call after `constrain`."""
        return params

    def lr_scales(self) -> dict[str, float]:
        """Returns factors on the learning rate of single leaves, by name; all others have 1."""
        return {}

    def more_products(self, encoder: int, decoder: int) -> int:
        """Returns the multiply-adds of a row in a training step beyond one encoder, one decoder and their gradients.

        Args:
          encoder: numbers in `W_enc`.
          decoder: numbers in `W_dec`.
        """
        return 0

    def why_static(self, knob: str) -> str | None:
        """Returns why members that are stacked in one step cannot differ in a knob; None where they can."""
        dense = knob == "k" and not self.k_sparse  # only slots can be masked
        return f"the k of sae={self.name} cannot be masked" if dense else None

    def exported(self, params: SAEParams) -> tuple["Sparsifier", SAEParams]:
        """Returns an SAE of an architecture that other tools know and that encodes and decodes as this one does."""
        return self, params

    # What all of them share.

    def init(self, key: Key[Array, ""]) -> SAEParams:
        """Draws the parameters at the start of training: random decoder rows, biases 0."""
        W_enc, W_dec, of_encoder = encoders.start(key, self)
        biases = {"b_enc": jnp.zeros(self.d_sae), "b_dec": jnp.zeros(self.d_out)}
        skip = {"W_skip": jnp.zeros((self.d_in, self.d_out))} if self.skip else {}
        own = self.extra()
        self._check_leaves(own)
        return SAEParams(W_enc=W_enc, W_dec=W_dec, **biases, extra=of_encoder | own | skip)

    def _check_leaves(self, own: dict[str, jax.Array]) -> None:
        """Refuse arrays whose placement on a mesh nobody declared."""
        for name, array in own.items():
            what = f"{type(self).__name__}.leaves"
            if name not in self.leaves:
                raise UserError(f"{what} must name {name}, which extra() returns: its axis of latents, or None")
            axis = self.leaves[name]
            if axis is not None and array.shape and array.shape[axis : axis + 1] != (self.d_sae,):
                raise UserError(
                    f"{what}: axis {axis} of {name} must have d_sae={self.d_sae} entries, got {array.shape}"
                )

    def pre_activations(
        self, params: SAEParams, x: Float[Array, "b d_in"], step: Int[Array, ""] | None = None
    ) -> Float[Array, "b d_sae"]:
        """Returns the encoder's output for each latent before the activation, differentiable."""
        read, carried = self.encoder_inputs(params, x, step)
        return encoders.product(self, params, read, carried)

    def encode(self, params: SAEParams, x: Float[Array, "b d_in"]) -> Encoding:
        """Returns the latents of each row of `x`, as at inference."""
        return self.code(params, x, None)

    def code(self, params: SAEParams, x: Float[Array, "b d_in"], step: Int[Array, ""] | None) -> Encoding:
        """Returns the latents of each row: of training at `step`, or of inference (None)."""
        if not self.k_sparse:
            return self.activate(params, self.pre_activations(params, x, step), step)
        if self.encoder in (EncoderKind.linear, EncoderKind.tied) and self.n_groups == 1:
            # One dense product forward; the gradient touches active latents only.
            bias = params.b_dec if self.centres else jnp.zeros(self.d_in)
            weights, dtype = (params.W_enc, params.b_enc, bias), self.matmul_dtype.value
            n_best = self.n_best(step)
            if n_best is None:
                chosen = self.activate(params, sparse_encode.pre_activations(x, *weights, dtype), step)
            else:
                chosen = self.keep(*encode_top_k.encode_top_k(x, *weights, n_best, dtype), step)
            values = sparse_encode.with_encoder_gradient(chosen.values, chosen.indices, x, *weights)
        else:
            pre_acts = self.pre_activations(params, x, step)
            chosen = self.activate(params, lax.stop_gradient(pre_acts), step)
            values = sparse_encode.with_gradient_of(chosen.values, chosen.indices, pre_acts)
        return dataclasses.replace(chosen, values=values)

    def decode(self, params: SAEParams, encoding: Encoding) -> Float[Array, "b d_out"]:
        """Returns the sum of the active decoder rows plus `b_dec`; `add_skip` gives the rest."""
        if encoding.latents is not None:
            recon = matmul.matmul(encoding.latents, params.W_dec, self.matmul_dtype.value)
        else:
            assert encoding.values is not None and encoding.indices is not None
            recon = sparse_decode.sparse_decode(encoding.values, encoding.indices, params.W_dec)
        return recon + params.b_dec[None, :]

    def skipped(self, params: SAEParams, x: Float[Array, "b d_in"]) -> Float[Array, "b d_out"]:
        """Returns the part of the output that bypasses the latents with `skip`: x W_skip."""
        return matmul.matmul(x, params.extra["W_skip"], self.matmul_dtype.value)

    def add_skip(
        self, params: SAEParams, recon: Float[Array, "b d_out"], x: Float[Array, "b d_in"]
    ) -> Float[Array, "b d_out"]:
        """Returns `recon` plus the part that bypasses the latents, if any."""
        return recon + self.skipped(params, x) if self.skip else recon

    def decoder_norms(self, params: SAEParams) -> Float[Array, " d_sae"]:
        """Returns the norm of each decoder row; for `crosscoder` the sum of its norms in the sites."""
        if self.family is not Family.crosscoder:
            return row_norms(params.W_dec)
        norms = [row_norms(part) for part in sites.parts(params.W_dec, self.writes)]
        return jnp.sum(jnp.stack(norms), axis=0)

    def reconstruct(
        self, params: SAEParams, x: Float[Array, "b d_in"], target: Float[Array, "b d_out"], step: Int[Array, ""]
    ) -> Aux:
        """Returns the training reconstruction with the term "mse": sum over d_out, mean over rows.

        The gradient flows through the term; the reconstruction of a k-sparse code has none of its own.
        """
        encoding = self.code(params, x, step)
        if encoding.values is not None and encoding.indices is not None:
            y = target - params.b_dec[None, :]
            mse, residual = sparse_decode.squared_error(encoding.values, encoding.indices, params.W_dec, y)
            return Aux(recon=lax.stop_gradient(target - residual), encoding=encoding, terms={"mse": mse})
        recon = self.decode(params, encoding)
        return Aux(recon=recon, encoding=encoding, terms={"mse": jnp.mean(jnp.sum((target - recon) ** 2, axis=1))})

    def loss(
        self,
        params: SAEParams,
        rows: Float[Array, "b d_row"],
        *,
        dead: Bool[Array, " d_sae"],
        step: Int[Array, ""],
    ) -> tuple[Float[Array, ""], Aux]:
        """Returns the training loss of one batch and its auxiliary results.

        Args:
          params: Parameters.
          rows: Normalised activations, float32.
          dead: Latents that count as dead at this step.
          step: Number of optimiser steps already taken, for schedules.
        """
        (found, aux), (read, residual, weight) = self._but_aux_k(params, rows, step)
        if self.aux_alpha == 0:
            return found, aux
        term: Any = aux_k.aux_k_loss(aux_k.Weights.of(params), read, residual, dead, self._aux_k_settings())
        return found + weight * term, dataclasses.replace(aux, terms=aux.terms | {"aux_k": term})

    def value_and_grad(
        self,
        params: SAEParams,
        rows: Float[Array, "b d_row"],
        *,
        dead: Bool[Array, " d_sae"],
        step: Int[Array, ""],
    ) -> tuple[tuple[Float[Array, ""], Aux], SAEParams]:
        """Returns `loss` and its gradient: what `jax.value_and_grad` gives, AuxK's part added in place."""

        def but_aux_k(params):
            (found, aux), rest = self._but_aux_k(params, rows, step)
            return found, (aux, rest)

        (found, (aux, (read, residual, weight))), grads = jax.value_and_grad(but_aux_k, has_aux=True)(params)
        if self.aux_alpha == 0:
            return (found, aux), grads
        own, of = map(aux_k.Weights.of, (grads, params))
        term, added = aux_k.added(own, of, read, residual, dead, self._aux_k_settings(), weight)
        grads = dataclasses.replace(grads, **added._asdict())
        return (found + weight * term, dataclasses.replace(aux, terms=aux.terms | {"aux_k": term})), grads

    def _aux_k_settings(self) -> aux_k.Settings:
        dtype = self.matmul_dtype.value
        return aux_k.Settings(k_aux=self.n_aux, dtype=dtype, signed=self.signed, n_groups=self.n_groups)

    def _but_aux_k(self, params: SAEParams, rows: Any, step: Any) -> Any:
        """The loss without AuxK, and what AuxK reads with its weight, without a gradient."""
        x, target = self.split(rows)
        aim = target - self.skipped(params, x) if self.skip else target
        found, aux = self.objective(params, x, aim, step)
        read = self.encoder_inputs(params, x, step)[0] if self.aux_alpha > 0 else None
        spread = jnp.mean(jnp.sum((target - jnp.mean(target, axis=0, keepdims=True)) ** 2, axis=1))
        rest = lax.stop_gradient((read, aim - aux.recon, self.aux_alpha * spread))
        return (found, dataclasses.replace(aux, recon=self.add_skip(params, aux.recon, x))), rest

    def constrain(self, params: SAEParams) -> SAEParams:
        """Maps parameters back onto the constraint after an optimiser step."""
        bounded = self.constrain_extra(params)
        if bounded:
            params = dataclasses.replace(params, extra=params.extra | bounded)
        return constraint.constrain(self, params)

    def project(self, params: SAEParams, grads: SAEParams) -> SAEParams:
        """Removes the part of gradients that the constraint would undo; call before the optimiser."""
        return constraint.project(self, params, grads)

    def fold(self, params: SAEParams, *, mean: Float[Array, " d_row"], scale: Float[Array, "..."]) -> SAEParams:
        """Turns parameters trained on `(rows - mean) * scale` into parameters that work on `rows` themselves.

        With one site the latents then carry the data's unit; the weights stay, biases and thresholds change. With
        several, scale is [d_row] (or one number for all) and the weights take it in; latents stay as in training.
        """
        if len(self.sites) > 1:
            params = encoders.fold_scale(self, params, jnp.broadcast_to(scale, (self.d_row,)))
            scale = jnp.ones(())
        folded = encoders.fold(self, params, mean, scale)
        return dataclasses.replace(folded, extra=folded.extra | self.fold_extra(params, self.split(mean)[0], scale))

    def encoder_inputs(
        self, params: SAEParams, x: Float[Array, "b d_in"], step: Int[Array, ""] | None
    ) -> tuple[Array, Array | None]:
        """Returns the input of the last encoder product, and the terms added to it beside b_enc (`encoders.inputs`)."""
        return encoders.inputs(self, params, x, lambda pre_acts: self._dense(params, pre_acts, step))

    def _dense(self, params, pre_acts, step):
        """Dense latents inside an unrolled encoder, with their gradient."""
        if not self.k_sparse:
            return self.activate(params, pre_acts, step).dense()
        chosen = self.activate(params, lax.stop_gradient(pre_acts), step).dense()
        return jnp.where(chosen != 0, pre_acts, 0.0)


def row_norms(W: Float[Array, "n d"]) -> Float[Array, " n"]:
    """Returns norms whose gradient at a zero row is 0, not NaN."""
    squares = jnp.sum(W**2, axis=1)
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)


def warmed_up(coefficient: float, step: Array, n_steps: int) -> Float[Array, ""]:
    """Returns a coefficient that grows linearly from 0 over the first `n_steps` optimiser steps."""
    return coefficient * jnp.minimum(1.0, step / n_steps if n_steps else 1.0)


def _check_class(cls: type[Sparsifier]) -> None:
    """Refuse an architecture that misdescribes itself."""
    registry.check_fields(cls)
    where = registry.full_name(cls)
    fields = [field.name for field in dataclasses.fields(cls) if field.name not in ("seed", "lr")]  # of the run
    if not isinstance(cls.knobs, tuple) or set(cls.knobs) - set(fields):
        raise UserError(f"{where}.knobs must be a tuple of fields ({', '.join(fields)}), got {cls.knobs!r}")
    if cls.preferred_norm not in ("unit", "sqrt_d"):
        raise UserError(f"{where}.preferred_norm must be unit or sqrt_d, got {cls.preferred_norm!r}")
    leaves.declare(where, cls.leaves)


ARCHITECTURES: registry.Registry[type[Sparsifier]] = registry.Registry("architecture", Sparsifier, check=_check_class)
"""Every architecture by its name in a config (`sae.type`)."""

register = ARCHITECTURES.register
"""Class decorator: enters an architecture under its `name`."""
