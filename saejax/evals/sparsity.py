"""Sparsity metrics: L0 and its quantiles, firing rates, density histogram, dead and dense shares, L1.

Dead shares in windows need more than counts. For each latent the state keeps its silent run at the start, the one at
the end, and the number of silent windows between them. Two states merge by joining the end of one to the start of the
other. This is exact for any cut of the stream: all `rows - w + 1` windows count, not one in w.
"""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Int

from saejax.errors import UserError
from saejax.evals import metric
from saejax.sae import base

LOG10_DENSITY_EDGES = np.linspace(-9.0, 0.0, 91)
"""Bins of the density histogram, in decades of the firing rate."""


@struct.dataclass
class FiringState:
    """Counts over rows, integers.

    Attributes:
      rows: Number of rows, scalar.
      count: Rows on which each latent fired, [d_sae].
      lead: Rows before its first firing, [d_sae]; all rows where it never fired.
      trail: Rows after its last firing, [d_sae]; all rows where it never fired.
      silent: Windows without a firing that lie between two firings, [n_windows, d_sae].
    """

    rows: jax.Array
    count: jax.Array
    lead: jax.Array
    trail: jax.Array
    silent: jax.Array


@metric.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Firing(metric.Metric):
    """Everything that follows from which latents fire on which rows."""

    name: ClassVar[str] = "firing"

    windows: tuple[int, ...] = (100_000, 1_000_000, 10_000_000)
    """Lengths, in tokens, of the windows in which a silent latent counts as dead; each at least 2."""
    dense_above: float = 0.1
    """Firing rate above which a latent counts as dense, in (0, 1)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(w < 2 for w in self.windows):
            raise UserError(f"eval.windows must all be at least 2 tokens, got {self.windows}")
        if not 0 < self.dense_above < 1:
            raise UserError(f"eval.dense_above must lie between 0 and 1, got {self.dense_above}")

    def init(self, batch: metric.EvalBatch) -> FiringState:
        zeros = jnp.zeros(batch.encoding.d_sae, jnp.int32)
        silent = jnp.zeros((len(self.windows), batch.encoding.d_sae), jnp.int32)
        return FiringState(rows=jnp.zeros((), jnp.int32), count=zeros, lead=zeros, trail=zeros, silent=silent)

    def update(self, state: FiringState, batch: metric.EvalBatch) -> FiringState:
        # Inside a piece no longer than the shortest window, no window fits between two firings. Pieces are masks, not
        # slices: XLA partitions a scatter wrongly where its rows do not divide over the devices.
        place = jnp.arange(batch.weight.shape[0])
        length = min(self.windows, default=len(place))

        def add_piece(piece: Int[Array, ""], state: FiringState) -> FiringState:
            return self.merge(state, self._observe(batch.encoding, (batch.weight > 0) & (place // length == piece)))

        return jax.lax.fori_loop(0, -(-len(place) // length), add_piece, state)

    def merge(self, a: FiringState, b: FiringState) -> FiringState:
        a_never, b_never = a.lead == a.rows, b.trail == b.rows
        gap = (a.trail + b.lead)[None, :] * ~(a_never | b_never)[None, :]
        return FiringState(
            rows=a.rows + b.rows,
            count=a.count + b.count,
            lead=a.lead + a_never * b.lead,
            trail=b.trail + b_never * a.trail,
            silent=a.silent + b.silent + self._windows_in(gap),
        )

    def compute(self, state: FiringState) -> dict[str, float | np.ndarray]:
        rows, count = int(state.rows), np.asarray(state.count)
        rate = count / max(rows, 1)
        hist, edges = np.histogram(np.log10(rate[count > 0]).clip(-9.0, 0.0), bins=LOG10_DENSITY_EDGES)
        never = count == 0
        silent = (
            np.asarray(state.silent)
            + self._windows_in(np.asarray(state.lead)[None, :])
            + self._windows_in(np.asarray(state.trail * ~never)[None, :])
        )
        dead = {
            _dead_key(w): metric.ratio(silent[i].sum(), count.size * (rows - w + 1))
            for i, w in enumerate(self.windows)
            if rows >= w
        }
        return {
            "l0": metric.ratio(count.sum(), rows),
            "dead_share": float(never.mean()),
            "dense_share": float((rate > self.dense_above).mean()),
            "dense_share_1pct": float((rate > 0.01).mean()),
            **dead,
            "firing_rate": rate,
            "log10_density_hist": hist,
            "log10_density_edges": edges,
        }

    def definitions(self) -> dict[str, str]:
        windows = {
            _dead_key(w): f"Share of latents that fire on none of {w:,} consecutive rows, averaged over every such "
            "window of the evaluated rows; absent when there are fewer rows."
            for w in self.windows
        }
        return {
            "l0": "Mean over rows of the number of latents that fire: are not zero.",
            "dead_share": "Share of latents that fire on none of the evaluated rows.",
            "dense_share": f"Share of latents that fire on more than {self.dense_above:.0%} of the evaluated rows.",
            "dense_share_1pct": "Share of latents that fire on more than 1% of the evaluated rows.",
            **windows,
            "firing_rate": "For each latent, the share of evaluated rows on which it is not zero.",
            "log10_density_hist": "Number of latents by log10 of their firing rate; latents that never fire are left "
            "out, rates below the first edge are in the first bin.",
            "log10_density_edges": "Edges of the bins of log10_density_hist.",
        }

    def _observe(self, encoding: base.Encoding, real: Bool[Array, "b"]) -> FiringState:
        """The state of some rows of a batch; the others, padding among them, take no place."""
        rows = jnp.sum(real, dtype=jnp.int32)
        place = jnp.cumsum(real, dtype=jnp.int32) - 1
        if encoding.latents is None:
            assert encoding.values is not None and encoding.indices is not None
            on, slots = (encoding.values != 0) & real[:, None], encoding.indices
            zeros = jnp.zeros(encoding.d_sae, jnp.int32)
            count = zeros.at[slots].add(on.astype(jnp.int32))
            first = (zeros + rows).at[slots].min(jnp.where(on, place[:, None], rows))
            last = (zeros - 1).at[slots].max(jnp.where(on, place[:, None], -1))
        else:
            on = (encoding.latents != 0) & real[:, None]
            count = jnp.sum(on, axis=0, dtype=jnp.int32)
            first = jnp.min(jnp.where(on, place[:, None], rows), axis=0)
            last = jnp.max(jnp.where(on, place[:, None], -1), axis=0)
        silent = jnp.zeros((len(self.windows), encoding.d_sae), jnp.int32)
        return FiringState(rows=rows, count=count, lead=first, trail=rows - 1 - last, silent=silent)

    def _windows_in(self, run):
        """Number of windows of each length inside silent runs: [1, d_sae] to [n_windows, d_sae]."""
        lengths = np.asarray(self.windows, np.int32).reshape(-1, 1)
        return (run - lengths + 1).clip(0)


@struct.dataclass
class ActivityState:
    """Sums over rows.

    Attributes:
      histogram: Rows by their number of latents other than 0, [d_sae + 1] or, k-sparse, [k + 1]; integers.
      above_1e6: Latents above 1e-6 in size, scalar.
      l1: Sum of the sizes of latents, scalar.
      l1_scaled: Sum of the same times the length of their decoder rows, scalar.
    """

    histogram: jax.Array
    above_1e6: jax.Array
    l1: jax.Array
    l1_scaled: jax.Array


@metric.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Activity(metric.Metric):
    """Distribution of the number of active latents in a row, and of their sum."""

    name: ClassVar[str] = "activity"

    quantiles: tuple[float, ...] = (0.05, 0.25, 0.5, 0.75, 0.95)
    """Of the number of active latents per row; each in (0, 1], given in whole percent."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(not 0 < q <= 1 for q in self.quantiles):
            raise UserError(f"quantiles must all lie in (0, 1], got {self.quantiles}")

    def init(self, batch: metric.EvalBatch) -> ActivityState:
        encoding, zero = batch.encoding, jnp.zeros(())
        most = encoding.d_sae if encoding.values is None else encoding.values.shape[-1]
        return ActivityState(histogram=jnp.zeros(most + 1, jnp.int32), above_1e6=zero, l1=zero, l1_scaled=zero)

    def update(self, state: ActivityState, batch: metric.EvalBatch) -> ActivityState:
        encoding, weight = batch.encoding, batch.weight
        length = jnp.linalg.norm(batch.W_dec, axis=-1)
        if encoding.latents is None:
            assert encoding.values is not None
            active = jnp.abs(encoding.values)
            scaled = active * length[encoding.indices]
        else:
            active = jnp.abs(encoding.latents)
            scaled = active * length[None, :]
        l0 = jnp.sum(active != 0, axis=-1)
        counted = jnp.zeros_like(state.histogram).at[l0].add((weight > 0).astype(jnp.int32))
        this = ActivityState(
            histogram=counted,
            above_1e6=metric.total(jnp.sum(active > 1e-6, axis=-1).astype(jnp.float32), weight),
            l1=metric.total(jnp.sum(active, axis=-1), weight),
            l1_scaled=metric.total(jnp.sum(scaled, axis=-1), weight),
        )
        return self.merge(state, this)

    def merge(self, a: ActivityState, b: ActivityState) -> ActivityState:
        return jax.tree.map(lambda p, q: p + q, a, b)

    def compute(self, state: ActivityState) -> dict[str, float | np.ndarray]:
        histogram = np.asarray(state.histogram)
        below, rows = np.cumsum(histogram), int(histogram.sum())
        return {
            "l0_above_1em6": metric.ratio(state.above_1e6, rows),
            "l1": metric.ratio(state.l1, rows),
            "l1_scaled": metric.ratio(state.l1_scaled, rows),
            **{_quantile_key(q): float(np.searchsorted(below, q * rows)) for q in self.quantiles if rows},
            "l0_hist": histogram,
        }

    def definitions(self) -> dict[str, str]:
        quantiles = {
            _quantile_key(q): f"Smallest number of non-zero latents that at least {q:.0%} of the rows do not exceed."
            for q in self.quantiles
        }
        return {
            "l0_above_1em6": "Mean over rows of the number of latents above 1e-6 in size; equal to l0 unless many "
            "latents are almost off.",
            "l1": "Mean over rows of the sum of the sizes of the latents, as the encoder gives them.",
            "l1_scaled": "Mean over rows of the sum of sizes of latents times the length of their decoder rows: does "
            "not change when a latent is scaled up and its decoder row down.",
            **quantiles,
            "l0_hist": "Number of rows by their number of non-zero latents, from 0 on.",
        }


def _quantile_key(quantile: float) -> str:
    """Key of a quantile of l0.

    Examples:
      >>> _quantile_key(0.05), _quantile_key(1.0)
      ('l0_q05', 'l0_q100')
    """
    return f"l0_q{round(100 * quantile):02d}"


def _dead_key(window: int) -> str:
    """Key of a window, short for powers of ten.

    Examples:
      >>> _dead_key(100_000), _dead_key(250)
      ('dead_fraction_1e5_tokens', 'dead_fraction_250_tokens')
    """
    exponent = round(math.log10(window))
    return f"dead_fraction_{f'1e{exponent}' if 10**exponent == window else window}_tokens"
