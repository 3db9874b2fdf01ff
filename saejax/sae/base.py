"""What every sparse autoencoder is: its parameters, its encoding and the methods an architecture must give.

The typed config object is the architecture: a `Sparsifier` is a frozen dataclass with pure methods. Training
differentiates `Sparsifier.loss`; evaluation and users call `encode` and `decode` (through `sae.model.SAE`).
"""

import abc
import dataclasses
import enum
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from saejax.errors import UserError
from saejax.kernels import matmul, sparse_decode, sparse_encode
from saejax.sae import encoders
from saejax.sae.aux_k import aux_k_loss
from saejax.sae.encoders import EncoderKind
from saejax.sae.encoding import Encoding
from saejax.sae.initialise import EncoderInit

ARCHITECTURES: dict[str, type["Sparsifier"]] = {}
"""Every architecture by its name in a config (`sae.type`)."""

_T = TypeVar("_T", bound=type["Sparsifier"])


class MatmulDtype(enum.Enum):
    """Precision of the operands of the large products; results and master weights are always float32."""

    float32 = "float32"
    bfloat16 = "bfloat16"


@struct.dataclass
class SAEParams:
    """The trainable arrays of one SAE, float32, never transposed.

    Attributes:
      W_enc: Encoder, [d_in, d_sae] ([encoder_hidden, d_sae] behind a hidden layer).
      b_enc: Bias of the latents, [d_sae].
      W_dec: Decoder, one row per latent, [d_sae, d_in].
      b_dec: Bias of the reconstruction, [d_in].
      extra: What one architecture adds, by name.
    """

    W_enc: jax.Array
    b_enc: jax.Array
    W_dec: jax.Array
    b_dec: jax.Array
    extra: dict[str, jax.Array] = struct.field(default_factory=dict)


@struct.dataclass
class Aux:
    """What a loss returns beside its value.

    Attributes:
      recon: Reconstruction of the (normalised) input, [b, d_in] float32.
      encoding: The encoding behind it.
      terms: Loss terms by name, before their coefficients ("mse", "aux_k", "l1", ...), scalars.
    """

    recon: jax.Array
    encoding: Encoding
    terms: dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sparsifier(abc.ABC):
    """One SAE architecture with its sizes and coefficients: static, hashable, all methods pure.

    An architecture gives `activate` and `objective`; what it adds to the parameters (`extra`), their scale
    (`fold_extra`), their bounds (`constrain_extra`) and what moves without a gradient (`track`) have empty defaults.
    """

    name: ClassVar[str]
    preferred_norm: ClassVar[str] = "unit"
    """Scale of the input that its coefficients suit: unit (E||x||^2 = 1) or sqrt_d (E||x|| = sqrt(d_in))."""

    d_in: int
    """Width of the activations; at least 1."""
    d_sae: int
    """Number of latents; at least 1. Usual: 8 to 64 times d_in."""
    matmul_dtype: MatmulDtype = MatmulDtype.float32
    """Operands of the encoder product; bfloat16 is faster, the result is float32 either way."""
    encoder: EncoderKind = EncoderKind.linear
    """`linear`, `tied` (the decoder's transpose), `mlp` (a hidden ReLU layer) or `lista` (unrolled thresholding)."""
    encoder_hidden: int | None = None
    """Hidden units of the mlp encoder, at least 1 (2 d_in where it starts as the transpose); null takes 2 d_in."""
    encoder_steps: int = 3
    """Steps of the lista encoder, at least 1; each costs two products."""
    encoder_init: EncoderInit = EncoderInit.transpose
    """Where the encoder starts: `transpose` (of the decoder) or `independent`."""
    decoder_init_norm: float = 1.0
    """Norm of the decoder rows at the start, above 0; 1 where `unit_decoder` holds them there."""
    subtract_b_dec: bool = True
    """Whether the encoder reads x - b_dec (pre-encoder bias) or x."""
    unit_decoder: bool = True
    """Whether decoder rows are kept at norm 1, their gradients tangent to the sphere."""
    aux_alpha: float = 1 / 32
    """Weight of the AuxK loss against mse over variance, dimensionless; 0 turns it off. 1/32 as in Gao et al."""
    k_aux: int | None = None
    """Dead latents that explain the residual of a row, in [1, d_sae]; null takes half of d_in."""

    def __post_init__(self):
        check(self.d_in >= 1, "d_in", "must be at least 1", self.d_in)
        check(self.d_sae >= 1, "d_sae", "must be at least 1", self.d_sae)
        check_enum(self.matmul_dtype, MatmulDtype, "matmul_dtype")
        check_enum(self.encoder, EncoderKind, "encoder")
        check_enum(self.encoder_init, EncoderInit, "encoder_init")
        mirrored = self.encoder is EncoderKind.mlp and self.encoder_init is EncoderInit.transpose
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
        self, params: SAEParams, x: Float[Array, "b d_in"], step: Int[Array, ""]
    ) -> tuple[Float[Array, ""], Aux]:
        """Returns the training loss of one batch but for AuxK, and what it was made of."""

    def extra(self) -> dict[str, jax.Array]:
        """Returns the parameters that the architecture adds, as they start."""
        return {}

    def fold_extra(
        self, params: SAEParams, mean: Float[Array, "d_in"], scale: Float[Array, ""]
    ) -> dict[str, jax.Array]:
        """Returns `extra()`'s parameters for x itself, trained on `(x - mean) * scale`."""
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
        biases = {"b_enc": jnp.zeros(self.d_sae), "b_dec": jnp.zeros(self.d_in)}
        return SAEParams(W_enc=W_enc, W_dec=W_dec, **biases, extra=of_encoder | self.extra())

    def pre_activations(
        self, params: SAEParams, x: Float[Array, "b d_in"], step: Int[Array, ""] | None = None
    ) -> Float[Array, "b d_sae"]:
        """Returns what the encoder gives each latent before the activation, differentiable."""
        read, carried = self._encoder_inputs(params, x, step)
        return encoders.product(params, read, carried, self.matmul_dtype.value)

    def encode(self, params: SAEParams, x: Float[Array, "b d_in"]) -> Encoding:
        """Returns the latents of each row of `x`, as at inference."""
        return self.code(params, x, None)

    def code(self, params: SAEParams, x: Float[Array, "b d_in"], step: Int[Array, ""] | None) -> Encoding:
        """Returns the latents of each row: of training at `step`, or of inference (None)."""
        if not self.k_sparse:
            return self.activate(params, self.pre_activations(params, x, step), step)
        if self.encoder in (EncoderKind.linear, EncoderKind.tied):
            # One dense product forward; the gradient touches active latents only.
            bias = params.b_dec if self.subtract_b_dec else jnp.zeros_like(params.b_dec)
            weights = params.W_enc, params.b_enc, bias
            pre_acts = sparse_encode.pre_activations(x, *weights, self.matmul_dtype.value)
            chosen = self.activate(params, pre_acts, step)
            values = sparse_encode.with_encoder_gradient(chosen.values, chosen.indices, x, *weights)
        else:
            pre_acts = self.pre_activations(params, x, step)
            chosen = self.activate(params, lax.stop_gradient(pre_acts), step)
            values = sparse_encode.with_gradient_of(chosen.values, chosen.indices, pre_acts)
        return dataclasses.replace(chosen, values=values)

    def decode(self, params: SAEParams, encoding: Encoding) -> Float[Array, "b d_in"]:
        """Returns the sum of the active decoder rows plus `b_dec`."""
        if encoding.latents is not None:
            recon = matmul.matmul(encoding.latents, params.W_dec, self.matmul_dtype.value)
        else:
            assert encoding.values is not None and encoding.indices is not None
            recon = sparse_decode.sparse_decode(encoding.values, encoding.indices, params.W_dec)
        return recon + params.b_dec[None, :]

    def reconstruct(self, params: SAEParams, x: Float[Array, "b d_in"], step: Int[Array, ""]) -> Aux:
        """Returns the training reconstruction with the term "mse": sum over d_in, mean over rows."""
        encoding = self.code(params, x, step)
        recon = self.decode(params, encoding)
        residual = x - recon
        return Aux(recon=recon, encoding=encoding, terms={"mse": jnp.mean(jnp.sum(residual**2, axis=1))})

    def loss(
        self,
        params: SAEParams,
        x: Float[Array, "b d_in"],
        *,
        dead: Bool[Array, "d_sae"],
        step: Int[Array, ""],
    ) -> tuple[Float[Array, ""], Aux]:
        r"""Returns the training loss of one batch and what it was made of: objective :math:`+ \alpha\, s^2\,` aux.

        aux is dimensionless (`aux_k`), and :math:`s^2 = E\|x - \bar x\|^2`, from the batch and without a
        gradient, gives it the unit of mse. So with TopK the loss is that of Gao et al. (mse / s^2 + alpha aux)
        times s^2, alpha means the same at every scale of the data, and with centred data of E||x||^2 = 1 it is the
        loss of dictionary_learning's TopK trainer but for the factor min(n_dead / k_aux, 1).

        Args:
          params: Parameters.
          x: Normalised activations, float32.
          dead: Latents that count as dead at this step.
          step: Number of optimiser steps already taken, for schedules.
        """
        loss, aux = self.objective(params, x, step)
        if self.aux_alpha == 0:
            return loss, aux
        read, _ = self._encoder_inputs(params, x, step)
        fixed = lax.stop_gradient((read, x - aux.recon))
        dtype = self.matmul_dtype.value
        weights = params.W_enc, params.b_enc, params.W_dec
        term: Any = aux_k_loss(*weights, *fixed, dead, self.n_aux, dtype, self.signed)
        spread = jnp.mean(jnp.sum((x - jnp.mean(x, axis=0, keepdims=True)) ** 2, axis=1))
        loss = loss + self.aux_alpha * lax.stop_gradient(spread) * term
        return loss, dataclasses.replace(aux, terms=aux.terms | {"aux_k": term})

    def constrain(self, params: SAEParams) -> SAEParams:
        """Maps parameters back onto the constraint after an optimiser step."""
        bounded = self.constrain_extra(params)
        if bounded:
            params = dataclasses.replace(params, extra=params.extra | bounded)
        if self.unit_decoder:
            norm = jnp.linalg.norm(params.W_dec, axis=1, keepdims=True)
            params = dataclasses.replace(params, W_dec=params.W_dec / jnp.maximum(norm, 1e-20))
        if self.encoder is EncoderKind.tied:
            params = dataclasses.replace(params, W_enc=params.W_dec.T)
        return params

    def project(self, params: SAEParams, grads: SAEParams) -> SAEParams:
        """Removes from gradients what the constraint would undo; call before the optimiser.

        The gradient of a tied encoder moves to the decoder; that along a unit row goes: rescaling would undo it.
        """
        if self.encoder is EncoderKind.tied:
            both = grads.W_dec + grads.W_enc.T
            grads = dataclasses.replace(grads, W_dec=both, W_enc=jnp.zeros_like(grads.W_enc))
        if self.unit_decoder:
            along = jnp.sum(params.W_dec * grads.W_dec, axis=1, keepdims=True)
            grads = dataclasses.replace(grads, W_dec=grads.W_dec - along * params.W_dec)
        return grads

    def fold(self, params: SAEParams, *, mean: Float[Array, "d_in"], scale: Float[Array, ""]) -> SAEParams:
        """Turns parameters trained on `(x - mean) * scale` into parameters that work on `x` itself.

        Latents then carry the data's unit; the weights stay, biases and thresholds change.
        """
        folded = encoders.fold(self, params, mean, scale)
        return dataclasses.replace(folded, extra=folded.extra | self.fold_extra(params, mean, scale))

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

    def _encoder_inputs(self, params, x, step):
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
