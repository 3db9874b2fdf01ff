"""Squared error, FVU and cosine against numpy in float64, where float32 is easy and where it is hard."""

import numpy as np
import pytest

from saejax.evals import evaluate, reconstruction

METRICS = (reconstruction.Reconstruction(), reconstruction.FvuBatchLegacy(), reconstruction.EvLegacy())


def test_against_numpy(sae, forward, rows):
    result = evaluate.evaluate_rows(sae, [rows], METRICS, batch_rows=50)
    x = rows.astype(np.float64)
    _, recon = forward(sae, x)
    error, centred = ((x - recon) ** 2).sum(1), ((x - x.mean(0)) ** 2).sum(1)

    def cosine(a, b):
        return ((a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))).mean()

    per_batch = [
        error[i : i + 50].sum() / ((x[i : i + 50] - x[i : i + 50].mean(0)) ** 2).sum() for i in range(0, 211, 50)
    ]
    ev_rows = np.concatenate(
        [1 - error[i : i + 50] / ((x[i : i + 50] - x[i : i + 50].mean(0)) ** 2).sum(1) for i in range(0, 211, 50)]
    )
    wanted = {
        "mse": error.mean(),
        "mse_mean_baseline": centred.mean(),
        "fvu": error.sum() / centred.sum(),
        "cosine": cosine(x, recon),
        "cosine_mean_baseline": cosine(x, x.mean(0)),
        "fvu_batch_legacy": np.mean(per_batch),
        "r2": 1 - error.sum() / centred.sum(),
        "fvu_uncentred": error.sum() / (x**2).sum(),
        "nmse": (error / (x**2).sum(1)).mean(),
        "ev_legacy": np.mean(ev_rows),
    }
    assert set(result) == set(wanted)
    for key, value in wanted.items():
        assert result[key] == pytest.approx(value, rel=2e-6), key


def test_predicting_the_mean_is_the_baseline(make_sae, rows):
    """An SAE whose latents never fire and whose bias is the mean of the rows."""
    sae = make_sae(b_enc=np.full(16, -1e9, np.float32), b_dec=rows.mean(0))
    result = evaluate.evaluate_rows(sae, [rows], METRICS[:1], batch_rows=64)
    assert result["fvu"] == pytest.approx(1.0, rel=1e-6)
    assert result["mse"] == pytest.approx(result["mse_mean_baseline"], rel=1e-6)
    assert result["cosine"] == pytest.approx(result["cosine_mean_baseline"], rel=1e-6)


def test_perfect_reconstruction(make_sae):
    """relu(x) - relu(-x) = x, with exact arithmetic on small integers."""
    both = np.concatenate([np.eye(6), -np.eye(6)]).astype(np.float32)
    sae = make_sae(d_sae=12, W_enc=both.T, b_enc=np.zeros(12, np.float32), W_dec=both, b_dec=np.zeros(6, np.float32))
    rows = np.random.default_rng(0).integers(-4, 5, (40, 6)).astype(np.float32)
    result = evaluate.evaluate_rows(sae, [rows], METRICS)
    assert result["mse"] == 0.0 and result["fvu"] == 0.0 and result["fvu_batch_legacy"] == 0.0
    assert result["cosine"] == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("offset", [1e2, 1e4])
def test_a_mean_far_from_zero_costs_no_accuracy(make_sae, offset):
    """|mean|^2 / variance is 1e4 and 1e8, which E x^2 - (E x)^2 in float32 would not survive.

    The rows as float32 hold are the truth; what remains is the rounding of row minus mean, about 6e-8 * offset a
    coordinate, whose square is 4e-7 of the variance at worst.
    """
    x = (np.random.default_rng(0).standard_normal((3000, 6)) + offset).astype(np.float32)
    centre = (x[:100].astype(np.float64).mean(0) + 0.3).astype(np.float32)
    sae = make_sae(b_enc=np.full(16, -1e9, np.float32), b_dec=centre)
    result = evaluate.evaluate_rows(sae, [x], METRICS[:1], batch_rows=128)
    exact = x.astype(np.float64)
    spread = ((exact - exact.mean(0)) ** 2).sum()
    assert result["mse_mean_baseline"] == pytest.approx(spread / 3000, rel=1e-5)
    assert result["fvu"] == pytest.approx(((exact - centre.astype(np.float64)) ** 2).sum() / spread, rel=1e-5)


def test_legacy_fvu_depends_on_the_batch_and_the_global_one_does_not(sae, rows):
    small, large = (evaluate.evaluate_rows(sae, [rows], METRICS, batch_rows=n) for n in (4, 211))
    assert small["fvu"] == pytest.approx(large["fvu"], rel=1e-6)
    assert small["fvu_batch_legacy"] > 1.1 * large["fvu_batch_legacy"]
    assert large["fvu_batch_legacy"] == pytest.approx(large["fvu"], rel=1e-6)


def test_constant_rows_have_no_variance_to_explain(sae):
    result = evaluate.evaluate_rows(sae, [np.ones((8, 6), np.float32)], METRICS)
    assert np.isnan(result["fvu"]) and np.isnan(result["fvu_batch_legacy"])
