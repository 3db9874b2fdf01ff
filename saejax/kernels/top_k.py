"""The k largest entries of each row: exact on any mesh; the lowest index wins ties.

Encoders call it on their pre-activations. Plain jit would gather all latents of a sharded row onto every device; here
each shard sends only its own k candidates.
"""

import functools
import inspect
from typing import Any

import jax.numpy as jnp
import jaxlib.version
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from saejax.kernels import partition

_GROUP = 16  # measured on CPU, 1,024 rows: 12.8 against 15.1 ms at 4,608 columns, 17 against 35 ms at 16,384
_CALLS, _ROWS = 32, 16  # calls side by side (2,048 rows of 4,096: 14.4 ms in one call, 10.6 in 32), rows for one to pay
# Newer jax lets a caller give up the order among equals.
_UNSTABLE: dict[str, Any] = {"is_stable": False} if "is_stable" in inspect.signature(lax.top_k).parameters else {}


def top_k(pre_acts: Float[Array, "b n"], k: int) -> tuple[Float[Array, "b k"], Int[Array, "b k"]]:
    """Returns the k largest values of each row, best first, and their indices.

    No gradient flows through it: the caller defines the gradient of a selected value
    (`sparse_encode.with_encoder_gradient`).

    Args:
      pre_acts: Any real values, without NaN.
      k: How many to keep, in [1, n].

    Returns:
      Values in descending order and int32 indices; of equal values the lowest index comes first.

    Examples:
      >>> values, indices = top_k(jnp.array([[1.0, 3.0, 3.0, 2.0]]), 3)
      >>> values.tolist(), indices.tolist()
      ([[3.0, 3.0, 2.0]], [[1, 2, 3]])
    """
    if not 1 <= k <= pre_acts.shape[1]:
        raise ValueError(f"k must be in [1, {pre_acts.shape[1]}], got {k}")
    cut = partition.of(*pre_acts.shape)

    def shard(local):
        n_local = local.shape[1]
        return of_shards(*on_device(local, min(k, n_local)), k, cut, n_local)  # a shard may hold fewer than k latents

    rows = P(cut.rows, None)
    return cut.run(shard, (P(cut.rows, cut.latents),), (rows, rows))(lax.stop_gradient(pre_acts))


def of_shards(
    values: Float[Array, "b c"], indices: Int[Array, "b c"], k: int, cut: partition.Partition, n_local: int
) -> tuple[Float[Array, "b k"], Int[Array, "b k"]]:
    """Returns the k best of all shards of latents from the best of each, inside `Partition.run`.

    Args:
      values, indices: Of this shard, as `on_device` gives them.
      k: How many to keep.
      cut: How the mesh cuts the latents.
      n_local: Latents of this shard.
    """
    if cut.latents is None:
        return values, indices
    indices = indices + cut.first_latent(n_local)
    # Candidates lie in the order of shards, and by index among equals of one shard: ties stay right.
    values = lax.all_gather(values, cut.latents, axis=1, tiled=True)
    indices = lax.all_gather(indices, cut.latents, axis=1, tiled=True)
    in_order = functools.partial(_barrier_top_k, k=k)
    values, best = lax.platform_dependent(values, cuda=functools.partial(_selected, k=k), default=in_order)
    return values, jnp.take_along_axis(indices, best, axis=1)


def on_device(a: Float[Array, "b n"], k: int) -> tuple[Float[Array, "b k"], Int[Array, "b k"]]:
    """Returns the k largest entries of each row and their indices, as `top_k`, on one device."""
    grouped = a.shape[1] % _GROUP == 0 and a.shape[1] >= 4 * _GROUP * k
    cpu = functools.partial(_by_groups if grouped else _side_by_side, k=k)
    cuda, default = functools.partial(_selected, k=k), functools.partial(_barrier_top_k, k=k)
    return lax.platform_dependent(a, cpu=cpu, cuda=cuda, default=default)


def compiler_options(platform: str) -> dict[str, Any]:
    """Returns XLA's options under which a GPU selects with RAFT (`__gpu$TopK`) instead of sorting whole rows.

    Later XLA selects where the operation asks for no order among equals (`_any_order`); the option is gone then.
    """
    asks = platform in ("gpu", "cuda") and not _UNSTABLE and jaxlib.version.__version_info__ < (0, 11)
    return {"xla_gpu_experimental_use_raft_select_k": True} if asks else {}


def _selected(a: Float[Array, "b n"], k: int) -> tuple[Float[Array, "b k"], Int[Array, "b k"]]:
    """Top-k from a selection that keeps no order among equals, as GPUs make it.

    The k + 1 best are put in order. Where the last two are equal, equals were left out, and the row's equals of lowest
    index are looked up. Indices are exact in float32 keys up to 2^24 columns; wider rows take XLA's sort.
    """
    n = a.shape[1]
    if n > 2**24:
        return _barrier_top_k(a, k)
    values, indices = _in_order(*_any_order(a, min(k + 1, n)))
    if k == n:
        return values, indices
    tied = jnp.any(values[:, k - 1] == values[:, k])
    best = values[:, :k], indices[:, :k]
    return lax.cond(tied, lambda: _with_first_equals(a, *best), lambda: best)


def _in_order(values: Float[Array, "b k"], indices: Int[Array, "b k"]) -> tuple[Float[Array, "b k"], Int[Array, "b k"]]:
    """Returns pairs in descending order of values, equals by index."""
    values, indices = lax.sort((-values, indices), dimension=1, num_keys=2)
    return -values, indices


def _with_first_equals(
    a: Float[Array, "b n"], values: Float[Array, "b k"], indices: Int[Array, "b k"]
) -> tuple[Float[Array, "b k"], Int[Array, "b k"]]:
    """Returns the k best of rows whose last value is right; of its equals those of lowest index."""
    k, last = values.shape[1], values[:, -1:]
    columns = lax.broadcasted_iota(jnp.float32, a.shape, 1)
    keys, equals = _any_order(jnp.where(a == last, -columns, -jnp.inf), k)
    _, equals = _in_order(keys, equals)
    n_above = jnp.sum(values > last, axis=1, keepdims=True)
    slot = lax.broadcasted_iota(jnp.int32, values.shape, 1)
    nth = jnp.take_along_axis(equals, jnp.maximum(slot - n_above, 0), axis=1)
    return values, jnp.where(slot < n_above, indices, nth)


def _by_groups(a: Float[Array, "b n"], k: int) -> tuple[Float[Array, "b k"], Int[Array, "b k"]]:
    """Top-k among the k groups of neighbours with the largest maxima.

    Exact: a group that is left out has k groups before it, each with an entry that beats all of its own
    (larger, or equal at a lower index). The maxima use all cores.
    """
    groups = a.reshape(len(a), -1, _GROUP)  # one array for both forms, or XLA makes one for each
    exact, *best = _among_unequal(groups, k)
    return lax.cond(exact, lambda: tuple(best), lambda: _among_equal(groups, k))


def _among_unequal(
    groups: Float[Array, "b n_groups size"], k: int
) -> tuple[Bool[Array, ""], Float[Array, "b k"], Int[Array, "b k"]]:
    """Whether ties had no say, and if so the top-k.

    XLA's `top_k` keeps a heap. The maxima enter it first, in order, so hardly any other entry does. This halves the
    time for a row in index order.
    """
    b, _, size = groups.shape
    maxima, chosen = _side_by_side(jnp.max(groups, axis=2), k + 1)
    left_out, maxima, chosen = maxima[:, k], maxima[:, :k], chosen[:, :k]
    members = jnp.take_along_axis(groups, chosen[:, :, None], axis=1, mode="clip")
    is_max = members == maxima[:, :, None]
    at = jnp.sum(jnp.where(is_max, lax.broadcasted_iota(jnp.int32, members.shape, 2), 0), axis=2)
    others = jnp.where(is_max, -jnp.inf, members).reshape(b, k * size)
    values, best = _side_by_side(jnp.concatenate([maxima, others], axis=1), k + 1)

    one_maximum = jnp.all(jnp.sum(is_max, axis=2) == 1)
    no_other = jnp.all(values[:, k - 1] > jnp.maximum(values[:, k], left_out))
    values, best = values[:, :k], best[:, :k]
    slot = jnp.where(best < k, best, (best - k) // size)
    member = jnp.where(best < k, jnp.take_along_axis(at, slot, axis=1), (best - k) % size)
    no_three, indices = _pairs_by_index(values, jnp.take_along_axis(chosen, slot, axis=1) * size + member)
    return one_maximum & no_other & no_three, values, indices


def _pairs_by_index(
    values: Float[Array, "b k"], indices: Int[Array, "b k"]
) -> tuple[Bool[Array, ""], Int[Array, "b k"]]:
    """Whether no three neighbours are equal, and the indices with those of equal pairs in order."""
    same = values[:, 1:] == values[:, :-1]
    as_next, as_last = jnp.pad(same, ((0, 0), (0, 1))), jnp.pad(same, ((0, 0), (1, 0)))
    other = jnp.where(as_next, jnp.roll(indices, -1, axis=1), jnp.where(as_last, jnp.roll(indices, 1, axis=1), indices))
    ordered = jnp.where(as_next, jnp.minimum(indices, other), jnp.maximum(indices, other))
    return ~jnp.any(as_next & as_last), ordered


def _among_equal(groups: Float[Array, "b n_groups size"], k: int) -> tuple[Float[Array, "b k"], Int[Array, "b k"]]:
    """The top-k whatever is equal."""
    b, _, size = groups.shape
    _, chosen = _barrier_top_k(jnp.max(groups, axis=2), k)
    chosen = jnp.sort(chosen, axis=1)  # back in the order of the indices, so that ties stay right
    candidates = jnp.take_along_axis(groups, chosen[:, :, None], axis=1).reshape(b, k * size)
    values, best = _barrier_top_k(candidates, k)
    return values, jnp.take_along_axis(chosen, best // size, axis=1) * size + best % size


def _side_by_side(a: Float[Array, "b n"], k: int) -> tuple[Float[Array, "b k"], Int[Array, "b k"]]:
    """`_barrier_top_k` in many small calls: XLA's CPU runtime runs one call on one core, but hands calls to all."""
    cuts = [len(a) * part // _CALLS for part in range(1, _CALLS)] if len(a) >= _CALLS * _ROWS else []
    values, indices = zip(*(_barrier_top_k(part, k) for part in jnp.split(a, cuts)), strict=True)
    return jnp.concatenate(values), jnp.concatenate(indices)


def _any_order(a: Float[Array, "b n"], k: int) -> tuple[Float[Array, "b k"], Int[Array, "b k"]]:
    """`_barrier_top_k` that promises no order among equals."""
    values, indices = lax.top_k(a, k, **_UNSTABLE)
    return lax.optimization_barrier(values), lax.optimization_barrier(indices)


def _barrier_top_k(a: Float[Array, "b n"], k: int) -> tuple[Float[Array, "b k"], Int[Array, "b k"]]:
    """`lax.top_k` that XLA cannot rewrite: a slice of its result would turn it into a full sort."""
    values, indices = lax.top_k(a, k)
    # One barrier each: around the pair, XLA (jaxlib 0.10.2) aborts when it compiles for several CPU devices.
    return lax.optimization_barrier(values), lax.optimization_barrier(indices)
