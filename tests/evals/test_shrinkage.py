"""Shrinkage of known size, measured."""

import numpy as np
import pytest

from saejax.evals import evaluate, shrinkage
from saejax.lab.metrics.over import over

METRICS = (shrinkage.Norms(), shrinkage.Gain())


def identity(make_sae, scale: float = 1.0, bias: float = 0.0, kind: str = "dense", d: int = 6, threshold: float = 0.0):
    """latents = relu(x - bias - threshold), recon = scale * latents + bias: exact for positive x - bias."""
    eye = np.eye(d, dtype=np.float32)
    b_enc = np.full(d, -bias - threshold, np.float32)
    b_dec = np.full(d, bias, np.float32)
    return make_sae(kind, d_in=d, d_sae=d, k=d, W_enc=eye, b_enc=b_enc, W_dec=scale * eye, b_dec=b_dec)


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_an_sae_scaled_by_nine_tenths(make_sae, kind):
    x = np.random.default_rng(0).random((100, 6), np.float32) + 0.1
    result = evaluate.evaluate_rows(identity(make_sae, 0.9, kind=kind), [x], METRICS, batch_rows=32)
    assert result["l2_ratio"] == pytest.approx(0.9, rel=1e-6)
    assert result["relative_reconstruction_bias"] == pytest.approx(0.9, rel=1e-6)
    assert result["gain_shared"] == pytest.approx(1 / 0.9, rel=1e-6)
    np.testing.assert_allclose(result.arrays["gain"], 1 / 0.9, rtol=1e-5)
    assert result["gain_median"] == pytest.approx(1 / 0.9, rel=1e-5)


def test_bias_hides_shrinkage_from_the_ratios_but_not_from_the_gains(make_sae):
    """Latents shrunk by 0.9 around a large mean: whole vectors hardly change, the gains say what is wrong."""
    x = np.random.default_rng(0).random((100, 6), np.float32) + 10.0
    result = evaluate.evaluate_rows(identity(make_sae, 0.9, bias=10.0), [x], METRICS)
    assert result["l2_ratio"] > 0.99 and result["relative_reconstruction_bias"] > 0.99
    assert result["gain_shared"] == pytest.approx(1 / 0.9, rel=1e-4)
    np.testing.assert_allclose(result.arrays["gain"], 1 / 0.9, rtol=1e-4)


def test_soft_threshold_of_exponential_amplitudes(make_sae):
    """One feature, amplitudes Exp(1), threshold t: gamma = 2 / (2 + t); gain = E[f z] / E[f^2] = 1 + t / 2.

    With f = z - t on z > t, f is Exp(1) again: E f^2 = 2 e^-t, E[f z] = (2 + t) e^-t. 200,000 draws: the standard error
    of both is about 0.005.
    """
    t, n = 0.4, 200_000
    x = np.random.default_rng(0).exponential(size=(n, 1)).astype(np.float32)
    result = evaluate.evaluate_rows(identity(make_sae, d=1, threshold=t), [x], METRICS, batch_rows=50_000)
    assert result["relative_reconstruction_bias"] == pytest.approx(2 / (2 + t), abs=0.01)
    assert result.arrays["gain"][0] == pytest.approx(1 + t / 2, abs=0.01)
    f = np.maximum(x.astype(np.float64) - t, 0)
    assert result["relative_reconstruction_bias"] == pytest.approx((f**2).sum() / (f * x).sum(), rel=1e-5)
    assert result["l2_ratio"] == pytest.approx((f / x).mean(), rel=1e-5)


def test_gain_minimises_the_error_latent_by_latent(sae, forward, rows):
    result = evaluate.evaluate_rows(sae, [rows], METRICS, batch_rows=50)
    x, d = rows.astype(np.float64), np.asarray(sae.params.W_dec, np.float64)
    latents, recon = forward(sae, x)
    for j in range(16):
        if not latents[:, j].any():
            assert np.isnan(result.arrays["gain"][j])
            continue
        part = np.outer(latents[:, j], d[j])
        best = np.linalg.lstsq(part.reshape(-1, 1), (x - recon + part).ravel(), rcond=None)[0][0]
        assert result.arrays["gain"][j] == pytest.approx(best, rel=1e-4, abs=1e-4)
    part = recon - np.asarray(sae.params.b_dec)
    shared = np.linalg.lstsq(part.reshape(-1, 1), (x - np.asarray(sae.params.b_dec)).ravel(), rcond=None)[0][0]
    assert result["gain_shared"] == pytest.approx(shared, rel=1e-5)


def test_three_numbers_are_three_numbers(sae, forward, rows):
    result = evaluate.evaluate_rows(sae, [rows], METRICS, batch_rows=50)
    x = rows.astype(np.float64)
    _, recon = forward(sae, x)
    ratio = np.linalg.norm(recon, axis=1) / np.linalg.norm(x, axis=1)
    assert result["l2_ratio"] == pytest.approx(ratio.mean(), rel=1e-5)
    assert result["relative_reconstruction_bias"] == pytest.approx((recon**2).sum() / (x * recon).sum(), rel=1e-5)


def test_rows_of_zeros_have_no_ratio(make_sae):
    x = np.concatenate([np.ones((5, 6)), np.zeros((3, 6))]).astype(np.float32)
    assert evaluate.evaluate_rows(identity(make_sae, 0.5), [x], METRICS)["l2_ratio"] == pytest.approx(0.5)


def test_line_of_the_norms(sae, forward, rows):
    result = evaluate.evaluate_rows(sae, [rows], (shrinkage.NormSlope(),), batch_rows=50)
    _, recon = forward(sae, rows)
    lengths = np.linalg.norm(rows.astype(np.float64), axis=1), np.linalg.norm(recon, axis=1)
    slope, intercept = np.polyfit(*lengths, 1)
    assert result["norm_slope"] == pytest.approx(slope, rel=1e-4)
    assert result["norm_intercept"] == pytest.approx(intercept, rel=1e-4)


def test_refinement_of_a_soft_threshold_on_an_orthonormal_dictionary():
    """Refitting z - t on its support gives z back: the ratio of sums is 1 - t n / sum z, latent by latent."""
    t = 0.3
    z = np.random.default_rng(0).exponential(size=(500, 3)).astype(np.float32)
    z[:, 2] = 0.0
    shrunk, support = np.maximum(z - t, 0), z > t
    result = over(shrinkage.RefinementRatio(), shrinkage.RefitBatch(latents=shrunk, refit=z * support), rows=64)
    wanted = 1 - t * support[:, :2].sum(0) / (z * support)[:, :2].sum(0)
    np.testing.assert_allclose(result.arrays["refinement_ratio"][:2], wanted, rtol=1e-5)
    assert np.isnan(result.arrays["refinement_ratio"][2])
    assert result["refinement_ratio_median"] == pytest.approx(np.median(wanted), rel=1e-5)
    assert result["refinement_ratio_shared"] == pytest.approx(shrunk.sum() / (z * support).sum(), rel=1e-5)
