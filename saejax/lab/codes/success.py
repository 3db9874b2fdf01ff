"""Success curves: how often a decoder recovers the exact set, over the dimension.

Two numbers per trial judge a one-step decoder: the weakest active score and the strongest inactive score. Blocks of an
implicit dictionary stream past, so n_atoms = 2^20 needs memory for one block only. Other decoders run on whole
dictionaries of moderate size. Trials are split over the mesh axis "data".

The random rows are nested: a code in fewer dimensions is a prefix of the same rows. So one pass measures a whole
curve, and the curve is smoother than the certainty of its points.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Key
from scipy.optimize import isotonic_regression

from saejax.errors import UserError
from saejax.lab.codes import decoders, subsets
from saejax.lab.codes.arguments import check_indexable, check_probability, check_seed, check_sizes
from saejax.lab.codes.dictionaries import signs

DATA = "data"
"""Mesh axis over which trials are split."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
    """Measured success over the dimension, for one decoder and one (n_atoms, k)."""

    dims: np.ndarray
    """Dimensions, ascending."""
    successes: np.ndarray
    """Successful trials at each dimension."""
    trials: int
    """Trials at each dimension."""
    unconverged: np.ndarray | None = None
    """Trials at each dimension on which the solver ran out of iterations; None where nothing was solved."""

    @property
    def probability(self) -> np.ndarray:
        """Share of successful trials."""
        return self.successes / self.trials

    @property
    def standard_error(self) -> np.ndarray:
        """Binomial standard error of `probability`; trials share dictionaries, so it is a little too small."""
        p = self.probability
        return np.sqrt(p * (1 - p) / self.trials)

    def dims_at(self, probability: float) -> float:
        """Dimensions at which the rising (isotonic) fit of the curve reaches a probability.

        Args:
          probability: in (0, 1).

        Returns:
          Dimensions, linear between measured ones; NaN where the curve does not span the probability.

        Raises:
          UserError: probability out of range.

        Examples:
          >>> Curve(dims=np.array([10, 20, 30]), successes=np.array([0, 4, 10]), trials=10).dims_at(0.7)
          25.0
        """
        check_probability(probability=probability)
        fitted = isotonic_regression(self.probability).x
        above = int(np.searchsorted(fitted, probability))
        if above == len(fitted) or (above == 0 and fitted[0] > probability):
            return float("nan")
        if fitted[above] == probability:
            return float(self.dims[above])
        share = (probability - fitted[above - 1]) / (fitted[above] - fitted[above - 1])
        return float(self.dims[above - 1] + share * (self.dims[above] - self.dims[above - 1]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Margins:
    """Scores that decide one-step decoding: two per dimension and trial."""

    dims: np.ndarray
    """Dimensions, ascending, [n_dims]."""
    weakest_active: np.ndarray
    """Smallest score of an active atom, [n_dims, trials]."""
    strongest_inactive: np.ndarray
    """Largest score of an inactive atom, [n_dims, trials]."""

    def top_k(self) -> Curve:
        """Success of taking the k largest scores; a tie across the border counts as failure."""
        return self._curve(self.weakest_active > self.strongest_inactive)

    def threshold(self, value: float | Callable[[int], float]) -> Curve:
        """Success of taking all scores above a threshold.

        Args:
          value: the threshold, or a function from the dimension to it.

        Returns:
          The curve; nowhere above that of `top_k`, since a threshold that succeeds separates the scores.
        """
        at = np.array([value(int(d)) if callable(value) else value for d in self.dims])[:, None]
        return self._curve((self.weakest_active > at) & (self.strongest_inactive <= at))

    def _curve(self, success: np.ndarray) -> Curve:
        return Curve(dims=self.dims, successes=success.sum(axis=1), trials=success.shape[1])


def one_step(
    n_atoms: int,
    k: int,
    dims: Sequence[int],
    *,
    n_dictionaries: int = 4,
    n_supports: int = 100,
    seed: int = 0,
    block: int = 1024,
    mesh: Mesh | None = None,
) -> Margins:
    """Measure the scores that decide every one-step decoder, over several Rademacher dictionaries.

    Signals and scores are sums of signs, whole numbers below k d, exact in float32 while that is below 2^24: blocks
    and devices cannot change them. Memory is `one_step_bytes`; time is 2 n_atoms max(dims) operations per trial.

    Args:
      n_atoms: number of atoms.
      k: active atoms.
      dims: dimensions to measure.
      n_dictionaries: independent dictionaries.
      n_supports: random k-subsets per dictionary; trials are n_dictionaries x n_supports.
      seed: of dictionaries and subsets.
      block: atoms scored at once.
      mesh: splits the supports over its axis "data"; None uses one device.

    Returns:
      Margins over all trials.

    Raises:
      UserError: a size out of range, k >= n_atoms, or k max(dims) beyond 2^24.
    """
    grid = _checked_dims(n_atoms, k, dims)
    check_indexable(n_atoms=n_atoms, n_dictionaries=n_dictionaries, n_supports=n_supports, block=block)
    check_seed(seed=seed)
    if k * grid[-1] >= 2**24:
        raise UserError(f"dims = {grid[-1]}: k x dims = {k * grid[-1]} must stay below 2^24 for exact float32 sums")
    measure = _one_step_program(n_atoms, k, tuple(grid), min(block, n_atoms), mesh)
    parts = []
    for dictionary in range(n_dictionaries):
        key = jax.random.fold_in(jax.random.key(seed), dictionary)
        keys, rows = _split(subsets.row_keys(jax.random.fold_in(key, 1), n_supports), mesh)
        parts.append([np.asarray(part)[:, :rows] for part in measure(jax.random.fold_in(key, 0), keys)])
    weakest, strongest = (np.concatenate(side, axis=1) / np.array(grid)[:, None] for side in zip(*parts, strict=True))
    return Margins(dims=np.array(grid), weakest_active=weakest, strongest_inactive=strongest)


def one_step_bytes(n_atoms: int, d: int, *, n_supports: int, n_dims: int = 1, block: int = 1024) -> int:
    """Memory that `one_step` needs on a device: one block of rows twice, the signals and the scores of a block.

    Args:
      n_atoms: number of atoms; enters only through min(block, n_atoms).
      d: largest dimension.
      n_supports: trials on the device.
      n_dims: dimensions measured together.
      block: atoms scored at once.

    Returns:
      Bytes.

    Examples:
      >>> one_step_bytes(2**20, 18_000, n_supports=100) < 2**28
      True
    """
    rows = min(block, n_atoms)
    return 4 * (2 * rows * d + 3 * n_supports * d + (3 * rows + 2 * n_dims) * n_supports)


def curve(
    decoder: decoders.Decoder | str,
    n_atoms: int,
    k: int,
    dims: Sequence[int],
    *,
    n_dictionaries: int = 1,
    n_supports: int = 100,
    seed: int = 0,
    mesh: Mesh | None = None,
) -> Curve:
    """Success of any decoder on whole Rademacher dictionaries of moderate size.

    The same dictionaries and subsets as `one_step` draws for the same seed. Scores are rounded floats here, so a
    score that equals a threshold exactly may fall on either side; `one_step` counts it as off.

    Args:
      decoder: see `decoders.decode`.
      n_atoms: number of atoms; n_atoms x max(dims) numbers are held.
      k: active atoms.
      dims: dimensions to measure; each shape is compiled once.
      n_dictionaries: independent dictionaries.
      n_supports: random k-subsets per dictionary.
      seed: of dictionaries and subsets.
      mesh: splits the supports over its axis "data"; None uses one device.

    Returns:
      The curve over n_dictionaries x n_supports trials.

    Raises:
      UserError: a size out of range or an unknown decoder.
    """
    grid = _checked_dims(n_atoms, k, dims)
    check_indexable(n_atoms=n_atoms, n_dictionaries=n_dictionaries, n_supports=n_supports)
    check_seed(seed=seed)
    successes, unconverged = np.zeros(len(grid), int), np.zeros(len(grid), int)
    for number in range(n_dictionaries):
        key = jax.random.fold_in(jax.random.key(seed), number)
        keys, rows = _split(subsets.row_keys(jax.random.fold_in(key, 1), n_supports), mesh)
        whole = signs(jax.random.fold_in(key, 0), jnp.arange(n_atoms), grid[-1])
        chosen = subsets.of_keys(keys, n_atoms, k)
        for place, d in enumerate(grid):
            dictionary = _replicate(_cut(whole, d), mesh)
            counts, converged = decoders.attempt(signals(dictionary, chosen), dictionary, k, decoder)
            successes[place] += int(_found(counts, chosen)[:rows].sum())
            unconverged[place] += int((~converged)[:rows].sum())
    trials = n_dictionaries * n_supports
    return Curve(dims=np.array(grid), successes=successes, trials=trials, unconverged=unconverged)


def recovered(
    decoder: decoders.Decoder | str, dictionary: Float[Array, "n_atoms d"], chosen: Array
) -> Bool[Array, "b"]:
    """Whether a decoder finds each subset again from the sum of its atoms.

    Args:
      decoder: see `decoders.decode`.
      dictionary: unit rows of any ensemble.
      chosen: subsets, int32 [b, k].

    Returns:
      True where the counts equal the 0/1 code.
    """
    counts = decoders.decode(signals(dictionary, chosen), dictionary, chosen.shape[1], decoder)
    return _found(counts, chosen)


@jax.jit
def signals(dictionary: Float[Array, "n_atoms d"], chosen: Int[Array, "b k"]) -> Float[Array, "b d"]:
    """Sum of the atoms of every subset."""
    return jnp.sum(dictionary[chosen], axis=1)


@jax.jit
def _found(counts: Int[Array, "b n_atoms"], chosen: Int[Array, "b k"]) -> Bool[Array, "b"]:
    return decoders.exact(counts, subsets.indicator(chosen, counts.shape[1]))


@partial(jax.jit, static_argnames=("d",))
def _cut(rows: Float[Array, "n_atoms longest"], d: int) -> Float[Array, "n_atoms d"]:
    """Unit rows from the first d signs."""
    return rows[:, :d] / np.sqrt(d, dtype=np.float32)


def _checked_dims(n_atoms: int, k: int, dims: Sequence[int]) -> list[int]:
    check_sizes(n_atoms=n_atoms, k=k, n_dims=len(dims))
    for d in dims:
        check_sizes(dims=d)
    if k == n_atoms:
        raise UserError(f"k = {k}: below n_atoms = {n_atoms} is needed, else nothing distinguishes the codes")
    return sorted({int(d) for d in dims})


def _split(keys: Key[Array, "b"], mesh: Mesh | None) -> tuple[Key[Array, "b"], int]:
    """Keys over the mesh, repeated up to a multiple of its axis, and how many of them are real."""
    n = len(keys)
    if mesh is None:
        return keys, n
    if DATA not in mesh.shape:
        raise UserError(f"mesh = {tuple(mesh.shape)}: an axis named '{DATA}' is needed")
    padded = keys[np.arange(-(-n // mesh.shape[DATA]) * mesh.shape[DATA]) % n]
    return jax.device_put(padded, NamedSharding(mesh, P(DATA))), n


def _replicate(array: Array, mesh: Mesh | None) -> Array:
    return array if mesh is None else jax.device_put(array, NamedSharding(mesh, P()))


def _one_step_program(n_atoms: int, k: int, dims: tuple[int, ...], block: int, mesh: Mesh | None) -> Callable:
    """(key of the dictionary, keys of the supports) -> (weakest active, strongest inactive), [n_dims, b] each."""
    local = partial(_margins, n_atoms=n_atoms, k=k, dims=dims, block=block)
    if mesh is None:
        return jax.jit(local)
    split = jax.shard_map(
        local, mesh=mesh, in_specs=(P(), P(DATA)), out_specs=(P(None, DATA), P(None, DATA)), check_vma=False
    )
    return jax.jit(split)


def _margins(
    key: Key[Array, ""], keys: Key[Array, "b"], *, n_atoms: int, k: int, dims: tuple[int, ...], block: int
) -> tuple[Float[Array, "n_dims b"], Float[Array, "n_dims b"]]:
    """The two deciding scores times d, by one pass over the atoms."""
    chosen = subsets.of_keys(keys, n_atoms, k)
    b, d = len(keys), dims[-1]
    segments = list(zip((0, *dims[:-1]), dims, strict=True))

    def nested(score: Callable[[slice], jax.Array]) -> jax.Array:
        """Scores at every dimension, [n_dims, ...], as running sums over the segments between them."""
        return jnp.cumsum(jnp.stack([score(slice(*ends)) for ends in segments]), axis=0)

    sums = jax.lax.fori_loop(0, k, lambda j, total: total + signs(key, chosen[:, j], d), jnp.zeros((b, d), jnp.float32))

    def active(j: jax.Array, weakest: jax.Array) -> jax.Array:
        product = signs(key, chosen[:, j], d) * sums
        return jnp.minimum(weakest, nested(lambda at: product[:, at].sum(axis=1)))

    def inactive(start: jax.Array, strongest: jax.Array) -> jax.Array:
        # The last block reaches back over rows already seen: a maximum does not mind.
        first = jnp.minimum(start * block, n_atoms - block)
        rows = signs(key, first + jnp.arange(block), d)
        outside = jnp.where((chosen >= first) & (chosen < first + block), chosen - first, block)
        mask = jnp.zeros((b, block), jnp.float32).at[jnp.arange(b)[:, None], outside].set(-jnp.inf, mode="drop")
        total, best = mask, []
        for ends in segments:
            at = slice(*ends)
            total = total + jnp.matmul(sums[:, at], rows[:, at].T, precision=jax.lax.Precision.HIGHEST)
            best.append(total.max(axis=1))
        return jnp.maximum(strongest, jnp.stack(best))

    weakest = jax.lax.fori_loop(0, k, active, jnp.full((len(dims), b), jnp.inf))
    strongest = jax.lax.fori_loop(0, -(-n_atoms // block), inactive, jnp.full((len(dims), b), -jnp.inf))
    return weakest, strongest
