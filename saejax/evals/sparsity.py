"""How often latents fire: L0, firing rate of each, density histogram, dead and dense shares.

Dead shares in windows need more than counts. For each latent the state keeps the silent run it starts with, the one it
ends with, and the number of silent windows in between; two states join by joining the end of one to the start of the
other. That is exact for any cut of the stream, and every one of the `rows - w + 1` windows counts, not one in w.
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
            "l0": "Mean over rows of the number of latents above zero.",
            "dead_share": "Share of latents that fire on none of the evaluated rows.",
            "dense_share": f"Share of latents that fire on more than {self.dense_above:.0%} of the evaluated rows.",
            **windows,
            "firing_rate": "For each latent, the share of evaluated rows on which it is above zero.",
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
            on, slots = (encoding.values > 0) & real[:, None], encoding.indices
            zeros = jnp.zeros(encoding.d_sae, jnp.int32)
            count = zeros.at[slots].add(on.astype(jnp.int32))
            first = (zeros + rows).at[slots].min(jnp.where(on, place[:, None], rows))
            last = (zeros - 1).at[slots].max(jnp.where(on, place[:, None], -1))
        else:
            on = (encoding.latents > 0) & real[:, None]
            count = jnp.sum(on, axis=0, dtype=jnp.int32)
            first = jnp.min(jnp.where(on, place[:, None], rows), axis=0)
            last = jnp.max(jnp.where(on, place[:, None], -1), axis=0)
        silent = jnp.zeros((len(self.windows), encoding.d_sae), jnp.int32)
        return FiringState(rows=rows, count=count, lead=first, trail=rows - 1 - last, silent=silent)

    def _windows_in(self, run):
        """Number of windows of each length inside silent runs: [1, d_sae] to [n_windows, d_sae]."""
        lengths = np.asarray(self.windows, np.int32).reshape(-1, 1)
        return (run - lengths + 1).clip(0)


def _dead_key(window: int) -> str:
    """Key of a window, short for powers of ten.

    Example:
      >>> _dead_key(100_000), _dead_key(250)
      ('dead_share_1e5', 'dead_share_250')
    """
    exponent = round(math.log10(window))
    return f"dead_share_1e{exponent}" if 10**exponent == window else f"dead_share_{window}"
