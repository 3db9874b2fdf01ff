"""The knee of curves whose knee is known in closed form."""

import numpy as np
import pytest

from saejax.errors import UserError
from saejax.evals import knee as module
from saejax.evals.knee import knee


def test_two_straight_lines_bend_where_they_meet():
    x = np.arange(11.0)
    y = np.where(x < 4, 10 - 2 * x, 2 - (x - 4) / 6)
    found = knee(x, y)
    assert found["knee_index"] == 4 and found["knee_x"] == 4.0 and found["knee_y"] == 2.0
    # Chord at 4 of 10: 0.6; the curve there: (2 - 1) / (10 - 1).
    assert found["knee_depth"] == pytest.approx(0.6 - 1 / 9)
    assert found["knee_x_low"] <= 4.0 <= found["knee_x_high"]


def test_hyperbola_in_closed_form():
    """y = 1/x on [1/4, 4]: slope of the chord -1, so the knee is where -1/x^2 = -1."""
    x = np.geomspace(0.25, 4, 41)
    assert knee(x, 1 / x)["knee_x"] == pytest.approx(1.0)


def test_a_loss_that_rises_with_the_coefficient():
    x = np.arange(9.0)
    assert knee(x, np.maximum(x - 5, 0) ** 2 + 0.01 * x)["knee_x"] == pytest.approx(5.0, abs=1)


def test_order_of_the_sweep_does_not_matter_and_the_index_is_the_callers():
    x = np.arange(11.0)
    y = np.where(x < 4, 10 - 2 * x, 2 - (x - 4) / 6)
    order = np.random.default_rng(0).permutation(11)
    found = knee(x[order], y[order])
    assert order[int(found["knee_index"])] == 4 and found["knee_x"] == 4.0


def test_one_bad_run_does_not_make_a_knee():
    """A point that failed to train lies above its neighbours; the envelope passes under it."""
    x = np.arange(11.0)
    y = np.where(x < 4, 10 - 2 * x, 2 - (x - 4) / 6)
    y[7] = 9
    assert knee(x, y)["knee_x"] == 4.0


def test_a_straight_or_flat_or_concave_curve_has_none():
    x = np.arange(6.0)
    for y in (-x, np.ones(6), -(x**2)):
        found = knee(x, y, bootstrap=10)
        assert found["knee_index"] == -1 and np.isnan(found["knee_x"]) and found["knee_found_share"] == 0


def test_the_interval_widens_with_the_noise_of_the_runs():
    x = np.arange(21.0)
    y = np.exp(-x / 4)
    rng = np.random.default_rng(0)
    widths = []
    for noise in (0.002, 0.1):
        found = knee(x, y[None, :] + noise * rng.standard_normal((8, 21)), seed=1)
        widths.append(found["knee_x_high"] - found["knee_x_low"])
        assert found["knee_x_low"] <= found["knee_x"] <= found["knee_x_high"]
    assert widths[0] <= 1 < widths[1]
    assert knee(x, y, seed=3) == knee(x, y, seed=3) and set(found) == set(module.DEFINITIONS)


@pytest.mark.parametrize(
    "x, y, message",
    [
        (np.arange(3.0), np.arange(4.0), "y must be"),
        (np.ones(5), np.arange(5.0), "3 different values, got 1"),
        (np.arange(3.0), np.array([1, np.nan, 0]), "finite"),
    ],
)
def test_bad_sweeps_are_named(x, y, message):
    with pytest.raises(UserError, match=message):
        knee(x, y)
