"""The normaliser against closed forms; the geometric median against brute force."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize

from saejax.activations import normalize
from saejax.activations.normalize import NormalizeConfig, NormMode
from saejax.errors import UserError

RNG = np.random.default_rng(0)
ROWS = (RNG.standard_normal((500, 12)) * 3 + RNG.standard_normal(12) * 20).astype(np.float32)


@pytest.mark.parametrize("center", [False, True])
def test_sqrt_d_gives_the_average_row_norm_sqrt_d(center):
    normalizer = normalize.estimate(ROWS, NormMode.sqrt_d, center=center)
    y = normalize.apply(normalizer, ROWS)
    np.testing.assert_allclose(np.linalg.norm(y, axis=1).mean(), np.sqrt(12), rtol=1e-5)


@pytest.mark.parametrize("center", [False, True])
def test_unit_gives_mean_square_norm_one(center):
    y = normalize.apply(normalize.estimate(ROWS, NormMode.unit, center=center), ROWS)
    np.testing.assert_allclose(np.square(y).sum(1).mean(), 1, rtol=1e-5)


@pytest.mark.parametrize("mode", [NormMode.none, NormMode.sqrt_d, NormMode.unit])
def test_centre_is_the_mean_even_far_from_zero(mode):
    rows = ROWS.astype(np.float64) + 1e4
    normalizer = normalize.estimate(rows.astype(np.float32), mode, center=True)
    # Rows near 1e4 are themselves rounded to 1e4 * 2^-24 = 6e-4; the mean may not be worse.
    np.testing.assert_allclose(normalizer.mean, rows.mean(0), atol=1.3e-3)


def test_none_without_centre_is_the_identity():
    normalizer = normalize.estimate(ROWS, NormMode.none)
    np.testing.assert_array_equal(normalize.apply(normalizer, ROWS), ROWS)


def test_known_two_rows():
    rows = jnp.array([[3.0, 4.0], [0.0, 15.0]])  # norms 5 and 15
    assert float(normalize.estimate(rows, NormMode.sqrt_d).scale) == pytest.approx(np.sqrt(2) / 10)
    assert float(normalize.estimate(rows, NormMode.unit).scale) == pytest.approx(1 / np.sqrt((25 + 225) / 2))


def test_invert_undoes_apply():
    normalizer = normalize.estimate(ROWS, NormMode.sqrt_d, center=True)
    back = normalize.invert(normalizer, normalize.apply(normalizer, ROWS))
    # x - mean, * scale, / scale, + mean: four roundings of numbers up to max |x|.
    np.testing.assert_allclose(back, ROWS, atol=4 * np.abs(ROWS).max() * 2**-23)


def test_bfloat16_rows_come_out_as_float32():
    normalizer = normalize.estimate(ROWS.astype(jnp.bfloat16), NormMode.sqrt_d, center=True)
    y = normalize.apply(normalizer, jnp.asarray(ROWS, jnp.bfloat16))
    assert y.dtype == normalizer.mean.dtype == normalizer.scale.dtype == jnp.float32
    np.testing.assert_allclose(np.linalg.norm(y, axis=1).mean(), np.sqrt(12), rtol=1e-5)


def test_rows_without_scale_are_refused():
    with pytest.raises(UserError, match="normalize.mode = unit"):
        normalize.estimate(jnp.ones((10, 3)), NormMode.unit, center=True)
    with pytest.raises(UserError, match="normalize.mode = sqrt_d"):
        normalize.estimate(jnp.full((10, 3), jnp.nan), NormMode.sqrt_d)
    with pytest.raises(UserError, match="normalize.rows = 0"):
        NormalizeConfig(rows=0)


def test_geometric_median_is_the_minimum_found_by_brute_force():
    rows = RNG.standard_t(2, (200, 4)) * [1, 2, 3, 4] + [5, 0, -5, 0]

    def cost(point):
        return np.linalg.norm(rows - point, axis=1).sum()

    best = minimize(cost, rows.mean(0), method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12, "maxiter": 9999})
    median = np.asarray(normalize.geometric_median(jnp.asarray(rows, jnp.float32)), np.float64)
    assert cost(median) <= cost(best.x) * (1 + 1e-9)
    np.testing.assert_allclose(median, best.x, atol=1e-4)


def test_geometric_median_of_a_triangle_is_its_fermat_point():
    corners = jnp.array([[0.0, 0.0], [1.0, 0.0], [0.5, np.sqrt(3) / 2]])
    np.testing.assert_allclose(normalize.geometric_median(corners), [0.5, np.sqrt(3) / 6], atol=1e-6)


def test_geometric_median_ignores_a_sink_and_survives_meeting_a_row():
    rows = np.concatenate([RNG.standard_normal((999, 8)), np.full((1, 8), 1e4)]).astype(np.float32)
    median = np.asarray(normalize.geometric_median(rows))
    assert np.linalg.norm(rows.mean(0)) > 20 and np.linalg.norm(median) < 0.2
    np.testing.assert_array_equal(normalize.geometric_median(jnp.ones((5, 3))), np.ones(3))
