r"""Fraction of variance unexplained per site: a crosscoder may explain one site and ignore another.

.. math:: \mathrm{FVU}_s = \frac{\sum_i \|x_i^s - \hat x_i^s\|^2}{\sum_i \|x_i^s - c^s\|^2}

c is the mean of all evaluated rows. Sums about the mean merge as in `reconstruction`.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from saejax.evals import metric


@struct.dataclass
class SiteErrorState:
    """Sums over rows.

    Attributes:
      rows: Number of rows, scalar.
      mean: Mean of `x`, [d_out].
      spread: Sum of squared distances of `x` to that mean in each dimension, [d_out].
      error: Sum of squared distances of `x` to its reconstruction in each dimension, [d_out].
    """

    rows: jax.Array
    mean: jax.Array
    spread: jax.Array
    error: jax.Array


@metric.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class SiteError(metric.Metric):
    """The fvu of every written site by itself, in the order of the sites."""

    name: ClassVar[str] = "site_error"

    widths: tuple[int, ...] = ()
    """Widths of the sites that are written; () takes all dimensions as one site."""

    def init(self, batch: metric.EvalBatch) -> SiteErrorState:
        vector = jnp.zeros(batch.x.shape[-1])
        return SiteErrorState(rows=jnp.zeros(()), mean=vector, spread=vector, error=vector)

    def update(self, state: SiteErrorState, batch: metric.EvalBatch) -> SiteErrorState:
        rows, mean, apart = metric.centred(batch.x, batch.weight)
        error = jnp.where(batch.weight[:, None] > 0, batch.x - batch.recon, 0.0)
        this = SiteErrorState(rows=rows, mean=mean, spread=jnp.sum(apart**2, axis=0), error=jnp.sum(error**2, axis=0))
        return self.merge(state, this)

    def merge(self, a: SiteErrorState, b: SiteErrorState) -> SiteErrorState:
        share, shift = metric.share_of_second(a.rows, b.rows), b.mean - a.mean
        return SiteErrorState(
            rows=a.rows + b.rows,
            mean=a.mean + shift * share,
            spread=a.spread + b.spread + shift * shift * (a.rows * share),
            error=a.error + b.error,
        )

    def compute(self, state: SiteErrorState) -> dict[str, float | np.ndarray]:
        edges = np.cumsum([0, *(self.widths or (len(state.error),))])
        sums = [(state.error[a:b].sum(), state.spread[a:b].sum()) for a, b in zip(edges, edges[1:], strict=False)]
        return {f"fvu_site_{site}": metric.ratio(error, spread) for site, (error, spread) in enumerate(sums)}

    def definitions(self) -> dict[str, str]:
        return {
            f"fvu_site_{site}": f"Fraction of variance unexplained in written site {site} alone: sum over all rows of "
            "|x - recon|^2 divided by the sum over all rows of |x - c|^2, c the mean of all evaluated rows."
            for site in range(max(len(self.widths), 1))
        }
