"""Solution of a solver: the code, and how far the solver got.

A solver that stopped before its goal says so here; none fails silently.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int


@struct.dataclass
class Solution:
    """Codes of a batch of signals: k-sparse (`values`, `indices`) or dense (`latents`), and the solver's account.

    Attributes:
      residual_norm: Norm of what the code leaves unexplained, [b] float32, in the unit of the signals.
      iterations: Steps taken on the row, [b] int32.
      converged: Whether the method reached its own end, [b] bool: all k atoms chosen or nothing left to explain
        (pursuits), a gap within the tolerance (ista, fista, basis_pursuit). False: iterations ran out, there is no
        code to find, or a number on the way was not finite.
      gap: Distance from the optimum, [b] float32, as the method defines it; NaN where it has none.
      values: [b, min(k, n_atoms)] float32, 0 in an unused slot, or None when dense.
      indices: [b, min(k, n_atoms)] int32, or None when dense. Used slots of a row are distinct.
      latents: [b, n_atoms] float32, or None when k-sparse.
      n_atoms: Rows of the dictionary (static).

    Examples:
      >>> one = jnp.ones(1)
      >>> Solution(one, one, one > 0, one, jnp.array([[2.0, 0.0]]), jnp.array([[1, 0]]), n_atoms=3).dense().tolist()
      [[0.0, 2.0, 0.0]]
    """

    residual_norm: jax.Array
    iterations: jax.Array
    converged: jax.Array
    gap: jax.Array
    values: jax.Array | None = None
    indices: jax.Array | None = None
    latents: jax.Array | None = None
    n_atoms: int = struct.field(pytree_node=False, default=0)

    def dense(self) -> Float[Array, "b n_atoms"]:
        """Returns the codes as one dense array."""
        if self.latents is not None:
            return self.latents
        assert self.values is not None
        rows = jnp.arange(self.values.shape[0])[:, None]
        zeros = jnp.zeros((self.values.shape[0], self.n_atoms), self.values.dtype)
        return zeros.at[rows, self.indices].add(self.values)

    def l0(self) -> Int[Array, "b"]:
        """Returns the number of non-zero entries of each row, int32."""
        code = self.values if self.latents is None else self.latents
        assert code is not None
        return jnp.sum(code != 0, axis=-1, dtype=jnp.int32)
