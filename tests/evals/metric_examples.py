"""One small example for every registered metric: what test_invariance.py runs them on.

An entry takes a generator and a number of rows and returns the metric and a batch of that many rows, `weight` None.
A metric without an entry fails the test. Keep sizes tiny: every metric is compiled five times.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from saejax.evals import metric, reconstruction, shrinkage, sparsity
from saejax.sae import base

Example = Callable[[np.random.Generator, int], tuple[metric.Metric, Any]]

EXAMPLES: dict[type[metric.Metric], Example] = {}
"""Metric class -> its example."""

OF_THE_BATCH: dict[type[metric.Metric], str] = {
    reconstruction.EvLegacy: "measures from the mean of each batch, as the papers do whose numbers it is compared to",
    reconstruction.FvuBatchLegacy: "averages a ratio per batch, as the trainers do whose numbers it is compared to",
}
"""Metrics whose value depends on how rows are cut into batches, with the reason. None but those named legacy."""

OF_THE_STREAM: dict[type[metric.Metric], tuple[tuple[str, ...], str]] = {
    sparsity.Firing: (("dead_fraction_1e1_tokens",), "silence over consecutive rows is about their order"),
}
"""Metrics about the order of rows: the keys that a permutation may change, with the reason."""


def eval_batch(rng: np.random.Generator, n: int, d_in: int = 5, d_sae: int = 8, k: int = 3) -> metric.EvalBatch:
    """A k-sparse SAE's imperfect reconstruction of rows away from the origin."""
    W_dec = rng.standard_normal((d_sae, d_in)).astype(np.float32)
    b_dec = rng.standard_normal(d_in).astype(np.float32)
    indices = np.argsort(rng.random((n, d_sae)), axis=1)[:, :k].astype(np.int32)
    values = (rng.random((n, k)) * (rng.random((n, k)) < 0.7)).astype(np.float32)
    recon = np.einsum("bk,bkd->bd", values, W_dec[indices]) + b_dec
    x = (recon + 0.5 * rng.standard_normal((n, d_in)) + 0.3 * recon[:, ::-1]).astype(np.float32)
    return metric.EvalBatch(
        x=jnp.asarray(x),
        recon=jnp.asarray(recon),
        encoding=base.Encoding(values=jnp.asarray(values), indices=jnp.asarray(indices), d_sae=d_sae),
        weight=None,  # pyright: ignore[reportArgumentType]
        W_dec=jnp.asarray(W_dec),
        b_dec=jnp.asarray(b_dec),
    )


def reconstructions(m: metric.Metric) -> Example:
    """The example of a metric that takes an `EvalBatch`."""
    return lambda rng, n: (m, eval_batch(rng, n))


def refit_example(rng: np.random.Generator, n: int) -> tuple[metric.Metric, Any]:
    """Latents that are 0.8 of their refit, roughly."""
    refit = np.maximum(rng.standard_normal((n, 6)), 0).astype(np.float32)
    latents = (refit * rng.uniform(0.6, 1.0, refit.shape)).astype(np.float32)
    return shrinkage.RefinementRatio(), shrinkage.RefitBatch(latents=latents, refit=refit)


EXAMPLES |= {
    reconstruction.Reconstruction: reconstructions(reconstruction.Reconstruction()),
    reconstruction.FvuBatchLegacy: reconstructions(reconstruction.FvuBatchLegacy()),
    reconstruction.EvLegacy: reconstructions(reconstruction.EvLegacy()),
    sparsity.Firing: reconstructions(sparsity.Firing(windows=(10,))),
    shrinkage.Norms: reconstructions(shrinkage.Norms()),
    sparsity.Activity: reconstructions(sparsity.Activity()),
    shrinkage.Gain: reconstructions(shrinkage.Gain()),
    shrinkage.NormSlope: reconstructions(shrinkage.NormSlope()),
    shrinkage.RefinementRatio: refit_example,
}
