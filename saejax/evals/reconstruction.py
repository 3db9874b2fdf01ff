r"""Reconstruction metrics: squared error, fraction of variance unexplained (fvu), cosine.

With \(c\) the mean of all evaluated rows, the value of "predicting the mean":

.. math:: \mathrm{FVU} = \frac{\sum_i \|x_i - \hat x_i\|^2}{\sum_i \|x_i - c\|^2}

Sums of squares about the mean merge as (count, mean, sum of squares) after Chan, Golub and LeVeque (1983). So data
whose mean is far larger than its spread lose no precision in float32.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from saejax.evals import metric


@struct.dataclass
class ReconstructionState:
    """Sums over rows.

    Attributes:
      rows: Number of rows, scalar.
      mean: Mean of `x`, [d_in].
      spread: Sum of squared distances of `x` to that mean, scalar.
      error: Sum of squared distances of `x` to its reconstruction, scalar.
      cosine: Sum of the cosines of `x` and its reconstruction, scalar.
      direction: Sum of `x / |x|`, [d_in].
      power: Sum of |x|^2, scalar.
      row_error: Sum of |x - recon|^2 / |x|^2 over rows with x not 0, scalar.
      nonzero: Number of those rows, scalar.
    """

    rows: jax.Array
    mean: jax.Array
    spread: jax.Array
    error: jax.Array
    cosine: jax.Array
    direction: jax.Array
    power: jax.Array
    row_error: jax.Array
    nonzero: jax.Array


@metric.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Reconstruction(metric.Metric):
    """Squared error and cosine, each beside the value that predicting the mean would get."""

    name: ClassVar[str] = "reconstruction"

    def init(self, batch: metric.EvalBatch) -> ReconstructionState:
        zero, vector = jnp.zeros(()), jnp.zeros(batch.x.shape[-1])
        return ReconstructionState(
            rows=zero,
            mean=vector,
            spread=zero,
            error=zero,
            cosine=zero,
            direction=vector,
            power=zero,
            row_error=zero,
            nonzero=zero,
        )

    def update(self, state: ReconstructionState, batch: metric.EvalBatch) -> ReconstructionState:
        x, recon, weight = batch.x, batch.recon, batch.weight
        rows, mean, apart = metric.centred(x, weight)
        error = x - recon
        inverse = _inverse_norm(x)
        unit, relative = x * inverse[:, None], error * inverse[:, None]
        unit_recon = recon * _inverse_norm(recon)[:, None]
        this = ReconstructionState(
            rows=rows,
            mean=mean,
            spread=metric.total(metric.dot(apart, apart), weight),
            error=metric.total(metric.dot(error, error), weight),
            cosine=metric.total(metric.dot(unit, unit_recon), weight),
            direction=jnp.sum(unit * weight[:, None], axis=0),
            power=metric.total(metric.dot(x, x), weight),
            row_error=metric.total(metric.dot(relative, relative), weight),
            nonzero=metric.total((inverse > 0).astype(jnp.float32), weight),
        )
        return self.merge(state, this)

    def merge(self, a: ReconstructionState, b: ReconstructionState) -> ReconstructionState:
        share = metric.share_of_second(a.rows, b.rows)
        shift = b.mean - a.mean
        return ReconstructionState(
            rows=a.rows + b.rows,
            mean=a.mean + shift * share,
            spread=a.spread + b.spread + (shift * shift).sum() * a.rows * share,
            error=a.error + b.error,
            cosine=a.cosine + b.cosine,
            direction=a.direction + b.direction,
            power=a.power + b.power,
            row_error=a.row_error + b.row_error,
            nonzero=a.nonzero + b.nonzero,
        )

    def compute(self, state: ReconstructionState) -> dict[str, float | np.ndarray]:
        mean = np.asarray(state.mean)
        length = float(np.linalg.norm(mean))
        return {
            "mse": metric.ratio(state.error, state.rows),
            "mse_mean_baseline": metric.ratio(state.spread, state.rows),
            "fvu": metric.ratio(state.error, state.spread),
            "r2": 1.0 - metric.ratio(state.error, state.spread),
            "fvu_uncentred": metric.ratio(state.error, state.power),
            "nmse": metric.ratio(state.row_error, state.nonzero),
            "cosine": metric.ratio(state.cosine, state.rows),
            "cosine_mean_baseline": metric.ratio(float(np.dot(state.direction, mean)), float(state.rows) * length),
        }

    def definitions(self) -> dict[str, str]:
        return {
            "mse": "Mean over rows of the squared distance |x - recon|^2, summed over d_in, in the data's own scale.",
            "mse_mean_baseline": "Mean over rows of |x - c|^2 with c the mean of the evaluated rows: the mse of "
            "predicting the mean.",
            "fvu": "Fraction of variance unexplained: sum over all rows of |x - recon|^2 divided by the sum over all "
            "rows of |x - c|^2, c the mean of all evaluated rows; 0 is perfect, 1 is no better than the mean.",
            "r2": "1 - fvu: the share of the variance about the mean of all evaluated rows that is explained.",
            "fvu_uncentred": "Sum over all rows of |x - recon|^2 divided by the sum over all rows of |x|^2; lower than "
            "fvu wherever the mean is not 0, and 1 for a reconstruction of zeros.",
            "nmse": "Mean over rows of |x - recon|^2 / |x|^2, rows with x = 0 left out: each row counts alike, of any "
            "length.",
            "cosine": "Mean over rows of the cosine of x and recon; a row where either is zero counts as 0.",
            "cosine_mean_baseline": "Mean over rows of the cosine of x and the mean of the evaluated rows: the cosine "
            "of predicting the mean.",
        }


@struct.dataclass
class FvuBatchState:
    """Sum of the batches' ratios and number of batches, scalars."""

    ratios: jax.Array
    batches: jax.Array


@metric.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class FvuBatchLegacy(metric.Metric):
    """The FVU that other trainers log. It depends on the batch size; use it only to compare with older results."""

    name: ClassVar[str] = "fvu_batch_legacy"

    def init(self, batch: metric.EvalBatch) -> FvuBatchState:
        return FvuBatchState(ratios=jnp.zeros(()), batches=jnp.zeros(()))

    def update(self, state: FvuBatchState, batch: metric.EvalBatch) -> FvuBatchState:
        error = batch.x - batch.recon
        _, _, apart = metric.centred(batch.x, batch.weight)
        spread = metric.total(metric.dot(apart, apart), batch.weight)
        defined = spread > 0  # a batch of one row, or of padding, has no variance to explain
        value = metric.total(metric.dot(error, error), batch.weight) / jnp.where(defined, spread, 1.0)
        this = FvuBatchState(ratios=jnp.where(defined, value, 0.0), batches=defined.astype(jnp.float32))
        return self.merge(state, this)

    def merge(self, a: FvuBatchState, b: FvuBatchState) -> FvuBatchState:
        return FvuBatchState(ratios=a.ratios + b.ratios, batches=a.batches + b.batches)

    def compute(self, state: FvuBatchState) -> dict[str, float | np.ndarray]:
        return {"fvu_batch_legacy": metric.ratio(state.ratios, state.batches)}

    def definitions(self) -> dict[str, str]:
        return {
            "fvu_batch_legacy": "Unweighted mean over batches of (sum of |x - recon|^2) / (sum of |x - batch mean|^2); "
            "depends on the batch size and is kept only for comparison with trainers that log it.",
        }


@struct.dataclass
class EvLegacyState:
    """Sum over rows of the explained share and number of rows, scalars."""

    explained: jax.Array
    rows: jax.Array


@metric.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class EvLegacy(metric.Metric):
    """Explained variance of older papers, row by row about the batch's mean; only for comparison with them."""

    name: ClassVar[str] = "ev_legacy"

    def init(self, batch: metric.EvalBatch) -> EvLegacyState:
        return EvLegacyState(explained=jnp.zeros(()), rows=jnp.zeros(()))

    def update(self, state: EvLegacyState, batch: metric.EvalBatch) -> EvLegacyState:
        error = batch.x - batch.recon
        _, _, apart = metric.centred(batch.x, batch.weight)
        spread = metric.dot(apart, apart)
        defined = spread > 0
        explained = jnp.where(defined, 1.0 - metric.dot(error, error) / jnp.where(defined, spread, 1.0), 0.0)
        this = EvLegacyState(
            explained=metric.total(explained, batch.weight),
            rows=metric.total(defined.astype(jnp.float32), batch.weight),
        )
        return self.merge(state, this)

    def merge(self, a: EvLegacyState, b: EvLegacyState) -> EvLegacyState:
        return EvLegacyState(explained=a.explained + b.explained, rows=a.rows + b.rows)

    def compute(self, state: EvLegacyState) -> dict[str, float | np.ndarray]:
        return {"ev_legacy": metric.ratio(state.explained, state.rows)}

    def definitions(self) -> dict[str, str]:
        return {
            "ev_legacy": "Mean over rows of 1 - |x - recon|^2 / |x - batch mean|^2, as SAEBench published; "
            "depends on the batch size and is kept only for comparison with those.",
        }


def _inverse_norm(x: Float[Array, "b d_in"]) -> Float[Array, "b"]:
    """1 / |x| for each row, and 0 for a row of zeros."""
    norm = jnp.linalg.norm(x, axis=-1)
    return jnp.where(norm > 0, 1.0 / jnp.where(norm > 0, norm, 1.0), 0.0)
