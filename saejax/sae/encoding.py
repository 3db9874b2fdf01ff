"""Encoding: k-sparse values with their indices, or dense latents; the return type of every encoder."""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float


@struct.dataclass
class Encoding:
    """Output of an encoder: either k-sparse (`values`, `indices`) or dense (`latents`).

    A latent is active where it is not 0: `AbsTopK` has negative ones. A value of 0 in a k-sparse encoding is an
    unused slot, whatever its index.

    Attributes:
      values: [b, k] float32, or None when dense.
      indices: [b, k] int32, distinct among the used slots of a row, or None when dense.
      latents: [b, d_sae] float32, or None when k-sparse.
      d_sae: Number of latents (static).

    Examples:
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
        """Returns which latents are active in at least one row."""
        if self.latents is not None:
            return jnp.any(self.latents != 0, axis=0)
        assert self.values is not None
        return jnp.zeros(self.d_sae, bool).at[self.indices].max(self.values != 0)

    def l0(self) -> Float[Array, "b"]:
        """Returns the number of active latents in each row, float32."""
        active = self.values if self.latents is None else self.latents
        assert active is not None
        return jnp.sum(active != 0, axis=-1, dtype=jnp.float32)
