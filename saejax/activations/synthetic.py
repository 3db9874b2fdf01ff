"""Synthetic activations with known features: sparse sums of feature directions plus noise.

A source for tests, first runs and benchmarks of dictionary recovery. Row x = sum_i z_i f_i + noise, where the f_i are
unit vectors and z is sparse and non-negative. Each block depends on (seed, lane, block number) alone. So the stream
needs no files, has no end, and its position is one integer.
"""

import dataclasses
import enum
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float, Int

from saejax.activations.loader import PREFETCH_RECORDS, Stream, digest
from saejax.activations.source import ActivationSource, check_lanes, register
from saejax.errors import UserError
from saejax.fields import numeric
from saejax.fields.resume_policy import Fixed

_TRAIN, _HELDOUT = 0, 1
"""First word of every block's seed: training and held-out rows never share a random stream."""

_HELDOUT_BLOCK = 1024
"""Rows per generated held-out block, fixed so that the rows do not depend on the caller's batch."""


class Kind(enum.Enum):
    """Joint distribution of the features' firing."""

    iid = "iid"
    hierarchical = "hierarchical"


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Synthetic(ActivationSource):
    """Sparse linear data with a known dictionary; the defaults are the benchmark SB-iid.

    * `iid`: every feature fires independently with probability `firing_rate`.
    * `hierarchical` (SB-hier): features form `n_groups` groups of one parent and its children. A parent fires
      with probability `parent_rate`; given that, with probability `child_rate` exactly one of its children,
      drawn uniformly, fires with it. Children never fire without their parent.

    Amplitudes are uniform on [amplitude_low, amplitude_high], noise is Gaussian. With several `sites` one sparse code
    is seen through as many dictionaries, independent of each other, and a row holds the sites side by side.
    """

    name: ClassVar[str] = "synthetic"

    d_in: Fixed[int] = 64  # pyright: ignore[reportIncompatibleVariableOverride]
    """Width of a row (dimensions, >= 1); with several sites their sum, whatever is given here."""
    sites: Fixed[tuple[int, ...]] = ()
    """Widths of the parts of a row, in order (dimensions, each >= 1); fewer than two are one part of width d_in."""
    n_features: Fixed[int] = 256
    """Number of true features (>= 1); more than d_in puts them in superposition."""
    kind: Fixed[Kind] = Kind.iid
    """How features fire together: iid or hierarchical."""
    firing_rate: Fixed[float] = 4 / 256
    """Probability that a feature fires in a row, for kind=iid (in (0, 1))."""
    n_groups: Fixed[int] = 32
    """Number of parents, for kind=hierarchical; must divide n_features into groups of at least 2."""
    parent_rate: Fixed[float] = 0.06
    """Probability that a parent fires in a row, for kind=hierarchical (in (0, 1))."""
    child_rate: Fixed[float] = 0.7
    """Probability that one child fires with its firing parent, for kind=hierarchical (in [0, 1])."""
    amplitude_low: Fixed[float] = 0.5
    """Smallest amplitude of a firing feature (>= 0)."""
    amplitude_high: Fixed[float] = 1.5
    """Largest amplitude of a firing feature (>= amplitude_low)."""
    noise: Fixed[float] = 0.01
    """Standard deviation of the Gaussian noise per dimension (>= 0)."""
    feature_seed: Fixed[int] = 0
    """Seed of the true dictionary and of the held-out rows (>= 0); training rows have the run's seed."""
    heldout_rows: Fixed[int] = 20_000
    """Number of held-out rows (>= 1)."""

    def __post_init__(self):
        numeric.check(self, "source.")
        if any(width < 1 for width in self.sites):
            raise UserError(f"source.sites = {list(self.sites)}: at least 1 is needed for each")
        if len(self.sites) > 1:
            object.__setattr__(self, "d_in", sum(self.sites))
        object.__setattr__(self, "sites", tuple(self.sites) if len(self.sites) > 1 else (self.d_in,))
        for field in ("d_in", "n_features", "heldout_rows"):
            if getattr(self, field) < 1:
                raise UserError(f"source.{field} = {getattr(self, field)}: at least 1 is needed")
        for field in ("firing_rate", "parent_rate"):
            if not 0 < getattr(self, field) < 1:
                raise UserError(f"source.{field} = {getattr(self, field)}: a probability inside (0, 1) is needed")
        if not 0 <= self.child_rate <= 1:
            raise UserError(f"source.child_rate = {self.child_rate}: a probability in [0, 1] is needed")
        if not 0 <= self.amplitude_low <= self.amplitude_high:
            raise UserError(
                f"source.amplitude_low = {self.amplitude_low}, amplitude_high = {self.amplitude_high}: "
                "0 <= low <= high is needed"
            )
        if self.noise < 0 or self.feature_seed < 0:
            raise UserError(f"source.noise = {self.noise}, feature_seed = {self.feature_seed}: neither may be negative")
        if self.kind is Kind.hierarchical and (
            self.n_groups < 1 or self.n_features % self.n_groups or self.n_features < 2 * self.n_groups
        ):
            raise UserError(
                f"source.n_groups = {self.n_groups}: it must divide n_features = {self.n_features} "
                "into groups of at least 2"
            )

    @property
    def site_widths(self) -> tuple[int, ...]:
        """`sites`, which are one of width d_in where fewer than two were given."""
        return self.sites

    def features(self) -> Float[np.ndarray, "n_features d_in"]:
        """The true dictionary: unit rows in random directions, float32, fixed by `feature_seed`.

        Several sites have one such dictionary each, side by side; the first is that of a source with this site alone.
        """
        parts = []
        for number, width in enumerate(self.sites):
            rng = np.random.default_rng([self.feature_seed, number] if number else self.feature_seed)
            columns = rng.standard_normal((width, self.n_features))
            parts.append((columns / np.linalg.norm(columns, axis=0)).T.astype(np.float32))
        return np.ascontiguousarray(np.concatenate(parts, axis=1))

    def parents(self) -> Int[np.ndarray, "n_features"]:
        """Parent of every feature, -1 where it has none; parents come first, then children by group."""
        parents = np.full(self.n_features, -1)
        if self.kind is Kind.hierarchical:
            n_children = self.n_features // self.n_groups - 1
            parents[self.n_groups :] = np.repeat(np.arange(self.n_groups), n_children)
        return parents

    def firing_rates(self) -> Float[np.ndarray, "n_features"]:
        """Probability that each feature fires in a row."""
        if self.kind is Kind.iid:
            return np.full(self.n_features, self.firing_rate)
        n_children = self.n_features // self.n_groups - 1
        child = self.parent_rate * self.child_rate / n_children
        return np.where(self.parents() < 0, self.parent_rate, child)

    def fingerprint(self) -> dict[str, Any]:
        """The identity: there is nothing else to know."""
        return self.identity()

    def identity(self) -> dict[str, Any]:
        """The config itself: with the run's seed it determines every row. One site goes without saying."""
        facts = {"type": self.name, **dataclasses.asdict(self), "kind": self.kind.value, "sites": list(self.sites)}
        return {key: value for key, value in facts.items() if key != "sites" or len(self.sites) > 1}

    def open(
        self, *, n_lanes: int, block_rows: int, lanes: range, seed: int, prefetch: int = PREFETCH_RECORDS
    ) -> Stream:
        """Endless float32 stream; block t of lane l is the same for any split over processes."""
        check_lanes(n_lanes=n_lanes, block_rows=block_rows, lanes=lanes)
        features = self.features()

        def make(step: int) -> np.ndarray:
            record = np.empty((len(lanes), block_rows, self.d_in), np.float32)
            for slot, lane in enumerate(lanes):
                rng = _block_rng(seed, _TRAIN, lane, step)
                self._fill(record[slot], _draw_codes(self, rng, block_rows), features, rng)
            return record

        drawn = {key: value for key, value in self.fingerprint().items() if key != "heldout_rows"}
        facts = {"rows": None, "lanes": n_lanes, "block_rows": block_rows, "seed": seed, "data": digest(drawn)}
        return Stream(make, identity=facts, n_rows=None, prefetch=prefetch)

    def heldout(self, batch: int, max_rows: int | None = None) -> Iterator[np.ndarray]:
        """Yield `heldout_rows` rows (at most `max_rows`) of a random stream of their own."""
        for rows, _ in self.heldout_with_codes(batch, max_rows):
            yield rows

    def heldout_with_codes(
        self, batch: int, max_rows: int | None = None
    ) -> Iterator[tuple[Float[np.ndarray, "b d_in"], Float[np.ndarray, "b n_features"]]]:
        """Yield the held-out rows together with the true codes z that made them."""
        total = self.heldout_rows if max_rows is None else min(max_rows, self.heldout_rows)
        features = self.features()
        pending: list[tuple[np.ndarray, np.ndarray]] = []
        made = 0
        for start in range(0, total, batch):
            stop = min(start + batch, total)
            while made < stop:
                pending.append(self._heldout_block(made // _HELDOUT_BLOCK, features))
                made += _HELDOUT_BLOCK
            rows, codes = (np.concatenate(parts) for parts in zip(*pending, strict=True))
            yield rows[: stop - start], codes[: stop - start]
            pending = [(rows[stop - start :], codes[stop - start :])]

    def _heldout_block(self, block: int, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rng = _block_rng(self.feature_seed, _HELDOUT, 0, block)
        codes = _draw_codes(self, rng, _HELDOUT_BLOCK)
        rows = np.empty((_HELDOUT_BLOCK, self.d_in), np.float32)
        self._fill(rows, codes, features, rng)
        return rows, codes.toarray()

    def _fill(self, rows: np.ndarray, codes, features: np.ndarray, rng: np.random.Generator) -> None:
        """rows <- codes @ features + noise, in place."""
        rng.standard_normal(out=rows, dtype=np.float32)
        rows *= np.float32(self.noise)
        rows += codes @ features


def _block_rng(seed: int, purpose: int, lane: int, block: int) -> np.random.Generator:
    """The random stream of one block: a function of these four numbers and of nothing else."""
    sequence = np.random.SeedSequence(entropy=seed, spawn_key=(purpose, lane, block))
    return np.random.Generator(np.random.SFC64(sequence))


def _draw_codes(source: Synthetic, rng: np.random.Generator, n: int):
    """Draw the true codes of `n` rows as a SciPy sparse matrix [n, n_features], float32."""
    import scipy.sparse  # 0.3 s to import: only where rows are made

    if source.kind is Kind.iid:
        rows, features = _bernoulli(rng, n, source.n_features, source.firing_rate)
    else:
        rows, features = _parents_and_children(source, rng, n)
    amplitudes = rng.uniform(source.amplitude_low, source.amplitude_high, len(rows)).astype(np.float32)
    starts = np.searchsorted(rows, np.arange(n + 1))
    return scipy.sparse.csr_array((amplitudes, features, starts), shape=(n, source.n_features))


def _bernoulli(
    rng: np.random.Generator, n: int, width: int, rate: float
) -> tuple[Int[np.ndarray, "events"], Int[np.ndarray, "events"]]:
    """Cells of an [n, width] grid where independent coins of probability `rate` show heads, in row order.

    The gaps between heads are geometric, so the work is proportional to the heads, not to the grid.
    """
    cells = n * width
    expected = cells * rate
    at = np.cumsum(rng.geometric(rate, int(expected + 6 * np.sqrt(expected) + 16))) - 1
    while at[-1] < cells:
        at = np.concatenate([at, at[-1] + np.cumsum(rng.geometric(rate, 1024))])
    return np.divmod(at[at < cells], width)


def _parents_and_children(
    source: Synthetic, rng: np.random.Generator, n: int
) -> tuple[Int[np.ndarray, "events"], Int[np.ndarray, "events"]]:
    """(row, feature) of every firing feature of the hierarchical kind, in row order."""
    rows, parents = _bernoulli(rng, n, source.n_groups, source.parent_rate)
    n_children = source.n_features // source.n_groups - 1
    child = rng.integers(n_children, size=len(rows)) + source.n_groups + n_children * parents
    has_child = rng.random(len(rows)) < source.child_rate
    pairs = np.stack([parents, np.where(has_child, child, -1)], axis=1).ravel()
    fires = pairs >= 0
    return np.repeat(rows, 2)[fires], pairs[fires]
