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
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from saejax.errors import UserError

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
      W_enc: Encoder, [d_in, d_sae].
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
class Encoding:
    """What an encoder returns: either k-sparse (`values`, `indices`) or dense (`latents`).

    Latents are never negative. A value of 0 in a k-sparse encoding is an unused slot, whatever its index.

    Attributes:
      values: [b, k] float32, or None when dense.
      indices: [b, k] int32, distinct within a row, or None when dense.
      latents: [b, d_sae] float32, or None when k-sparse.
      d_sae: Number of latents (static).

    Example:
      >>> e = Encoding(values=jnp.array([[2.0, 0.0]]), indices=jnp.array([[1, 0]]), d_sae=3)
      >>> e.dense().tolist(), e.l0().tolist(), e.fired().tolist()
      ([[0.0, 2.0, 0.0]], [1.0], [False, True, False])
    """

    values: jax.Array | None = None
    indices: jax.Array | None = None
    latents: jax.Array | None = None
    d_sae: int = struct.field(pytree_node=False, default=0)

    def dense(self) -> Float[Array, "b d_sae"]:
        """Returns the latents as one dense array."""
        if self.latents is not None:
            return self.latents
        assert self.values is not None
        rows = jnp.arange(self.values.shape[0])[:, None]
        zeros = jnp.zeros((self.values.shape[0], self.d_sae), self.values.dtype)
        return zeros.at[rows, self.indices].add(self.values)

    def fired(self) -> Bool[Array, "d_sae"]:
        """Returns which latents are above zero in at least one row."""
        if self.latents is not None:
            return jnp.any(self.latents > 0, axis=0)
        assert self.values is not None
        return jnp.zeros(self.d_sae, bool).at[self.indices].max(self.values > 0)

    def l0(self) -> Float[Array, "b"]:
        """Returns the number of latents above zero in each row, float32."""
        active = self.values if self.latents is None else self.latents
        assert active is not None
        return jnp.sum(active > 0, axis=-1, dtype=jnp.float32)


@struct.dataclass
class Aux:
    """What a loss returns beside its value.

    Attributes:
      recon: Reconstruction of the (normalised) input, [b, d_in] float32.
      encoding: The encoding behind it.
      terms: Loss terms by name, before their coefficients ("mse", "aux_k", "l1"), scalars.
    """

    recon: jax.Array
    encoding: Encoding
    terms: dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sparsifier(abc.ABC):
    """One SAE architecture with its sizes and coefficients: static, hashable, all methods pure."""

    name: ClassVar[str]
    preferred_norm: ClassVar[str] = "unit"
    """Scale of the input that its coefficients suit: unit (E||x||^2 = 1) or sqrt_d (E||x|| = sqrt(d_in))."""

    d_in: int
    """Width of the activations; at least 1."""
    d_sae: int
    """Number of latents; at least 1. Usual: 8 to 64 times d_in."""
    matmul_dtype: MatmulDtype = MatmulDtype.float32
    """Operands of the encoder product; bfloat16 is faster, the result is float32 either way."""

    def __post_init__(self):
        check(self.d_in >= 1, "d_in", "must be at least 1", self.d_in)
        check(self.d_sae >= 1, "d_sae", "must be at least 1", self.d_sae)
        check_enum(self.matmul_dtype, MatmulDtype, "matmul_dtype")

    @abc.abstractmethod
    def init(self, key: Key[Array, ""]) -> SAEParams:
        """Draws the parameters at the start of training."""

    @abc.abstractmethod
    def encode(self, params: SAEParams, x: Float[Array, "b d_in"]) -> Encoding:
        """Returns the latents of each row of `x`."""

    @abc.abstractmethod
    def decode(self, params: SAEParams, encoding: Encoding) -> Float[Array, "b d_in"]:
        """Returns the reconstruction of each row."""

    @abc.abstractmethod
    def loss(
        self,
        params: SAEParams,
        x: Float[Array, "b d_in"],
        *,
        dead: Bool[Array, "d_sae"],
        step: Int[Array, ""],
    ) -> tuple[Float[Array, ""], Aux]:
        """Returns the training loss of one batch and what it was made of.

        Args:
          params: Parameters.
          x: Normalised activations, float32.
          dead: Latents that count as dead at this step.
          step: Number of optimiser steps already taken, for schedules.
        """

    @abc.abstractmethod
    def constrain(self, params: SAEParams) -> SAEParams:
        """Maps parameters back onto the constraint after an optimiser step."""

    @abc.abstractmethod
    def project(self, params: SAEParams, grads: SAEParams) -> SAEParams:
        """Removes from gradients what the constraint would undo; call before the optimiser."""

    @abc.abstractmethod
    def fold(self, params: SAEParams, *, mean: Float[Array, "d_in"], scale: Float[Array, ""]) -> SAEParams:
        """Turns parameters trained on `(x - mean) * scale` into parameters that work on `x` itself."""


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
