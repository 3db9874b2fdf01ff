"""The examples of metrics that judge representations and what latents mean; `metric_examples.py` joins them."""

from typing import Any

import numpy as np

from saejax.evals import metric
from saejax.lab.metrics import (
    ablation,
    additivity,
    binding,
    identifiability,
    interpretability,
    manifold_probe,
    probing,
    shortcut,
    splice,
    top_activating,
)

Rng = np.random.Generator
Case = tuple[metric.Metric, Any]


def pairs(rng: Rng, n: int) -> additivity.PairBatch:
    """A layer that nearly adds, away from the origin; some rows tie."""
    a, b = rng.integers(-2, 3, (2, n, 4)).astype(np.float32)
    f = [np.maximum(v @ rng.standard_normal((4, 6)) + 1, 0).astype(np.float32) for v in (a, b, a + b)]
    return additivity.PairBatch(f_a=f[0], f_b=f[1], f_ab=f[2], row_id=np.arange(n), f_blank=np.ones(6, np.float32))


def bound(rng: Rng, n: int) -> Case:
    """Scenes and their swaps."""
    f = rng.standard_normal((2, n, 5)).astype(np.float32)
    return binding.Binding(), binding.SwapBatch(f_bound=f[0] + 2, f_swapped=f[0] + 0.3 * f[1] + 2)


def probed(rng: Rng, n: int) -> Case:
    """Three latents in a representation with a large constant part."""
    z = rng.standard_normal((n, 3))
    h = np.tanh(z @ rng.standard_normal((3, 4))) + 20
    return identifiability.LinearProbe(), identifiability.ProbeBatch(
        h=h, z=z, test=rng.random(n) < 0.4, row_id=np.arange(n)
    )


def angles(rng: Rng, n: int) -> Case:
    """Two angles."""
    point = rng.uniform(-3, 3, (n, 2))
    h = np.concatenate([np.cos(point), np.sin(point)], axis=1) + 0.1 * rng.standard_normal((n, 4))
    return manifold_probe.ManifoldProbe(), manifold_probe.ManifoldBatch(
        h=h, point=point, test=rng.random(n) < 0.4, row_id=np.arange(n)
    )


def classes(rng: Rng, n: int) -> Case:
    """Four classes, a classifier near the best one."""
    bayes = rng.standard_normal((n, 4)).astype(np.float32)
    logits = bayes + 0.3 * rng.standard_normal((n, 4)).astype(np.float32)
    return identifiability.CrossEntropyGap(), identifiability.ClassBatch(
        logits=logits, bayes_logits=bayes, label=rng.integers(0, 4, n)
    )


def described(rng: Rng, n: int) -> interpretability.DescribedBatch:
    """Sparse units with many ties, and the labels of the rows."""
    latents = rng.integers(0, 3, (n, 4)) * (rng.random((n, 4)) < 0.5)
    return interpretability.DescribedBatch(
        latents=latents.astype(np.float32),
        descriptor=(rng.random((n, 6)) < 0.4).astype(np.float32),
        row_id=np.arange(n),
    )


def top(rng: Rng, n: int) -> Case:
    """The same units."""
    units = described(rng, n)
    batch = top_activating.LatentBatch(latents=units.latents, row_id=units.row_id)
    return top_activating.TopActivating(n_top=5, n_decile=1), batch


def labelled(rng: Rng, n: int) -> probing.LabelBatch:
    """The same units, labels and activations."""
    units = described(rng, n)
    x = units.latents @ rng.standard_normal((4, 5)) + rng.standard_normal((n, 5))
    return probing.LabelBatch(
        latents=units.latents,
        x=x,
        labels=units.descriptor[:, :2].astype(int),
        test=rng.random(n) < 0.5,
        row_id=units.row_id,
    )


def cued(rng: Rng, n: int) -> Case:
    """A classifier that follows the cue now and then."""
    label, cue, guess = rng.integers(0, 2, (3, n))
    return shortcut.GroupAccuracy(), shortcut.CueBatch(prediction=np.where(guess, label, cue), label=label, cue=cue)


def concepts(rng: Rng, n: int) -> ablation.ConceptBatch:
    """Two concepts, six latents, each concept's probe; integers, so that rounding moves no logit across 0."""
    latents = rng.integers(0, 3, (n, 6)).astype(np.float32)
    W_dec = rng.integers(-2, 3, (6, 4)).astype(np.float32)
    return ablation.ConceptBatch(
        x=latents @ W_dec,
        latents=latents,
        labels=(latents[:, :2] > 0).astype(np.int32),
        W_dec=W_dec,
        probe_weight=W_dec[:2],
        probe_bias=np.full(2, -0.5, np.float32),
        ablated=np.array([[0, -1], [1, 3]], np.int32),
        control=np.array([[4, -1], [5, 2]], np.int32),
    )


def losses(rng: Rng, n: int) -> Case:
    """A good reconstruction."""
    clean, more = rng.random((2, n)).astype(np.float32)
    batch = splice.LossBatch(clean=clean, spliced=clean + 0.1 * more, zero=clean + 2 * more, mean=clean + more)
    return splice.LossRecovered(), batch


EXAMPLES = {
    additivity.Additivity: lambda rng, n: (additivity.Additivity(), pairs(rng, n)),
    additivity.AdditivityRetrieval: lambda rng, n: (additivity.AdditivityRetrieval(), pairs(rng, n)),
    binding.Binding: bound,
    identifiability.LinearProbe: probed,
    identifiability.CrossEntropyGap: classes,
    manifold_probe.ManifoldProbe: angles,
    interpretability.Intruder: lambda rng, n: (interpretability.Intruder(trials=5, top_share=0.1), described(rng, n)),
    interpretability.TwoAlternatives: lambda rng, n: (
        interpretability.TwoAlternatives(references=3, trials=4),
        described(rng, n),
    ),
    top_activating.TopActivating: top,
    probing.Polysemanticity: lambda rng, n: (probing.Polysemanticity(n_top=10), labelled(rng, n)),
    probing.SparseProbing: lambda rng, n: (probing.SparseProbing(ks=(1, 2)), labelled(rng, n)),
    shortcut.GroupAccuracy: cued,
    ablation.MeanDifference: lambda rng, n: (ablation.MeanDifference(), concepts(rng, n)),
    ablation.Ablation: lambda rng, n: (ablation.Ablation(), concepts(rng, n)),
    splice.LossRecovered: losses,
}
"""Metric class -> (generator, rows) -> the metric and a batch."""
