r"""Error decomposition of an SAE: a constant, a part linear in the input, and the rest.

With \(e = x - \hat x\) and the least-squares map \(e \approx B (x - \bar x) + \bar e\), all sums over all rows,

.. math:: \mathrm{fvu} = \underbrace{n\|\bar e\|^2 / S}_{\mathrm{constant}} +
   \underbrace{\sum \|B(x - \bar x)\|^2 / S}_{\mathrm{linear}} + \underbrace{\mathrm{rest} / S}_{\mathrm{nonlinear}},
   \qquad S = \sum \|x - \bar x\|^2

The map comes from the normal equations, so it needs no second pass.

Source: Engels, Riggs and Tegmark, Decomposing the dark matter of sparse autoencoders, 2024 (arXiv:2410.14670).
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from saejax.evals import metric

_RCOND = 1e-6
"""Directions of `x` with less of the largest variance than this are left out of the map: float32 cannot tell them."""


@struct.dataclass
class ErrorState:
    """Rows, the means of (x, error) side by side [2 d_in], and sums of products about them.

    Attributes:
      rows: Scalar.
      mean: [2 d_in].
      x_both: Products of x with x and with the error, [d_in, 2 d_in].
      error_error: Sum of squares of the error about its mean, scalar.
    """

    rows: jax.Array
    mean: jax.Array
    x_both: jax.Array
    error_error: jax.Array


@metric.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class DarkMatter(metric.Metric):
    """Share of the error that is a linear function of the input. Keeps 2 d_in^2 sums."""

    name: ClassVar[str] = "dark_matter"

    def init(self, batch: metric.EvalBatch) -> ErrorState:
        d = batch.x.shape[-1]
        return ErrorState(
            rows=jnp.zeros(()), mean=jnp.zeros(2 * d), x_both=jnp.zeros((d, 2 * d)), error_error=jnp.zeros(())
        )

    def update(self, state: ErrorState, batch: metric.EvalBatch) -> ErrorState:
        d, both = batch.x.shape[-1], jnp.concatenate([batch.x, batch.x - batch.recon], axis=-1)
        rows, mean, apart = metric.centred(both, batch.weight)
        x_both = jnp.matmul(apart[:, :d].T, apart, precision=jax.lax.Precision.HIGHEST)
        this = ErrorState(rows=rows, mean=mean, x_both=x_both, error_error=jnp.sum(apart[:, d:] ** 2))
        return self.merge(state, this)

    def merge(self, a: ErrorState, b: ErrorState) -> ErrorState:
        share, shift, d = metric.share_of_second(a.rows, b.rows), b.mean - a.mean, a.x_both.shape[0]
        factor = a.rows * share
        return ErrorState(
            rows=a.rows + b.rows,
            mean=a.mean + shift * share,
            x_both=a.x_both + b.x_both + shift[:d, None] * shift[None, :] * factor,
            error_error=a.error_error + b.error_error + (shift[d:] ** 2).sum() * factor,
        )

    def compute(self, state: ErrorState) -> dict[str, float | np.ndarray]:
        d, rows = state.x_both.shape[0], float(state.rows)
        x_x, x_error = np.asarray(state.x_both)[:, :d], np.asarray(state.x_both)[:, d:]
        variance, directions = np.linalg.eigh(x_x)
        kept = variance > _RCOND * max(variance[-1], 0.0)
        linear = float((((directions.T @ x_error)[kept]) ** 2 / variance[kept, None]).sum())
        spread, error = float(np.trace(x_x)), float(state.error_error)
        return {
            "error_linear_r2": metric.ratio(linear, error),
            "error_linear_r2_chance": min(metric.ratio(kept.sum(), rows - 1), 1.0),
            "fvu_constant_error": metric.ratio(rows * float((np.asarray(state.mean)[d:] ** 2).sum()), spread),
            "fvu_linear_error": metric.ratio(linear, spread),
            "fvu_nonlinear_error": metric.ratio(error - linear, spread),
        }

    def definitions(self) -> dict[str, str]:
        return {
            "error_linear_r2": "R^2 of the least-squares linear map with intercept from x to the error x - recon, "
            "fitted "
            "and scored on all evaluated rows: the linearly predictable share of the error.",
            "error_linear_r2_chance": "What that R^2 would be for an error unrelated to x: dimensions of x over "
            "rows - 1.",
            "fvu_constant_error": "The part of fvu that is the mean error: rows times |mean error|^2 over the "
            "spread of x.",
            "fvu_linear_error": "The part of fvu that the linear map explains.",
            "fvu_nonlinear_error": "The part of fvu that is neither constant nor linear in x; the three add up to fvu.",
        }
