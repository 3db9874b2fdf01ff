"""Selection without sorting: the k-th largest entry of an array, exact on any mesh, and the k largest of each row.

Non-negative floats sort like their bits, so 31 counts of the entries above a candidate find the answer bit by bit.
Counts are integers: shards add up to the same answer on any mesh.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from saejax.kernels import choice, partition


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
    if choice.target().platform != "cpu":
        return lax.bitcast_convert_type(of_bits(bits, k, lambda above: jnp.sum(above, dtype=jnp.int32)), jnp.float32)

    def settle(n, found):
        candidate = found | (jnp.int32(1) << (30 - n))
        return jnp.where(jnp.sum(bits >= candidate, dtype=jnp.int32) >= k, candidate, found)

    found: jax.Array = lax.fori_loop(0, 31, settle, jnp.zeros((), jnp.int32))
    return lax.bitcast_convert_type(found, jnp.float32)


def of_bits(bits: Int[Array, "..."], k: int, count: Callable[[Array], Int[Array, "..."]]) -> Int[Array, "..."]:
    """Returns the k-th largest of non-negative numbers below 2^31, four bits at a time: 8 passes over the array.

    Each pass makes 15 counts of what it has read once, where memory limits the time.

    Args:
      bits: The numbers.
      k: Which one; at least 1, at most as many as are counted together.
      count: Counts what is true: of all entries, or of each row with its axis kept.
    """
    found = jnp.int32(0)
    for shift in range(28, -1, -4):
        digits = range(1, 8 if shift == 28 else 16)
        counts = [count(bits >= (found | jnp.int32(digit << shift))) for digit in digits]
        digit = sum((counted >= k).astype(jnp.int32) for counted in counts)
        found = found | (digit << shift)
    return found


def keep(values: Float[Array, "b n"], k: int) -> Float[Array, "b n"]:
    """Returns 1 at the k largest entries of each row and 0 elsewhere, equals by lowest index, without sorting.

    Args:
      values: Entries of at least 0, on any mesh.
      k: In [1, n].
    """
    cut = partition.of(*values.shape)

    def shard(values):
        bits = lax.bitcast_convert_type(values, jnp.int32)

        def count(true):
            return cut.sum_latents(jnp.sum(true, axis=1, keepdims=True, dtype=jnp.int32))

        last = of_bits(bits, k, count)
        equal = bits == last
        n_equal = jnp.sum(equal, axis=1, keepdims=True, dtype=jnp.int32)
        before = jnp.zeros_like(n_equal)  # equals in shards of lower indices
        if cut.latents is not None:
            of_shards = lax.all_gather(n_equal, cut.latents, axis=1, tiled=True)
            earlier = jnp.arange(of_shards.shape[1])[None, :] < lax.axis_index(cut.latents)
            before = jnp.sum(jnp.where(earlier, of_shards, 0), axis=1, keepdims=True)
        room = k - count(bits > last)
        number = before + jnp.cumsum(equal, axis=1, dtype=jnp.int32)
        return ((bits > last) | equal & (number <= room)).astype(values.dtype)

    place = P(cut.rows, cut.latents)
    return cut.run(shard, (place,), place)(lax.stop_gradient(values))
