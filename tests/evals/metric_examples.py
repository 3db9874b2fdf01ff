"""One small example for every registered metric: what test_invariance.py runs them on.

An entry takes a generator and a number of rows and returns the metric and a batch of that many rows, `weight` None.
A metric without an entry fails the test. Keep sizes tiny: every metric is compiled five times.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import representation_examples

from saejax.evals import metric, reconstruction, shrinkage, site_error, sparsity
from saejax.lab.metrics import absorption, dark_matter, dimension, gaps, normaliser, true_codes
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


def code_example(rng: np.random.Generator, n: int) -> tuple[metric.Metric, Any]:
    """Five sparse features and seven latents, four of which follow a feature."""
    features = (rng.random((n, 5)) * (rng.random((n, 5)) < 0.4)).astype(np.float32)
    latents = np.concatenate([0.8 * features[:, :4], rng.random((n, 3)) * (rng.random((n, 3)) < 0.3)], axis=1)
    latents = (latents * (rng.random(latents.shape) < 0.9)).astype(np.float32)
    split = true_codes.split_rows(np.arange(n))
    match = np.array([0, 1, 2, 3, -1], np.int32)
    batch = true_codes.CodeBatch(features=features, latents=latents, split=split, match=match)
    return true_codes.CodeMcc(), batch


def support_example(rng: np.random.Generator, n: int) -> tuple[metric.Metric, Any]:
    """The same codes."""
    return true_codes.Support(), code_example(rng, n)[1]


def loss_example(rng: np.random.Generator, n: int) -> tuple[metric.Metric, Any]:
    """A solver that is better, but for some rows."""
    solver = rng.random(n).astype(np.float32) + 1
    return gaps.AmortisationGap(), gaps.LossPairBatch(solver=solver, encoder=solver * np.float32(1.1) - np.float32(0.1))


def family_example(rng: np.random.Generator, n: int) -> tuple[metric.Metric, Any]:
    """Three parents, each with a child now and then."""
    parent, child = rng.random((2, n, 3)) < 0.5
    latent = (parent & (rng.random((n, 3)) < 0.7)).astype(np.float32)
    return absorption.ParentAbsorption(), absorption.FamilyBatch(parent=parent, child=child, latent=latent)


def probe_example(rng: np.random.Generator, n: int) -> tuple[metric.Metric, Any]:
    """Eight latents of which two stand for the concept."""
    W_dec = rng.standard_normal((8, 5)).astype(np.float32)
    latents = (rng.random((n, 8)) * (rng.random((n, 8)) < 0.5)).astype(np.float32)
    x = latents @ W_dec + 0.1 * rng.standard_normal((n, 5)).astype(np.float32)
    main = np.arange(8) < 2
    batch = absorption.ProbeBatch(x=x, latents=latents, W_dec=W_dec, probe=W_dec[0] + W_dec[1], main=main)
    return absorption.ProbeAbsorption(), batch


def round_trip_example(rng: np.random.Generator, n: int) -> tuple[metric.Metric, Any]:
    """Rows that come back with an error in the second digit."""
    x = rng.standard_normal((n, 4)).astype(np.float32)
    return normaliser.RoundTrip(), normaliser.RoundTripBatch(x=x, returned=x + 0.01 * rng.random(x.shape, np.float32))


EXAMPLES |= {
    reconstruction.Reconstruction: reconstructions(reconstruction.Reconstruction()),
    reconstruction.FvuBatchLegacy: reconstructions(reconstruction.FvuBatchLegacy()),
    reconstruction.EvLegacy: reconstructions(reconstruction.EvLegacy()),
    site_error.SiteError: reconstructions(site_error.SiteError(widths=(2, 3))),
    sparsity.Firing: reconstructions(sparsity.Firing(windows=(10,))),
    shrinkage.Norms: reconstructions(shrinkage.Norms()),
    sparsity.Activity: reconstructions(sparsity.Activity()),
    shrinkage.Gain: reconstructions(shrinkage.Gain()),
    shrinkage.NormSlope: reconstructions(shrinkage.NormSlope()),
    shrinkage.RefinementRatio: refit_example,
    true_codes.CodeMcc: code_example,
    true_codes.Support: support_example,
    gaps.AmortisationGap: loss_example,
    absorption.ParentAbsorption: family_example,
    absorption.ProbeAbsorption: probe_example,
    dimension.EffectiveDimension: reconstructions(dimension.EffectiveDimension()),
    dark_matter.DarkMatter: reconstructions(dark_matter.DarkMatter()),
    normaliser.RoundTrip: round_trip_example,
}

EXAMPLES |= representation_examples.EXAMPLES
