"""Linear probes against lstsq on all rows, maps whose singular values are known, posteriors that are known."""

import dataclasses

import numpy as np
import pytest

from saejax.errors import UserError
from saejax.lab.metrics import identifiability, manifold_probe, over

RNG = np.random.default_rng(0)


def probe_batch(h, z, n_train):
    n = len(h)
    return identifiability.ProbeBatch(h=h, z=z, test=np.arange(n) >= n_train, row_id=np.arange(n))


def lstsq_r2(h, z, n_train):
    """Held-out R2 of each column, by lstsq on all rows at once."""
    design = np.concatenate([h, np.ones((len(h), 1))], axis=1)
    coefficients = np.linalg.lstsq(design[:n_train], z[:n_train], rcond=None)[0]
    error = z[n_train:] - design[n_train:] @ coefficients
    return 1 - (error**2).sum(0) / ((z[n_train:] - z[n_train:].mean(0)[None]) ** 2).sum(0)


def test_probe_is_that_of_lstsq():
    z = RNG.standard_normal((500, 3)) + 2
    h = np.tanh(z @ RNG.standard_normal((3, 7))) + 100 + 0.1 * RNG.standard_normal((500, 7))
    result = over.over(identifiability.LinearProbe(), probe_batch(h, z, 300), rows=64)
    expected = lstsq_r2(h, z, 300)
    np.testing.assert_allclose(result.arrays["probe_r2_per_latent"], expected, rtol=1e-7)
    assert result["probe_r2"] == pytest.approx(expected.mean())
    assert -0.3 < result["probe_r2_chance"] < 0.1
    assert 0.1 < result["probe_r2"] < 1


def test_an_affine_representation_is_read_exactly_and_an_unrelated_one_not():
    z = RNG.standard_normal((400, 4))
    linear = z @ RNG.standard_normal((4, 6)) + 3
    assert over.over(identifiability.LinearProbe(), probe_batch(linear, z, 200))["probe_r2"] == pytest.approx(1.0)
    noise = over.over(identifiability.LinearProbe(), probe_batch(RNG.standard_normal((400, 6)), z, 200))
    assert noise["probe_r2"] < 0.05 and noise["probe_r2_chance"] < 0.05 and noise["probe_r2_train"] > 0


def test_a_latent_that_does_not_vary_is_left_out():
    z = np.stack([RNG.standard_normal(100), np.full(100, 0.3)], axis=1)
    result = over.over(identifiability.LinearProbe(), probe_batch(z[:, :1], z, 50), rows=7)
    assert np.isnan(result.arrays["probe_r2_per_latent"][1])
    assert result["probe_r2"] == pytest.approx(1.0)


def test_orthogonality_of_known_maps():
    """h = z A with A orthogonal times 5: the map back has singular values 1/5; stretched ones are read off."""
    z = RNG.standard_normal((300, 4))
    q = np.linalg.qr(RNG.standard_normal((4, 4)))[0]
    result = over.over(identifiability.LinearProbe(), probe_batch(5 * z @ q, z, 200))
    assert result["orthogonality_mae"] == pytest.approx(0, abs=1e-6)
    np.testing.assert_allclose(result.arrays["probe_singular_values"], 0.2, rtol=1e-6)
    stretched = over.over(identifiability.LinearProbe(), probe_batch(z @ np.diag([1, 1, 1 / 2, 1 / 4]), z, 200))
    assert stretched["orthogonality_mae"] == pytest.approx(np.mean(np.abs(np.array([1, 1, 2, 4]) / 2 - 1)))
    assert 0.2 < result["orthogonality_mae_chance"] < 0.8


def test_a_probe_needs_both_splits():
    z = RNG.standard_normal((10, 2))
    with pytest.raises(UserError, match="test must mark some rows"):
        over.over(identifiability.LinearProbe(), probe_batch(z, z, 10))


def test_cross_entropy_gap_of_the_posterior_is_zero():
    """Labels drawn from softmax(kappa V z): their own logits have gap 0, uniform ones the entropy left."""
    z = RNG.standard_normal((4000, 3))
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    v = np.eye(3)
    logits = np.asarray(identifiability.vmf_logits(z.astype(np.float32), v.astype(np.float32), 2.0))
    p = np.exp(2 * z @ v.T)
    p /= p.sum(1, keepdims=True)
    label = (RNG.random(4000)[:, None] > p.cumsum(1)).sum(1)
    batch = identifiability.ClassBatch(logits=logits + 5, bayes_logits=logits, label=label)
    result = over.over(identifiability.CrossEntropyGap(), batch, rows=900)
    assert result["ce_gap"] == pytest.approx(0, abs=1e-5)
    assert result["ce_bayes"] == pytest.approx(-np.log(p[np.arange(4000), label]).mean(), rel=1e-5)
    assert result["ce_bayes"] == pytest.approx(-(p * np.log(p)).sum(1).mean(), rel=0.03)
    assert result["accuracy"] == result["accuracy_bayes"] == pytest.approx((p.argmax(1) == label).mean())
    blind = over.over(identifiability.CrossEntropyGap(), dataclasses.replace(batch, logits=0 * logits))
    assert blind["ce"] == pytest.approx(np.log(3)) and blind["ce_gap"] > 0.1
    share = np.bincount(label) / 4000
    assert blind["ce_chance"] == pytest.approx(-(share * np.log(share)).sum())
    assert blind["accuracy_chance"] == share.max()


def manifold_batch(h, point, n_train):
    n = len(h)
    return manifold_probe.ManifoldBatch(h=h, point=point, test=np.arange(n) >= n_train, row_id=np.arange(n))


def test_a_circle_is_read_by_its_embedding_not_by_its_angle():
    """h = (cos, sin): the embedding is exact. The best line to the angle is 2 sin, with R2 = 2 / (pi^2 / 3)."""
    angle = RNG.uniform(-np.pi, np.pi, (6000, 1))
    h = np.concatenate([np.cos(angle), np.sin(angle)], axis=1) @ RNG.standard_normal((2, 5)) + 1
    result = over.over(manifold_probe.ManifoldProbe(), manifold_batch(h, angle + 2 * np.pi, 4000), rows=500)
    assert result["manifold_r2"] == pytest.approx(1.0)
    assert result["angular_error"] == pytest.approx(0, abs=1e-6)
    assert result["manifold_raw_r2"] == pytest.approx(6 / np.pi**2, abs=0.03)
    assert result["angular_error_raw"] > 0.5
    assert result["angular_error_chance"] == pytest.approx(np.pi / 2, abs=0.1)


def test_rotations():
    """Uniform rotations, read from their columns: the mean angle between two of them is pi / 2 + 2 / pi."""
    quaternion = RNG.standard_normal((3000, 4))
    quaternion /= np.linalg.norm(quaternion, axis=1, keepdims=True)
    half = np.arctan2(np.linalg.norm(quaternion[:, 1:], axis=1), quaternion[:, 0])
    vector = quaternion[:, 1:] / np.sin(half)[:, None] * 2 * half[:, None]
    matrices = manifold_probe.rotation_matrices(vector)
    x, y, z, w = quaternion[:, 1], quaternion[:, 2], quaternion[:, 3], quaternion[:, 0]
    np.testing.assert_allclose(matrices[:, 0], 1 - 2 * (y**2 + z**2), atol=1e-12)
    np.testing.assert_allclose(matrices[:, 1], 2 * (x * y - z * w), atol=1e-12)
    h = matrices @ RNG.standard_normal((9, 9))
    result = over.over(manifold_probe.ManifoldProbe(manifold="rotations"), manifold_batch(h, vector, 2000))
    assert result["manifold_r2"] == pytest.approx(1.0)
    assert result["angular_error"] == pytest.approx(0, abs=1e-6)
    assert result["manifold_raw_r2"] < 0.95
    assert result["angular_error_chance"] == pytest.approx(np.pi / 2 + 2 / np.pi, abs=0.06)
