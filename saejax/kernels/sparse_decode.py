"""Products of k-sparse codes with a dictionary that touch only the active rows.

The three passes here are decoding, the gradient of the active values and the gradient of the dictionary. The encoder's
gradient (`sparse_encode`) consists of the same passes. Each has one form for CPUs and one for accelerators.
"""

import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from saejax.kernels import choice, pallas_decode, partition
from saejax.kernels.choice import Form, Operation

_DENSE_LATENTS = 8  # latents per slot up to which dense products win on CPU: 27 against 35 ms at 8, 46 against 42 at 16
_GATHERED_BYTES = 2**28  # of the rows that an accelerator gathers at a time
_CORES = min(os.cpu_count() or 1, 16)
_BLOCK = 16  # rows whose gathered dictionary rows stay near the core: 65 ms against 77 with 8 (4,096 rows, k 32, d 768)


def sparse_decode(
    values: Float[Array, "b k"], indices: Int[Array, "b k"], W_dec: Float[Array, "d_sae d_in"]
) -> Float[Array, "b d_in"]:
    r"""Returns :math:`y_r = \sum_j v_{rj} W_{i_{rj}}` for every row r.

    Args:
      values: Coefficients.
      indices: Rows of `W_dec`, in [0, d_sae); repeats add up.
      W_dec: One row per latent.

    Examples:
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


def squared_error(
    values: Float[Array, "b k"],
    indices: Int[Array, "b k"],
    W_dec: Float[Array, "d_sae d_in"],
    y: Float[Array, "b d_in"],
) -> tuple[Float[Array, ""], Float[Array, "b d_in"]]:
    r"""Returns :math:`\frac1b \sum_r \|y_r - \sum_j v_{rj} W_{i_{rj}}\|^2` and the residuals, which have no gradient.

    The gradient of the values is taken in the same pass as the residual, from the same gathered rows.

    Args:
      values: Coefficients.
      indices: Rows of `W_dec`, in [0, d_sae); repeats add up.
      W_dec: One row per latent.
      y: Target of the reconstruction.

    Examples:
      >>> error, residual = squared_error(jnp.array([[2.0]]), jnp.array([[1]]), jnp.eye(2), jnp.array([[1.0, 2.0]]))
      >>> float(error), residual.tolist()
      (1.0, [[1.0, 0.0]])
    """
    return _squared_error(values, indices, W_dec, y)


@jax.custom_vjp
def _squared_error(values, indices, W_dec, y):
    return _error_of(y - combine_rows(values, indices, W_dec))


def _error_of(residual):
    return jnp.mean(jnp.sum(residual**2, axis=1)), residual


def _error_forward(values, indices, W_dec, y):
    residual, dots = _residual_and_dots(values, indices, W_dec, y)
    return _error_of(residual), (values, indices, residual, dots, jnp.zeros((W_dec.shape[0], 0)))


def _error_backward(saved, cotangents):
    values, indices, residual, dots, width = saved
    slope = 2 * cotangents[0] / len(residual)
    d_W = accumulate_rows(-slope * values, indices, residual, width.shape[0])
    return -slope * dots, None, d_W, slope * residual


_squared_error.defvjp(_error_forward, _error_backward)


def _residual_and_dots(values, indices, W, y):
    """The residual of each row, and its inner products with the rows of `W` that it names."""
    cut = partition.of(values.shape[0], W.shape[0])
    forms = [_form(operation, values, W.shape) for operation in (Operation.decode, Operation.dot)]
    # With latents over shards, none knows the residual before the sum over all of them.
    fused = cut.latents is None and Form.dense not in forms

    def separate(values, indices, W, y):
        residual = y - combine_rows(values, indices, W)
        return residual, dot_rows(residual, indices, W)

    if not fused:
        return separate(values, indices, W, y)

    def shard(values, indices, W, y):
        return lax.platform_dependent(values, indices, W, y, cpu=_residual_and_dots_cpu, default=separate)

    rows = P(cut.rows, None)
    return cut.run(shard, (rows, rows, P(), rows), (rows, rows))(values, indices, W, y)


def combine_rows(
    values: Float[Array, "b k"], indices: Int[Array, "b k"], W: Float[Array, "n d"]
) -> Float[Array, "b d"]:
    """Returns the sum of the rows of `W` at `indices`, weighted by `values`."""
    cut = partition.of(values.shape[0], W.shape[0])
    combine = _chosen(Operation.decode, values, W.shape)

    def shard(values, indices, W):
        own, indices = _own(indices, cut, W.shape[0])
        values = jnp.where(own, values, 0)
        return cut.sum_latents(combine(values, indices, W))

    rows = P(cut.rows, None)
    return cut.run(shard, (rows, rows, P(cut.latents, None)), rows)(values, indices, W)


def dot_rows(y: Float[Array, "b d"], indices: Int[Array, "b k"], W: Float[Array, "n d"]) -> Float[Array, "b k"]:
    """Returns the inner product of each row of `y` with each of its rows of `W`."""
    cut = partition.of(y.shape[0], W.shape[0])
    dot = _chosen(Operation.dot, indices, W.shape)

    def shard(y, indices, W):
        own, indices = _own(indices, cut, W.shape[0])
        return cut.sum_latents(jnp.where(own, dot(y, indices, W), 0))

    rows = P(cut.rows, None)
    return cut.run(shard, (rows, rows, P(cut.latents, None)), rows)(y, indices, W)


def accumulate_rows(
    values: Float[Array, "b k"], indices: Int[Array, "b k"], y: Float[Array, "b d"], n: int
) -> Float[Array, "n d"]:
    """Returns the [n, d] array whose row i is the sum of `values * y` over all places that name i."""
    cut = partition.of(values.shape[0], n)
    accumulate = _chosen(Operation.accumulate, values, (n, y.shape[1]))
    n_local = n if cut.latents is None else n // jax.sharding.get_abstract_mesh().shape[cut.latents]

    def shard(values, indices, y):
        own, indices = _own(indices, cut, n_local)
        values = jnp.where(own, values, 0)
        zeros = jnp.full((n_local, y.shape[1]), _zero_after(values, indices), y.dtype)
        return cut.sum_rows(accumulate(zeros, values, indices, y))

    rows = P(cut.rows, None)
    return cut.run(shard, (rows, rows, rows), P(cut.latents, None))(values, indices, y)


def _form(operation: Operation, places: Array, shape: tuple[int, ...]) -> Form:
    """Which form runs for places [b, k] and a dictionary [n, d]: the user's, or the one that the rule takes."""
    preferred = Form.sparse
    if choice.target().platform == "cpu" and shape[0] <= _DENSE_LATENTS * places.shape[1]:
        preferred = Form.dense
    elif choice.runs_mosaic() and pallas_decode.fits(shape[1]):
        preferred = Form.pallas
    return choice.of(operation, preferred, width=shape[1])


def _chosen(operation: Operation, places: Array, shape: tuple[int, ...]) -> Callable[..., Array]:
    """Function that computes an operation on one device."""
    form = _form(operation, places, shape)
    dense, cpu, xla, kernel = _FORMS[operation]
    if form is Form.dense:
        return dense
    cuda = kernel if form is Form.pallas else xla
    return lambda *args: lax.platform_dependent(*args, cpu=cpu, cuda=cuda, default=xla)


def _zero_after(values, indices):
    """A zero that the compiler must read from the data.

    A task of its own then fills the buffer and continues with the loop over it, so two accumulations run side by side
    on a CPU. Two constant buffers would be one, and its copy.
    """
    if values.size == 0:
        return jnp.zeros(())
    return jnp.where((values[0, 0] > jnp.inf) | (indices[0, 0] < 0), 1.0, 0.0)


def _own(indices, cut: partition.Partition, n_local: int):
    """Returns which places name a row of this shard, and the shard's own numbering (0 where not its own)."""
    local = indices - cut.first_latent(n_local)
    own = (local >= 0) & (local < n_local)
    return own, jnp.where(own, local, 0)


def _by_blocks(of_block, width, *arrays):
    """`of_block` of all rows, a block after the other, where gathered rows [b, k, width] would be large."""
    b, k = arrays[-1].shape
    n = partition.equal_blocks(b, 4 * k * width, _GATHERED_BYTES)
    if n == 1:
        return of_block(*arrays)
    found = lax.map(lambda block: of_block(*block), tuple(a.reshape(n, b // n, *a.shape[1:]) for a in arrays))
    return found.reshape(b, *found.shape[2:])


def _combine(values, indices, W):
    return _by_blocks(lambda v, i: jnp.einsum("bk,bkd->bd", v, W[i]), W.shape[1], values, indices)


def _combine_cpu(values, indices, W):
    # One fused gather-multiply-add per slot runs on all cores and never stores the gathered rows.
    def add_slot(j, total):
        v = lax.dynamic_slice_in_dim(values, j, 1, axis=1)
        i = lax.dynamic_slice_in_dim(indices, j, 1, axis=1)[:, 0]
        return total + v * jnp.take(W, i, axis=0, mode="clip")

    return lax.fori_loop(0, values.shape[1], add_slot, jnp.zeros((values.shape[0], W.shape[1]), W.dtype))


def _dot(y, indices, W):
    return _by_blocks(lambda y, i: jnp.einsum("bd,bkd->bk", y, W[i]), W.shape[1], y, indices)


def _dot_cpu(y, indices, W):
    def one(row):
        return jnp.take(W, row[1], axis=0, mode="clip") @ row[0]

    return lax.map(one, (y, indices), batch_size=_BLOCK)


def _residual_and_dots_cpu(values, indices, W, y):
    def one(row):
        values, indices, y = row
        named = jnp.take(W, indices, axis=0, mode="clip")
        residual = y - values @ named
        return residual, named @ residual

    # Every part is one loop on one core; the parts do not wait for each other.
    n_parts = min(_CORES, max(1, len(y) // _BLOCK))
    cuts = [len(y) * part // n_parts for part in range(1, n_parts)]
    parts = zip(*(jnp.split(array, cuts) for array in (values, indices, y)), strict=True)
    done = [lax.map(one, part, batch_size=_BLOCK) for part in parts]
    return tuple(jnp.concatenate(found) for found in zip(*done, strict=True))


def _accumulate(zeros, values, indices, y):
    n = partition.equal_blocks(len(y), 4 * values.shape[1] * y.shape[1], _GATHERED_BYTES)

    def add(turn, total):
        size = len(y) // n
        v, i, rows = (lax.dynamic_slice_in_dim(a, turn * size, size) for a in (values, indices, y))
        return total.at[i].add(v[:, :, None] * rows[:, None, :], mode="promise_in_bounds")

    if n > 1:
        return lax.fori_loop(0, n, add, zeros)
    rows = values[:, :, None] * y[:, None, :]
    return zeros.at[indices].add(rows, mode="promise_in_bounds")


def _accumulate_xla(zeros, values, indices, y):
    return _sum_by_latent(zeros, values, indices, y) if y.shape[1] == 1 else _accumulate(zeros, values, indices, y)


def _sum_by_latent(zeros, values, indices, y):
    """`_accumulate` of rows of one number, in the order of the places: a GPU's scatter would add by atomics."""
    n = zeros.shape[0]
    latents, places = _by_latent(indices, n)
    numbers = (values * y).reshape(-1)[places]
    first = jnp.concatenate([jnp.ones(1, bool), latents[1:] != latents[:-1]])

    def join(left, right):
        return left[0] | right[0], jnp.where(right[0], right[1], left[1] + right[1])

    _, sums = lax.associative_scan(join, (first, numbers))
    ends = jnp.searchsorted(latents, jnp.arange(n, dtype=latents.dtype), side="right")
    last = jnp.maximum(ends - 1, 0)
    return zeros + jnp.where(latents[last] == jnp.arange(n), sums[last], 0)[:, None]


def _accumulate_cpu(zeros, values, indices, y):
    # Row by row in place, latent by latent, so that a row of the result stays in the cache until it is done: less than
    # half the time of the order in which rows come, or of XLA's scatter.
    if y.shape[1] == 1:
        return _accumulate(zeros, values, indices, y)
    latents, places = _by_latent(indices, zeros.shape[0])
    values, rows = values.reshape(-1)[places], places // values.shape[1]

    def add_row(n, total):
        at = (latents[n], 0)
        row = lax.dynamic_slice(total, at, (1, y.shape[1]))
        row = row + values[n] * lax.dynamic_slice(y, (rows[n], 0), (1, y.shape[1]))
        return lax.dynamic_update_slice(total, row, at)

    return lax.fori_loop(0, values.size, add_row, zeros, unroll=2)


def _by_latent(indices, n):
    """Returns the latents that are named, sorted, and their places in `indices`; equals in the order of places."""
    flat, count = indices.reshape(-1), indices.size
    if n * count >= 2**32:
        places = lax.iota(jnp.int32, count)
        latents, places = lax.sort((flat, places), num_keys=1)
        return latents, places
    # One word that holds both sorts four times as fast as a pair.
    keys = lax.sort(flat.astype(jnp.uint32) * jnp.uint32(count) + lax.iota(jnp.uint32, count), is_stable=False)
    return (keys // jnp.uint32(count)).astype(jnp.int32), (keys % jnp.uint32(count)).astype(jnp.int32)


def _code(values, indices, n):
    rows = jnp.arange(values.shape[0])[:, None]
    return jnp.zeros((values.shape[0], n), values.dtype).at[rows, indices].add(values)


def _combine_dense(values, indices, W):
    return _code(values, indices, W.shape[0]) @ W


def _dot_dense(y, indices, W):
    return jnp.take_along_axis(y @ W.T, indices, axis=1)


def _accumulate_dense(zeros, values, indices, y):
    return zeros + _code(values, indices, zeros.shape[0]).T @ y


def _accumulate_pallas(zeros, values, indices, y):
    return pallas_decode.accumulate_rows(values, indices, y, zeros.shape[0])


_FORMS = {
    Operation.decode: (_combine_dense, _combine_cpu, _combine, pallas_decode.combine_rows),
    Operation.dot: (_dot_dense, _dot_cpu, _dot, pallas_decode.dot_rows),
    Operation.accumulate: (_accumulate_dense, _accumulate_cpu, _accumulate_xla, _accumulate_pallas),
}
"""Of each operation: dense, sparse on CPU, sparse by XLA elsewhere, the kernel for GPUs."""
