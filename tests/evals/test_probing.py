"""AUROC against a test statistic, label entropies by hand, probes whose optimum is known."""

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import mannwhitneyu

from saejax.errors import UserError
from saejax.lab.metrics import logistic, over, probing

RNG = np.random.default_rng(0)


def batch(latents, labels, x=None, n_train=None):
    n = len(latents)
    test = np.arange(n) >= (n // 2 if n_train is None else n_train)
    x = latents if x is None else x
    return probing.LabelBatch(latents=latents, x=x, labels=labels, test=test, row_id=np.arange(n))


def test_auroc_is_mann_whitney_with_ties():
    scores = RNG.integers(0, 5, (80, 4)).astype(float)
    labels = RNG.random((80, 3)) < 0.3
    found = probing.auroc(scores, labels)
    for i in range(4):
        for j in range(3):
            u = mannwhitneyu(scores[labels[:, j], i], scores[~labels[:, j], i]).statistic
            assert found[i, j] == pytest.approx(u / labels[:, j].sum() / (~labels[:, j]).sum(), rel=1e-12)
    assert np.isnan(probing.auroc(scores, np.ones((80, 1), bool))).all()
    assert (probing.auroc(np.ones((80, 2)), labels) == 0.5).all()


def test_meanings_are_counted():
    """Latent 0 fires on label 0, latent 1 on labels 1 and 2 alike, latent 2 never, latent 3 at random."""
    kind = np.arange(600) % 6
    labels = np.eye(6, dtype=int)[kind]
    strength = RNG.random(600) + 0.5
    latents = np.stack([(kind == 0) * strength, ((kind == 1) | (kind == 2)) * strength, 0 * kind, strength], axis=1)
    result = over.over(probing.Polysemanticity(n_top=100), batch(latents, labels), rows=77)
    assert result.arrays["labels_of_latent"][[0, 1, 3]].tolist() == [1, 2, 0]
    entropy = result.arrays["label_entropy_of_latent"]
    assert entropy[0] == 0 and entropy[1] == pytest.approx(1, abs=0.05) and entropy[3] > 2.4
    assert np.isnan(entropy[2]) and np.isnan(result.arrays["labels_of_latent"][2])
    assert result["labels_per_latent"] == 1 and result["labels_per_latent_chance"] == 0
    assert result["label_entropy_top_chance"] == pytest.approx(np.log2(6), abs=0.15)
    assert result.arrays["auroc"][1, 1] == pytest.approx(1 - 0.5 * 100 / 500, abs=0.06)


def test_a_label_held_by_one_latent_needs_one():
    n = 600
    labels = (RNG.random((n, 2)) < 0.4).astype(int)
    directions = RNG.standard_normal((20, 20))
    z = np.maximum(RNG.standard_normal((n, 20)), 0)
    z[:, 3], z[:, 7] = labels[:, 0] * 2, labels[:, 1] * (1 + RNG.random(n))
    result = over.over(probing.SparseProbing(), batch(z, labels, z @ directions, 300), rows=100)
    assert result["probe_k1"] == result["probe_k5"] == 1.0
    assert result["probe_k1_neurons"] < 0.8 < result["probe_dense"]
    share = labels[300:].mean(0)
    assert result["probe_chance"] == pytest.approx(np.maximum(share, 1 - share).mean())


def test_latents_that_know_nothing_are_at_chance():
    labels = (RNG.random((800, 3)) < 0.5).astype(int)
    result = over.over(probing.SparseProbing(ks=(1,)), batch(RNG.standard_normal((800, 5)), labels))
    assert result["probe_k1"] == pytest.approx(0.5, abs=0.06)  # 1200 answers: standard error .015
    with pytest.raises(UserError, match="test must mark"):
        over.over(probing.SparseProbing(), batch(RNG.standard_normal((8, 5)), labels[:8], n_train=8))
    with pytest.raises(UserError, match="labels must be 0 or 1"):
        over.over(probing.SparseProbing(), batch(RNG.standard_normal((8, 5)), labels[:8] + 1))


def test_logistic_regression_finds_the_minimum_in_the_columns_own_scale():
    x = RNG.standard_normal((200, 3)) * np.array([1.0, 50.0, 0.01])[None, :] + np.array([0.0, 300.0, 5.0])[None, :]
    y = x[:, 0] + (x[:, 1] - 300) / 50 + RNG.standard_normal(200) > 0.3
    x = np.concatenate([x, np.full((200, 1), 7.0)], axis=1)
    weights, bias = logistic.fit(x, y, l2=0.01)
    assert weights[3] == 0

    def loss(p):
        margin = np.where(y, 1, -1) * (x[:, :3] @ (p[:3] / x[:, :3].std(0)) + p[3] - 6 * p[1] - 500 * p[2])
        return np.logaddexp(0, -margin).mean() + 0.005 * p[:3] @ p[:3]

    own = np.append(weights[:3] * x[:, :3].std(0), bias)
    own[3] += 6 * own[1] + 500 * own[2]
    best = minimize(loss, np.zeros(4), method="BFGS", options={"gtol": 1e-7})
    assert loss(own) == pytest.approx(best.fun, abs=1e-8)
    np.testing.assert_allclose(own[:3], best.x[:3], atol=1e-3)
