"""What every sparse autoencoder is: its parameters, its encoding and the methods an architecture must give.

The typed config object is the architecture: a `Sparsifier` is a frozen dataclass with pure methods. Training
differentiates `Sparsifier.loss`; evaluation and users call `encode` and `decode` (through `sae.model.SAE`).
"""

import abc
import dataclasses
import enum
from typing import ClassVar, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from saejax.errors import UserError
from saejax.fields import numeric
from saejax.fields.resume_policy import Fixed, Free
from saejax.kernels import encode_top_k, matmul, sparse_decode, sparse_encode
from saejax.sae import constraint, encoders, with_aux_k
from saejax.sae import sites as sites_of
from saejax.sae.encoders import EncoderKind
from saejax.sae.encoding import Encoding
from saejax.sae.initialise import EncoderInit
from saejax.sae.parameters import Aux as Aux
from saejax.sae.parameters import SAEParams as SAEParams
from saejax.sae.sites import Family

ARCHITECTURES: dict[str, type["Sparsifier"]] = {}
"""Every architecture by its name in a config (`sae.type`)."""

_T = TypeVar("_T", bound=type["Sparsifier"])


class MatmulDtype(enum.Enum):
    """Precision of the operands of the large products; results and master weights are always float32."""

    float32 = "float32"
    bfloat16 = "bfloat16"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sparsifier(abc.ABC):
    """One SAE architecture with its sizes and coefficients: static, hashable, all methods pure.

    An architecture gives `activate` and `objective`; what it adds to the parameters (`extra`), their scale
    (`fold_extra`), their bounds (`constrain_extra`) and what moves without a gradient (`track`) have empty defaults.
    """

    name: ClassVar[str]
    preferred_norm: ClassVar[str] = "unit"
    """Scale of the input that its coefficients suit: unit (E||x||^2 = 1) or sqrt_d (E||x|| = sqrt(d_in))."""

    d_in: Fixed[int]
    """Width of what is read; at least 1. Of several sites it is the sum."""
    d_sae: Fixed[int]
    """Number of latents; at least 1. Usual: 8 to 64 times d_in."""
    family: Fixed[Family] = Family.sae
    """`sae`, `transcoder` (reads the first half of the sites, writes the second), `crosscoder` (reads and writes all)
    or `clt` (cross-layer transcoder)."""
    sites: Fixed[tuple[int, ...]] = ()
    """Widths of the parts of a row, in order; [] is one part. Of sources with several, these."""
    skip: Fixed[bool] = False
    """Whether a transcoder also has a linear map from its input to its target, zero at the start."""
    matmul_dtype: Fixed[MatmulDtype] = MatmulDtype.float32
    """Operands of the encoder product; bfloat16 is faster, the result is float32 either way."""
    encoder: Fixed[EncoderKind] = EncoderKind.linear
    """`linear`, `tied` (the decoder's transpose), `mlp` (a hidden ReLU layer) or `lista` (unrolled thresholding)."""
    encoder_hidden: Fixed[int | None] = None
    """Hidden units of the mlp encoder, at least 1 (2 d_in where it starts as the transpose); null takes 2 d_in."""
    encoder_steps: Fixed[int] = 3
    """Steps of the lista encoder, at least 1; each costs two products."""
    encoder_init: Fixed[EncoderInit] = EncoderInit.transpose
    """Where the encoder starts: `transpose` (of the decoder; only where that writes what is read) or `independent`."""
    decoder_init_norm: Fixed[float] = 1.0
    """Norm of the decoder rows at the start, above 0; 1 where `unit_decoder` holds them there."""
    subtract_b_dec: Fixed[bool] = True
    """Whether the encoder reads x - b_dec (pre-encoder bias) or x; x for transcoders, whatever is said here."""
    unit_decoder: Fixed[bool] = True
    """Whether decoder rows are kept at norm 1, their gradients tangent to the sphere."""
    aux_alpha: Free[float] = 1 / 32
    """Weight of the AuxK loss against mse over variance, dimensionless; 0 turns it off. 1/32 as in Gao et al."""
    k_aux: Free[int | None] = None
    """Dead latents that explain the residual of a row, in [1, d_sae]; null takes half of d_in."""

    def __post_init__(self):
        numeric.check(self, "sae.")
        object.__setattr__(self, "sites", tuple(self.sites))  # a YAML list arrives as a list
        wide = all(width >= 1 for width in self.sites)  # before d_in, which presets take from their sum
        check(wide, "sites", "must be widths of at least 1", self.sites)
        check(self.d_in >= 1, "d_in", "must be at least 1", self.d_in)
        check(self.d_sae >= 1, "d_sae", "must be at least 1", self.d_sae)
        check_enum(self.family, Family, "family")
        check_enum(self.matmul_dtype, MatmulDtype, "matmul_dtype")
        check_enum(self.encoder, EncoderKind, "encoder")
        check_enum(self.encoder_init, EncoderInit, "encoder_init")
        sites_of.check(self)
        mirrored = self.encoder is EncoderKind.mlp and self.starts_mirrored
        least, why = (2 * self.d_in, " (2 d_in) for encoder_init=transpose") if mirrored else (1, "")
        in_range = self.encoder_hidden is None or self.encoder_hidden >= least
        check(in_range, "encoder_hidden", f"must be null or at least {least}{why}", self.encoder_hidden)
        check(self.encoder_steps >= 1, "encoder_steps", "must be at least 1", self.encoder_steps)
        check(self.decoder_init_norm > 0, "decoder_init_norm", "must be above 0", self.decoder_init_norm)
        same = not self.unit_decoder or self.decoder_init_norm == 1
        check(same, "decoder_init_norm", "must be 1 with unit_decoder=true", self.decoder_init_norm)
        check(self.aux_alpha >= 0, "aux_alpha", "must be at least 0", self.aux_alpha)
        in_range = self.k_aux is None or 1 <= self.k_aux <= self.d_sae
        check(in_range, "k_aux", f"must be null or in [1, d_sae={self.d_sae}]", self.k_aux)

    @property
    def mirrors(self) -> bool:
        """Whether the target is the input: `sae` and `crosscoder`."""
        return self.family not in sites_of.HALVED

    @property
    def writes(self) -> tuple[int, ...]:
        """Widths of the sites that are written."""
        return sites_of.written(self.family, self.sites or (self.d_in,))

    @property
    def d_out(self) -> int:
        """Width of the reconstruction and of a decoder row."""
        return sum(self.writes)

    @property
    def d_row(self) -> int:
        """Width of a training row: all sites."""
        return self.d_in if self.mirrors else self.d_in + self.d_out

    @property
    def n_groups(self) -> int:
        """Groups of latents that read a site each: the layers of a `clt`, else 1."""
        return len(self.sites) // 2 if self.family is Family.clt else 1

    @property
    def centres(self) -> bool:
        """Whether the encoder really subtracts b_dec, which only what writes its input can."""
        return self.subtract_b_dec and self.mirrors

    @property
    def starts_mirrored(self) -> bool:
        """Whether the encoder starts as the decoder's transpose."""
        return self.encoder_init is EncoderInit.transpose and self.mirrors

    @property
    def n_aux(self) -> int:
        """Dead latents per row in AuxK, with the default filled in."""
        return min(max(self.d_in // 2, 1), self.d_sae) if self.k_aux is None else self.k_aux

    @property
    def n_hidden(self) -> int:
        """Hidden units of an mlp encoder, with the default filled in."""
        return 2 * self.d_in if self.encoder_hidden is None else self.encoder_hidden

    @property
    def k_sparse(self) -> bool:
        """Whether encodings name their active latents (`values`, `indices`) instead of being dense."""
        return False

    @property
    def signed(self) -> bool:
        """Whether latents may be negative."""
        return False

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
        """Returns the training loss of one batch but for AuxK, and what it was made of."""

    def n_best(self, step: Int[Array, ""] | None) -> int | None:
        """Returns how many of the largest pre-activations of a row decide about its code; None where all do."""
        return None

    def keep(self, values: Float[Array, "b n"], indices: Int[Array, "b n"], step: Int[Array, ""] | None) -> Encoding:
        """Returns the encoding of rows with these best pre-activations, largest first, where `n_best` asks for them."""
        raise NotImplementedError

    def extra(self) -> dict[str, jax.Array]:
        """Returns the parameters that the architecture adds, as they start."""
        return {}

    def fold_extra(
        self, params: SAEParams, mean: Float[Array, "d_in"], scale: Float[Array, ""]
    ) -> dict[str, jax.Array]:
        """Returns `extra()`'s parameters for x itself, trained on `(x - mean) * scale`; scale 1 where W_enc took it."""
        return {}

    def constrain_extra(self, params: SAEParams) -> dict[str, jax.Array]:
        """Returns those of `extra()`'s parameters that have bounds, mapped back into them."""
        return {}

    def track(self, params: SAEParams, aux: Aux, step: Int[Array, ""]) -> SAEParams:
        """Returns parameters whose running statistics have seen one more batch; call after `constrain`."""
        return params

    def lr_scales(self) -> dict[str, float]:
        """Returns factors on the learning rate of single leaves, by name; all others have 1."""
        return {}

    # What all of them share.

    def init(self, key: Key[Array, ""]) -> SAEParams:
        """Draws the parameters at the start of training: random decoder rows, biases 0."""
        W_enc, W_dec, of_encoder = encoders.start(key, self)
        biases = {"b_enc": jnp.zeros(self.d_sae), "b_dec": jnp.zeros(self.d_out)}
        skip = {"W_skip": jnp.zeros((self.d_in, self.d_out))} if self.skip else {}
        return SAEParams(W_enc=W_enc, W_dec=W_dec, **biases, extra=of_encoder | self.extra() | skip)

    def split(self, rows: Float[Array, "... d_row"]) -> tuple[Float[Array, "... d_in"], Float[Array, "... d_out"]]:
        """Returns what is read of rows, and what is to be written."""
        return (rows, rows) if self.mirrors else (rows[..., : self.d_in], rows[..., self.d_in :])

    def pre_activations(
        self, params: SAEParams, x: Float[Array, "b d_in"], step: Int[Array, ""] | None = None
    ) -> Float[Array, "b d_sae"]:
        """Returns what the encoder gives each latent before the activation, differentiable."""
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
        """Returns what goes past the latents with `skip`: x W_skip."""
        return matmul.matmul(x, params.extra["W_skip"], self.matmul_dtype.value)

    def add_skip(
        self, params: SAEParams, recon: Float[Array, "b d_out"], x: Float[Array, "b d_in"]
    ) -> Float[Array, "b d_out"]:
        """Returns `recon` plus what goes past the latents, if anything does."""
        return recon + self.skipped(params, x) if self.skip else recon

    def decoder_norms(self, params: SAEParams) -> Float[Array, "d_sae"]:
        """Returns the norm of each decoder row; for `crosscoder` the sum of its norms in the sites."""
        if self.family is not Family.crosscoder:
            return row_norms(params.W_dec)
        norms = [row_norms(part) for part in sites_of.parts(params.W_dec, self.writes)]
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
        dead: Bool[Array, "d_sae"],
        step: Int[Array, ""],
    ) -> tuple[Float[Array, ""], Aux]:
        """Returns the training loss of one batch and what it was made of (`with_aux_k`)."""
        return with_aux_k.loss(self, params, rows, dead, step)

    def value_and_grad(
        self,
        params: SAEParams,
        rows: Float[Array, "b d_row"],
        *,
        dead: Bool[Array, "d_sae"],
        step: Int[Array, ""],
    ) -> tuple[tuple[Float[Array, ""], Aux], SAEParams]:
        """Returns `loss` and its gradient: what `jax.value_and_grad` gives, AuxK's part added in place."""
        return with_aux_k.value_and_grad(self, params, rows, dead, step)

    def constrain(self, params: SAEParams) -> SAEParams:
        """Maps parameters back onto the constraint after an optimiser step."""
        return constraint.constrain(self, params)

    def project(self, params: SAEParams, grads: SAEParams) -> SAEParams:
        """Removes from gradients what the constraint would undo; call before the optimiser."""
        return constraint.project(self, params, grads)

    def fold(self, params: SAEParams, *, mean: Float[Array, "d_row"], scale: Float[Array, "..."]) -> SAEParams:
        """Turns parameters trained on `(rows - mean) * scale` into parameters that work on `rows` themselves.

        With one site the latents then carry the data's unit; the weights stay, biases and thresholds change. With
        several, scale is [d_row] (or one number for all) and the weights take it in; latents stay as in training.
        """
        if len(self.sites) > 1:
            params = encoders.fold_scale(self, params, jnp.broadcast_to(scale, (self.d_row,)))
            scale = jnp.ones(())
        folded = encoders.fold(self, params, mean, scale)
        return dataclasses.replace(folded, extra=folded.extra | self.fold_extra(params, self.split(mean)[0], scale))

    def with_unit_decoder(self, params: SAEParams) -> SAEParams:
        """Returns the same ReLU autoencoder with decoder rows of norm 1 and latents times the old norms.

        For linear encoders whose activation scales with each latent alone.
        """
        norms = row_norms(params.W_dec)
        some = jnp.where(norms > 0, norms, 1.0)
        return dataclasses.replace(
            params,
            W_enc=params.W_enc * some[None, :],
            b_enc=params.b_enc * some,
            W_dec=params.W_dec / some[:, None],
        )

    def encoder_inputs(
        self, params: SAEParams, x: Float[Array, "b d_in"], step: Int[Array, ""] | None
    ) -> tuple[Array, Array | None]:
        """Returns what the last encoder product reads, and what is added to it beside b_enc (`encoders.inputs`)."""
        return encoders.inputs(self, params, x, lambda pre_acts: self._dense(params, pre_acts, step))

    def _dense(self, params, pre_acts, step):
        """Dense latents inside an unrolled encoder, with their gradient."""
        if not self.k_sparse:
            return self.activate(params, pre_acts, step).dense()
        chosen = self.activate(params, lax.stop_gradient(pre_acts), step).dense()
        return jnp.where(chosen != 0, pre_acts, 0.0)


def row_norms(W: Float[Array, "n d"]) -> Float[Array, "n"]:
    """Returns norms whose gradient at a zero row is 0, not NaN."""
    squares = jnp.sum(W**2, axis=1)
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)


def warmed_up(coefficient: float, step: Array, n_steps: int) -> Float[Array, ""]:
    """Returns a coefficient that grows linearly from 0 over the first `n_steps` optimiser steps."""
    return coefficient * jnp.minimum(1.0, step / n_steps if n_steps else 1.0)


def register(cls: _T) -> _T:
    """Class decorator: enters an architecture under its `name`."""
    ARCHITECTURES[cls.name] = cls
    return cls


def check(ok: bool, field: str, must: str, got: object) -> None:
    """Raises the user's one-line error about `sae.<field>` unless `ok`."""
    if not ok:
        raise UserError(f"sae.{field} {must}, got {got}")


def check_enum(value: object, kind: type[enum.Enum], field: str) -> None:
    """Raises the user's one-line error about `sae.<field>` unless `value` is a member of `kind`."""
    check(isinstance(value, kind), field, f"must be one of {', '.join(m.name for m in kind)}", value)
