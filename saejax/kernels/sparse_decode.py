"""Products of k-sparse codes with the rows of a dictionary that touch the active rows only.

Decoding, the gradient of the active values and the gradient of the dictionary are the three passes here; the
encoder's gradient (`sparse_encode`) is made of the same. Each has a form for CPU and one for accelerators.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from saejax.kernels import partition

_BLOCK = 32  # rows whose gathered dictionary rows fit the L2 cache


def sparse_decode(
    values: Float[Array, "b k"], indices: Int[Array, "b k"], W_dec: Float[Array, "d_sae d_in"]
) -> Float[Array, "b d_in"]:
    r"""Returns :math:`y_r = \sum_j v_{rj} W_{i_{rj}}` for every row r.

    Args:
      values: Coefficients.
      indices: Rows of `W_dec`, in [0, d_sae); repeats add up.
      W_dec: One row per latent.

    Example:
      >>> sparse_decode(jnp.array([[2.0, 1.0]]), jnp.array([[0, 2]]), jnp.eye(3)).tolist()
      [[2.0, 0.0, 1.0]]
    """
    return _sparse_decode(values, indices, W_dec)


@jax.custom_vjp
def _sparse_decode(values, indices, W_dec):
    return combine_rows(values, indices, W_dec)


def _forward(values, indices, W_dec):
    return combine_rows(values, indices, W_dec), (values, indices, W_dec)


def _backward(saved, cotangent):
    values, indices, W_dec = saved
    d_values = dot_rows(cotangent, indices, W_dec)
    return d_values, None, accumulate_rows(values, indices, cotangent, W_dec.shape[0])


_sparse_decode.defvjp(_forward, _backward)


def combine_rows(
    values: Float[Array, "b k"], indices: Int[Array, "b k"], W: Float[Array, "n d"]
) -> Float[Array, "b d"]:
    """Returns the sum of the rows of `W` at `indices`, weighted by `values`."""
    cut = partition.of(values.shape[0], W.shape[0])

    def shard(values, indices, W):
        own, indices = _own(indices, cut, W.shape[0])
        values = jnp.where(own, values, 0)
        return cut.sum_latents(lax.platform_dependent(values, indices, W, cpu=_combine_cpu, default=_combine))

    rows = P(cut.rows, None)
    return cut.run(shard, (rows, rows, P(cut.latents, None)), rows)(values, indices, W)


def dot_rows(y: Float[Array, "b d"], indices: Int[Array, "b k"], W: Float[Array, "n d"]) -> Float[Array, "b k"]:
    """Returns the inner product of each row of `y` with each of its rows of `W`."""
    cut = partition.of(y.shape[0], W.shape[0])

    def shard(y, indices, W):
        own, indices = _own(indices, cut, W.shape[0])
        dots = lax.platform_dependent(y, indices, W, cpu=_dot_cpu, default=_dot)
        return cut.sum_latents(jnp.where(own, dots, 0))

    rows = P(cut.rows, None)
    return cut.run(shard, (rows, rows, P(cut.latents, None)), rows)(y, indices, W)


def accumulate_rows(
    values: Float[Array, "b k"], indices: Int[Array, "b k"], y: Float[Array, "b d"], n: int
) -> Float[Array, "n d"]:
    """Returns the [n, d] array whose row i is the sum of `values * y` over all places that name i."""
    cut = partition.of(values.shape[0], n)
    n_local = n if cut.latents is None else n // jax.sharding.get_abstract_mesh().shape[cut.latents]

    def shard(values, indices, y):
        own, indices = _own(indices, cut, n_local)
        values = jnp.where(own, values, 0)
        zeros = jnp.zeros((n_local, y.shape[1]), y.dtype)
        return cut.sum_rows(lax.platform_dependent(zeros, values, indices, y, cpu=_accumulate_cpu, default=_accumulate))

    rows = P(cut.rows, None)
    return cut.run(shard, (rows, rows, rows), P(cut.latents, None))(values, indices, y)


def _own(indices, cut: partition.Partition, n_local: int):
    """Returns which places name a row of this shard, and the shard's own numbering (0 where not its own)."""
    local = indices - cut.first_latent(n_local)
    own = (local >= 0) & (local < n_local)
    return own, jnp.where(own, local, 0)


def _combine(values, indices, W):
    return jnp.einsum("bk,bkd->bd", values, W[indices])


def _combine_cpu(values, indices, W):
    # One fused gather-multiply-add per slot runs on all cores and never stores the gathered rows.
    def add_slot(j, total):
        v = lax.dynamic_slice_in_dim(values, j, 1, axis=1)
        i = lax.dynamic_slice_in_dim(indices, j, 1, axis=1)[:, 0]
        return total + v * jnp.take(W, i, axis=0, mode="clip")

    return lax.fori_loop(0, values.shape[1], add_slot, jnp.zeros((values.shape[0], W.shape[1]), W.dtype))


def _dot(y, indices, W):
    return jnp.einsum("bd,bkd->bk", y, W[indices])


def _dot_cpu(y, indices, W):
    def one(row):
        return jnp.take(W, row[1], axis=0, mode="clip") @ row[0]

    return lax.map(one, (y, indices), batch_size=_BLOCK)


def _accumulate(zeros, values, indices, y):
    rows = values[:, :, None] * y[:, None, :]
    return zeros.at[indices].add(rows, mode="promise_in_bounds")


def _accumulate_cpu(zeros, values, indices, y):
    # Row by row in place: XLA's scatter-add is 2 to 10 times slower here.
    k = values.shape[1]
    flat_values, flat_indices = values.reshape(-1), indices.reshape(-1)

    def add_row(n, total):
        at = (flat_indices[n], 0)
        row = lax.dynamic_slice(total, at, (1, y.shape[1])) + flat_values[n] * lax.dynamic_slice(
            y, (n // k, 0), (1, y.shape[1])
        )
        return lax.dynamic_update_slice(total, row, at)

    return lax.fori_loop(0, values.size, add_row, zeros)
