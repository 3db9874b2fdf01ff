"""Samplers against closed forms, a probe that must find what is there, and small runs of both experiments."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from scipy import integrate, special, stats

from saejax.errors import UserError
from saejax.lab.experiments import classifier, identifiability, noneuclidean, von_mises_fisher
from saejax.lab.metrics import identifiability as probes
from saejax.lab.metrics import manifold_probe, over


@pytest.mark.parametrize(("n", "kappa"), [(2, 3.0), (3, 0.5), (5, 10.0), (10, 50.0)])
def test_samples_have_the_closed_form_mean_and_are_round(n, kappa):
    rows = 40_000
    rng = np.random.default_rng(n)
    mean = von_mises_fisher.uniform(rng, 1, n)
    z = von_mises_fisher.sample(rng, np.repeat(mean, rows, axis=0), kappa)
    np.testing.assert_allclose(np.linalg.norm(z, axis=1), 1, rtol=1e-9)
    along = z @ mean[0]
    length = von_mises_fisher.mean_resultant_length(n, kappa)
    assert abs(along.mean() - length) < 4 * along.std() / rows**0.5
    # E<v,z>^2 = 1 - (n - 1) A / kappa, so the cosine's variance is known too, and what is left is shared evenly.
    second = 1 - (n - 1) * length / kappa
    assert abs((along**2).mean() - second) < 4 * (along**2).std() / rows**0.5
    across = z - along[:, None] * mean
    covariance = across.T @ across / rows
    expected = (1 - second) / (n - 1) * (np.eye(n) - mean.T @ mean)
    assert np.abs(covariance - expected).max() < 5 * (1 - second) / rows**0.5


def test_cosines_follow_their_density():
    w = von_mises_fisher.cosines(np.random.default_rng(0), 20_000, 4, 2.0)
    grid = np.linspace(-1, 1, 4001)
    density = np.exp(2.0 * grid) * np.sqrt(1 - grid**2)
    cumulative = integrate.cumulative_trapezoid(density, grid, initial=0)
    found = stats.kstest(w, lambda x: np.interp(x, grid, cumulative / cumulative[-1]))
    assert found.pvalue > 1e-3
    wrong = stats.kstest(w, lambda x: (1 + x) / 2)
    assert wrong.pvalue < 1e-6


def test_bayes_cross_entropy_of_two_opposite_classes_is_one_integral():
    kappa, rows = 1.5, 40_000
    rng = np.random.default_rng(1)
    means = np.array([[0.0, 0.0, 1.0], [0.0, 0.0, -1.0]])
    labels = rng.integers(2, size=rows)
    z = von_mises_fisher.sample(rng, means[labels], kappa)
    logits = probes.vmf_logits(z, means, kappa)
    found = over.over(probes.CrossEntropyGap(), probes.ClassBatch(logits=logits, bayes_logits=logits, label=labels))
    # On S^2 the cosine has density kappa e^{kappa w} / (2 sinh kappa), and -ln p = ln(1 + e^{-2 kappa w}).
    exact, _ = integrate.quad(
        lambda w: kappa * math.exp(kappa * w) / (2 * math.sinh(kappa)) * special.log1p(math.exp(-2 * kappa * w)), -1, 1
    )
    assert found["ce_bayes"] == pytest.approx(exact, abs=4 * 0.6 / rows**0.5)
    assert found["ce_gap"] == 0


def test_rotation_angles_and_vectors():
    rng = np.random.default_rng(0)
    angles = noneuclidean.rotation_angles(rng, 40_000, 0.0)
    # Uniform rotations: density (1 - cos a) / pi, so E a = pi / 2 + 2 / pi.
    assert angles.mean() == pytest.approx(math.pi / 2 + 2 / math.pi, abs=4 * angles.std() / 200)
    kappa = 3.0
    traces = 1 + 2 * np.cos(noneuclidean.rotation_angles(rng, 40_000, kappa))
    # d/dk of ln [e^k (I_0(2k) - I_1(2k))], the normaliser of exp(k tr S).
    i0, i1, i2 = (special.iv(order, 2 * kappa) for order in range(3))
    expected = 1 + (2 * i1 - (i0 + i2)) / (i0 - i1)
    assert traces.mean() == pytest.approx(expected, abs=4 * traces.std() / 200)
    vectors = rng.uniform(-1.7, 1.7, (50, 3))
    back = noneuclidean.rotation_vectors(manifold_probe.rotation_matrices(vectors))
    np.testing.assert_allclose(back, vectors, atol=1e-9)


@pytest.mark.parametrize("space", ["circle", "torus", "rotations"])
def test_latents_cluster_as_the_logits_say(space):
    chosen, rng = noneuclidean.SPACES[space], np.random.default_rng(0)
    labels = rng.integers(8, size=4_000)
    angles, centres = chosen.draw(rng, labels, 8, chosen.kappa)
    logits = (chosen.kappa * chosen.embed(angles) @ chosen.embed(centres).T).astype(np.float32)
    batch = probes.ClassBatch(logits=2 * logits, bayes_logits=logits, label=labels)
    assert over.over(probes.CrossEntropyGap(), batch)["ce_gap"] > 0
    batch = dataclasses.replace(batch, logits=logits / 2)
    assert over.over(probes.CrossEntropyGap(), batch)["ce_gap"] > 0
    # Calibrated: the probability that the posterior gives its first choice is how often that is right.
    posterior = np.asarray(jax.nn.softmax(logits))
    right = posterior.argmax(axis=1) == labels
    assert abs(right.mean() - posterior.max(axis=1).mean()) < 4 * 0.5 / 4_000**0.5


@pytest.mark.parametrize("space", ["circle", "rotations"])
def test_the_limit_of_raw_angles_is_the_closed_form(space):
    chosen = noneuclidean.SPACES[space]
    rng = np.random.default_rng(0)
    angles, _ = chosen.draw(rng, rng.integers(4_000, size=40_000), 4_000, 1e-6)  # nearly uniform
    config = noneuclidean.NonEuclidean(n_train=30_000, n_test=10_000)
    found = config.probe(chosen, chosen.embed(angles), angles)["manifold_raw_r2"]
    assert found == pytest.approx(chosen.linear_angle_r2, abs=0.02)


def test_a_map_that_hides_the_latents_is_injective_and_not_linear():
    z = von_mises_fisher.uniform(np.random.default_rng(0), 2_000, 5)
    x = classifier.mixing(np.random.default_rng(1), z)
    again = classifier.mixing(np.random.default_rng(1), z[:10])
    np.testing.assert_array_equal(x[:10], again)
    config = identifiability.VonMisesFisher(n_train=1_000, n_test=1_000)
    assert config.probe(x, z)["probe_r2"] < 0.85
    assert config.probe(classifier.mixing(np.random.default_rng(1), z, depth=0), z)["probe_r2"] > 0.999


def test_small_runs_say_which_labels_inform():
    """600 steps are far from the optimum, and enough to tell true from random labels."""
    run = identifiability.VonMisesFisher(
        arms=("true labels", "random labels"), n_classes=20, n_train=4_000, n_test=1_000, n_steps=600
    ).run()
    true, control = run.values["true labels"], run.values["random labels"]
    assert true["r2"] > max(true["r2_untrained"], control["r2"]) + 0.2
    assert 0 < true["ce_gap"] < 1.5
    assert control["ce_bayes"] == pytest.approx(math.log(20), abs=1e-5)
    assert [c.verdict for c in run.checks if "standard errors" in c.quantity] == ["pass"]
    assert run.figure is not None


def test_a_circle_is_found_as_a_circle():
    run = noneuclidean.NonEuclidean(spaces=("circle",), n_train=8_000, n_test=1_000, n_steps=600).run()
    found = run.values["circle"]
    assert found["r2_embedding"] > found["r2_embedding_untrained"] + 0.2
    assert found["r2_embedding"] > 0.85 > found["r2_angle"]
    assert found["angular_error"] < 0.3 * found["angular_error_chance"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: identifiability.VonMisesFisher(arms=("no such arm",)),
        lambda: identifiability.VonMisesFisher(arms=()),
        lambda: noneuclidean.NonEuclidean(spaces=("sphere",)),
    ],
)
def test_unknown_arms_are_refused(make):
    with pytest.raises(UserError, match="are needed"):
        make()
