r"""Binding: does a representation keep which colour belongs to which shape?

.. math:: \mathrm{binding\_distance} = \mathrm{mean}\; \frac{\|f(ax, by) - f(ay, bx)\|}{\|f(ax, by)\|}

A code that adds one vector per part cannot tell the two scenes apart: the distance is exactly 0, and no sparse code
can recover the loss. The distance between unrelated scenes gives the scale.

Sources:
  Klindt et al., From superposition to sparse codes, 2025, on the binding problem of additive codes.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from saejax.evals import metric
from saejax.lab.metrics import rows


@struct.dataclass
class SwapBatch:
    """Pairs of scenes made of the same parts, bound the one way and the other.

    Attributes:
      f_bound: Representation of (a with x, b with y), [b, m] float32.
      f_swapped: Of (a with y, b with x), [b, m] float32.
      weight: 1 for a real row, 0 for padding, [b] float32.
    """

    shared: ClassVar[tuple[str, ...]] = ()

    f_bound: rows.Rows
    f_swapped: rows.Rows
    weight: rows.Rows = None


@struct.dataclass
class SwapState:
    """Sums over rows.

    Attributes:
      ratio: Of |bound - swapped| / |bound| where bound is not 0.
      nonzero: Rows with bound other than 0.
      apart: Of |bound - swapped|^2.
      square: Of |bound|^2 and of |swapped|^2, [2].
      vector: Of bound and of swapped, [2, m].
      own: Of <bound, swapped>.
      rows: Number of rows.
    """

    ratio: jax.Array
    nonzero: jax.Array
    apart: jax.Array
    square: jax.Array
    vector: jax.Array
    own: jax.Array
    rows: jax.Array


@metric.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Binding(metric.Metric):
    """Distance between the two bindings of the same parts, [0, inf); 0 for every sum of parts."""

    name: ClassVar[str] = "binding"
    batch_type: ClassVar[type] = SwapBatch

    def init(self, batch: SwapBatch) -> SwapState:
        metric.same_width(f_bound=batch.f_bound, f_swapped=batch.f_swapped)
        one = jnp.zeros(())
        vector = jnp.zeros((2, batch.f_bound.shape[-1]))
        return SwapState(ratio=one, nonzero=one, apart=one, square=jnp.zeros(2), vector=vector, own=one, rows=one)

    def update(self, state: SwapState, batch: SwapBatch) -> SwapState:
        real = batch.weight[:, None] > 0
        bound, swapped = (jnp.where(real, f, 0.0) for f in (batch.f_bound, batch.f_swapped))
        length = jnp.linalg.norm(bound, axis=-1)
        apart = jnp.linalg.norm(bound - swapped, axis=-1)
        nonzero = length > 0
        this = SwapState(
            ratio=jnp.sum(jnp.where(nonzero, apart / jnp.where(nonzero, length, 1.0), 0.0)),
            nonzero=jnp.sum(nonzero.astype(jnp.float32)),
            apart=jnp.sum(apart**2),
            square=jnp.stack([jnp.sum(bound**2), jnp.sum(swapped**2)]),
            vector=jnp.stack([jnp.sum(bound, axis=0), jnp.sum(swapped, axis=0)]),
            own=jnp.sum(bound * swapped),
            rows=jnp.sum(real.astype(jnp.float32)),
        )
        return self.merge(state, this)

    def merge(self, a: SwapState, b: SwapState) -> SwapState:
        return jax.tree.map(lambda p, q: p + q, a, b)

    def compute(self, state: SwapState) -> dict[str, float | np.ndarray]:
        n, square = float(state.rows), np.asarray(state.square)
        crossed = np.sum(np.asarray(state.vector[0]) * np.asarray(state.vector[1])) - float(state.own)
        others = metric.ratio(square.sum(), n) - 2 * metric.ratio(crossed, n * (n - 1))
        scale = metric.ratio(square[0], n)
        return {
            "binding_distance": metric.ratio(state.ratio, state.nonzero),
            "binding_distance_rms": metric.ratio(metric.ratio(state.apart, n), scale) ** 0.5,
            "binding_distance_rms_shuffled": max(metric.ratio(others, scale), 0.0) ** 0.5,
        }

    def definitions(self) -> dict[str, str]:
        return {
            "binding_distance": "Mean over rows of |f_bound - f_swapped| / |f_bound|, rows with f_bound = 0 left out; "
            "0 for a code that is a sum over parts.",
            "binding_distance_rms": "sqrt(sum of |f_bound - f_swapped|^2 / sum of |f_bound|^2) over rows.",
            "binding_distance_rms_shuffled": "Control: as binding_distance_rms, over all pairs of f_bound with the "
            "f_swapped of another row; the distance of unrelated scenes.",
        }
