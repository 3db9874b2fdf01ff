r"""Effective dimension of the data, and margins: do the dimensions suffice for the codes?

.. math:: d_{\mathrm{eff}} = \frac{(\mathrm{tr}\, C)^2}{\mathrm{tr}\, C^2} \in [1, d]

with C the covariance of the rows: d for isotropic rows, 1 for rows on a line.
"""

import dataclasses
import math
from typing import ClassVar

import numpy as np

from saejax.errors import UserError
from saejax.evals import metric


@metric.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class EffectiveDimension(metric.Metric):
    """Participation ratio of the covariance of `x`. Keeps d_in^2 sums."""

    name: ClassVar[str] = "effective_dimension"

    def init(self, batch: metric.EvalBatch) -> metric.Scatter:
        return metric.Scatter.none(batch.x.shape[-1])

    def update(self, state: metric.Scatter, batch: metric.EvalBatch) -> metric.Scatter:
        return self.merge(state, metric.Scatter.of(batch.x, batch.weight))

    def merge(self, a: metric.Scatter, b: metric.Scatter) -> metric.Scatter:
        return a.merged(b)

    def compute(self, state: metric.Scatter) -> dict[str, float | np.ndarray]:
        scatter, d, free = np.asarray(state.scatter), len(state.mean), float(state.rows) - 1
        return {
            "effective_dimension": metric.ratio(np.trace(scatter) ** 2, np.sum(scatter**2)),
            "effective_dimension_isotropic": metric.ratio(d * free, free + d + 1),
        }

    def definitions(self) -> dict[str, str]:
        return {
            "effective_dimension": "Squared trace of the covariance of x divided by the trace of its square: d_in when "
            "all directions vary alike, 1 when one direction does all of it.",
            "effective_dimension_isotropic": "What as many rows of isotropic Gaussian noise would show, "
            "d_in (n - 1) / (n + d_in): below d_in because of the finite number of rows.",
        }


def dimension_margins(d: float, k: float, n: float, *, statistical_dimension: float | None = None) -> dict[str, float]:
    r"""Returns how many times the needed dimensions are there, by the constants of four arguments.

    .. math:: \frac{d}{k \ln(n/k)},\; \frac{d}{2 k \ln(n/k)},\; \frac{d}{4 k \ln(k n)},\; \frac{d}{\delta(n, k)}

    A margin above 1 says that the argument does not forbid recovery, never that recovery succeeds: with the first
    constant 768 dimensions and k = 10 allow 2.3e34 features.

    Args:
      d: Dimensions, the width or `effective_dimension`.
      k: Features active at once, such as the mean L0.
      n: Number of features, at least k.
      statistical_dimension: delta(n, k) of `codes.capacity`, or None to leave its margin out.

    Returns:
      `margin_sensing` and `margin_sensing_twice` (compressed sensing, constants 1 and 2), `margin_top_k` (one-step
      top-k decoding), `margin_statistical` (basis pursuit) and `superposed`, 1 where n > d. Without superposition,
      n <= d, no margin below 1 is a violation.

    Raises:
      UserError: sizes for which the bounds say nothing.

    Examples:
      >>> margins = dimension_margins(100, 5, 1000)
      >>> round(margins["margin_sensing"], 3), margins["superposed"]
      (3.775, 1.0)
    """
    if not (d > 0 and k > 0 and n > k and math.isfinite(d + n)):
        raise UserError(f"d, k and n must be finite with d > 0 and 0 < k < n, got d={d}, k={k}, n={n}")
    sensing = k * math.log(n / k)
    margins = {
        "margin_sensing": d / sensing,
        "margin_sensing_twice": d / (2 * sensing),
        "margin_top_k": d / (4 * k * math.log(k * n)) if k * n > 1 else math.inf,
        "superposed": float(n > d),
    }
    if statistical_dimension is not None:
        margins["margin_statistical"] = d / statistical_dimension
    return margins
