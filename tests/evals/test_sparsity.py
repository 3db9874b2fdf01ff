"""Counts of firing, dead and dense latents, against numpy on the dense latents."""

import numpy as np
import pytest

from saejax.errors import UserError
from saejax.evals import evaluate, metric, sparsity
from saejax.lab.metrics.over import over
from saejax.sae import base


def replay(make_sae, fires: np.ndarray, kind: str = "dense", batch_rows: int | None = None, **options):
    """Firing metrics of an SAE whose latents are exactly the 0/1 pattern `fires` [rows, latents]."""
    n = fires.shape[1]
    eye, zero = np.eye(n, dtype=np.float32), np.zeros(n, np.float32)
    sae = make_sae(kind, d_in=n, d_sae=n, k=n, W_enc=eye, b_enc=zero, W_dec=eye, b_dec=zero)
    return evaluate.evaluate_rows(sae, [fires.astype(np.float32)], (sparsity.Firing(**options),), batch_rows=batch_rows)


def brute_force_dead(fires: np.ndarray, window: int) -> float:
    """Slides the window over the rows one by one."""
    silent = [~fires[i : i + window].any(0) for i in range(len(fires) - window + 1)]
    return float(np.mean(silent))


def test_against_numpy(sae, forward, rows):
    result = evaluate.evaluate_rows(sae, [rows], (sparsity.Firing(windows=()),), batch_rows=32)
    latents, _ = forward(sae, rows)
    fires = latents > 0
    rate = fires.mean(0)
    assert result["l0"] == pytest.approx(fires.sum(1).mean(), rel=1e-12)
    assert result["dead_share"] == (rate == 0).mean() and result["dense_share"] == (rate > 0.1).mean()
    np.testing.assert_array_equal(result.arrays["firing_rate"], rate)
    edges = result.arrays["log10_density_edges"]
    wanted, _ = np.histogram(np.log10(rate[rate > 0]), bins=edges)
    np.testing.assert_array_equal(result.arrays["log10_density_hist"], wanted)
    assert result.arrays["log10_density_hist"].sum() == (rate > 0).sum()


@pytest.mark.parametrize("kind", ["dense", "sparse"])
@pytest.mark.parametrize("batch_rows", [16, 100])
def test_dead_windows_against_sliding_one_by_one(make_sae, kind, batch_rows):
    """Latents from always to never firing, bursts, and edges that fire only on the first and on the last row."""
    rng = np.random.default_rng(0)
    fires = rng.random((301, 12)) < np.array([1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0, 0, 0, 0])
    fires[120:180, 8] = True
    fires[0, 9] = fires[-1, 10] = True
    windows = (7, 40, 300, 301, 302)
    result = replay(make_sae, fires, kind, batch_rows, windows=windows)
    for w in windows[:-1]:
        assert result[f"dead_fraction_{w}_tokens"] == pytest.approx(brute_force_dead(fires, w), rel=1e-12), w
    assert result["dead_fraction_301_tokens"] == result["dead_share"] == 1 / 12
    assert "dead_fraction_302_tokens" not in result and "dead_fraction_302_tokens" not in result.definitions


def test_the_latent_made_dead_is_the_one_reported(sae, rows):
    params = sae.params
    sae.params = params.replace(b_enc=params.b_enc.at[:].set(1.0).at[11].set(-1e9))
    sae.params = sae.params.replace(W_enc=params.W_enc * 0.01)
    result = evaluate.evaluate_rows(sae, [np.tile(rows, (4, 1))], (sparsity.Firing(windows=(100,)),), batch_rows=64)
    never = np.flatnonzero(result.arrays["firing_rate"] == 0)
    assert 11 in never
    if sae.config.name == "test-dense":
        assert never.tolist() == [11] and result["dead_share"] == 1 / 16
        assert result["dead_fraction_1e2_tokens"] == 1 / 16 and result["dense_share"] == 15 / 16


def test_window_keys_and_default_windows(make_sae):
    result = replay(make_sae, np.ones((50, 3), bool))
    assert set(result) == {"l0", "dead_share", "dense_share", "dense_share_1pct"}
    assert set(sparsity.Firing().definitions()) >= {
        "dead_fraction_1e5_tokens",
        "dead_fraction_1e6_tokens",
        "dead_fraction_1e7_tokens",
    }


def test_a_rate_below_the_histogram_is_in_its_first_bin():
    state = sparsity.FiringState(
        rows=np.int64(10**12), count=np.array([1]), lead=np.array([5]), trail=np.array([10**12 - 6]),
        silent=np.zeros((0, 1), np.int64),
    )  # fmt: skip
    assert sparsity.Firing(windows=()).compute(state)["log10_density_hist"][0] == 1


def test_settings_out_of_range_are_refused():
    with pytest.raises(UserError, match="eval.windows"):
        sparsity.Firing(windows=(1,))
    with pytest.raises(UserError, match="eval.dense_above"):
        sparsity.Firing(dense_above=1.0)


@pytest.mark.parametrize("batch_rows", [13, None])
def test_activity_against_numpy(sae, forward, rows, batch_rows):
    quantiles = (0.05, 0.33, 0.5, 1.0)
    result = evaluate.evaluate_rows(sae, [rows], (sparsity.Activity(quantiles=quantiles),), batch_rows=batch_rows)
    latents, _ = forward(sae, rows)
    l0 = (latents > 0).sum(1)
    for q in quantiles:
        key = f"l0_q{round(100 * q):02d}"
        assert result[key] == np.quantile(l0, q, method="inverted_cdf"), key
    length = np.linalg.norm(np.asarray(sae.params.W_dec, np.float64), axis=1)
    assert result["l1"] == pytest.approx(latents.sum(1).mean(), rel=1e-5)
    assert result["l1_scaled"] == pytest.approx((latents * length).sum(1).mean(), rel=1e-5)
    hist = result.arrays["l0_hist"]
    np.testing.assert_array_equal(hist, np.bincount(l0, minlength=len(hist)))


def test_latents_almost_off_show_in_the_second_count(make_sae):
    fires = np.zeros((10, 4), np.float32)
    fires[:, 0], fires[:, 1] = 1.0, 1e-7
    eye, zero = np.eye(4, dtype=np.float32), np.zeros(4, np.float32)
    sae = make_sae("dense", d_in=4, d_sae=4, W_enc=eye, b_enc=zero, W_dec=eye, b_dec=zero)
    result = evaluate.evaluate_rows(sae, [fires], (sparsity.Firing(windows=()), sparsity.Activity()))
    assert result["l0"] == 2.0 and result["l0_above_1em6"] == 1.0


def test_negative_latents_count_by_their_size():
    latents, eye = np.array([[-2.0, 0.0], [1.0, -3.0]], np.float32), np.eye(2, dtype=np.float32)
    encoding = base.Encoding(latents=latents, d_sae=2)
    batch = metric.EvalBatch(
        x=latents, recon=latents, encoding=encoding, weight=np.ones(2, np.float32), W_dec=2 * eye, b_dec=eye[0]
    )
    found = over(sparsity.Activity(), batch)
    assert (found["l0_above_1em6"], found["l1"], found["l1_scaled"]) == (1.5, 3.0, 6.0)
