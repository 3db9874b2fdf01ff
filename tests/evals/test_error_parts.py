"""Effective dimension, the parts of the error, normalisers: closed forms and numpy."""

import jax.numpy as jnp
import numpy as np
import pytest

from saejax.activations import normalize
from saejax.errors import UserError
from saejax.evals import metric
from saejax.lab.metrics import dark_matter, dimension, normaliser
from saejax.lab.metrics.over import over
from saejax.sae import base


def batch_of(x, recon):
    """A batch whose codes do not matter."""
    n, d = x.shape
    encoding = base.Encoding(latents=np.zeros((n, 1), np.float32), d_sae=1)
    return metric.EvalBatch(
        x=x.astype(np.float32), recon=recon.astype(np.float32), encoding=encoding, weight=np.ones(n, np.float32),
        W_dec=np.zeros((1, d), np.float32), b_dec=np.zeros(d, np.float32),
    )  # fmt: skip


def test_effective_dimension_of_known_spectra():
    rng = np.random.default_rng(0)
    q = np.linalg.qr(rng.standard_normal((2000, 6)) - 0)[0]
    q = np.linalg.qr(q - q.mean(0))[0]  # exactly uncorrelated columns
    for sizes, wanted in (([1] * 6, 6.0), ([1, 1, 0, 0, 0, 0], 2.0), ([3, 1, 0, 0, 0, 0], 100 / 82)):
        x = 1000 * q * np.array(sizes) + 50.0
        found = over(dimension.EffectiveDimension(), batch_of(x, x), rows=300)
        assert found["effective_dimension"] == pytest.approx(wanted, rel=1e-4)


def test_finite_rows_lower_it_as_stated():
    x = np.random.default_rng(0).standard_normal((100, 40))
    found = over(dimension.EffectiveDimension(), batch_of(x, x))
    assert found["effective_dimension"] == pytest.approx(found["effective_dimension_isotropic"], rel=0.03)
    assert found["effective_dimension_isotropic"] < 30


def test_margins_by_hand():
    found = dimension.dimension_margins(768, 10, 2.3e34)
    assert found["margin_sensing"] == pytest.approx(1.0, rel=2e-3)  # what constant 1 allows for 768 dimensions
    assert found["margin_sensing_twice"] == pytest.approx(found["margin_sensing"] / 2)
    assert dimension.dimension_margins(768, 10, 2.2e7)["margin_top_k"] == pytest.approx(1.0, rel=2e-3)
    assert dimension.dimension_margins(100, 10, 50, statistical_dimension=40.0)["margin_statistical"] == 2.5
    assert dimension.dimension_margins(100, 10, 50)["superposed"] == 0.0
    with pytest.raises(UserError, match="k < n"):
        dimension.dimension_margins(10, 5, 5)


def test_error_parts_against_least_squares():
    rng = np.random.default_rng(1)
    x = rng.standard_normal((300, 4)) @ rng.standard_normal((4, 4)) + 3
    error = 0.2 * x @ rng.standard_normal((4, 4)) + 0.5 * np.tanh(x) + 0.3 * rng.standard_normal((300, 4)) + 1
    found = over(dark_matter.DarkMatter(), batch_of(x, x - error), rows=64)
    design = np.concatenate([x, np.ones((300, 1))], axis=1)
    rest = error - design @ np.linalg.lstsq(design, error, rcond=None)[0]
    about_mean, spread = ((error - error.mean(0)) ** 2).sum(), ((x - x.mean(0)) ** 2).sum()
    assert found["error_linear_r2"] == pytest.approx(1 - (rest**2).sum() / about_mean, rel=1e-4)
    assert found["fvu_nonlinear_error"] == pytest.approx((rest**2).sum() / spread, rel=1e-4)
    parts = sum(found[f"fvu_{part}_error"] for part in ("constant", "linear", "nonlinear"))
    assert parts == pytest.approx((error**2).sum() / spread, rel=1e-5)


def test_a_shrunk_reconstruction_is_all_linear_and_noise_none():
    rng = np.random.default_rng(2)
    x = rng.standard_normal((400, 5))
    shrunk = over(dark_matter.DarkMatter(), batch_of(x, 0.8 * x))
    assert shrunk["error_linear_r2"] == pytest.approx(1.0, abs=1e-5)
    assert shrunk["fvu_linear_error"] == pytest.approx(0.04, rel=1e-4)
    noise = over(dark_matter.DarkMatter(), batch_of(x, x - rng.standard_normal(x.shape)))
    # In-sample R^2 of unrelated errors: mean 5 / 399, and a standard deviation of about a fifth of it.
    assert noise["error_linear_r2"] == pytest.approx(noise["error_linear_r2_chance"], rel=0.8)
    assert noise["error_linear_r2_chance"] == pytest.approx(5 / 399)


def test_constant_dimensions_are_left_out():
    x = np.random.default_rng(3).standard_normal((100, 3))
    x[:, 2] = 4.0
    found = over(dark_matter.DarkMatter(), batch_of(x, 0.5 * x))
    assert found["error_linear_r2"] == pytest.approx(1.0, abs=1e-5)
    assert found["error_linear_r2_chance"] == pytest.approx(2 / 99)


def test_our_normaliser_can_be_undone_and_a_bad_one_is_seen():
    x = (np.random.default_rng(0).standard_normal((50, 8)) * 20 + 100).astype(np.float32)
    norm = normalize.estimate(jnp.asarray(x), normalize.NormMode.unit, center=True)
    there = (x - norm.mean[None, :]) * norm.scale
    found = over(
        normaliser.RoundTrip(), normaliser.RoundTripBatch(x=x, returned=there / norm.scale + norm.mean[None, :])
    )
    assert found["round_trip_relative"] <= 1e-5
    spoilt = x.copy()
    spoilt[31, 2] += 5
    found = over(normaliser.RoundTrip(), normaliser.RoundTripBatch(x=x, returned=spoilt), rows=7)
    assert found["round_trip_max"] == pytest.approx(5.0, rel=1e-5)
    assert found["round_trip_relative"] == pytest.approx(5.0 / np.abs(x).max(), rel=1e-5)
