"""The k-th largest entry of a whole array: exact on any mesh, without sorting or moving entries.

Non-negative floats sort like their bits, so 31 counts of the entries above a candidate find the answer bit by bit.
Counts are integers: shards add up to the same answer on any mesh.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def kth_largest(values: Float[Array, "b n"], k: int) -> Float[Array, ""]:
    """Returns the k-th largest of all entries; no gradient.

    `values >= kth_largest(values, k)` keeps the k largest and, beyond them, whatever ties with the last of them.

    Args:
      values: Entries of at least 0 (infinity allowed, no NaN), fewer than 2^31 of them.
      k: In [1, b n].

    Examples:
      >>> float(kth_largest(jnp.array([[0.0, 3.0], [1.0, 3.0]]), 3))
      1.0
    """
    if not 1 <= k <= values.size < 2**31:
        raise ValueError(f"k must be in [1, {values.size}] and the array below 2^31 entries, got k={k}")
    bits = lax.bitcast_convert_type(lax.stop_gradient(values).astype(jnp.float32), jnp.int32)

    def settle(n, found):
        candidate = found | (jnp.int32(1) << (30 - n))
        return jnp.where(jnp.sum(bits >= candidate, dtype=jnp.int32) >= k, candidate, found)

    found: jax.Array = lax.fori_loop(0, 31, settle, jnp.zeros((), jnp.int32))
    return lax.bitcast_convert_type(found, jnp.float32)
