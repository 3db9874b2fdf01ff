"""Closed forms against brute force, quadrature, convex geometry and each other."""

import math

import numpy as np
import pytest
from scipy import integrate, special, stats

from saejax.errors import UserError
from saejax.lab.codes import capacity, gaussian, rules


@pytest.mark.parametrize("n_atoms, k", [(10, 3), (20, 20), (52, 5)])
def test_entropy_counts_the_subsets(n_atoms, k):
    assert capacity.entropy_bits(n_atoms, k) == pytest.approx(math.log2(math.comb(n_atoms, k)), abs=1e-9)
    assert capacity.entropy_bits_approximate(n_atoms, k) >= capacity.entropy_bits(n_atoms, k)


@pytest.mark.parametrize("k, error", [(2**8, 0.00156), (2**7, 0.00262), (100, 0.00316)])
def test_error_of_the_approximate_entropy(k, error):
    exact = math.log2(math.comb(2**20, k))
    assert capacity.entropy_bits_approximate(2**20, k) / exact - 1 == pytest.approx(error, abs=1e-5)


def test_capacity_per_dimension():
    bits = [capacity.capacity(e / 10) / math.log(2) for e in range(10)]
    published = [0.7213, 0.3747, 0.2755, 0.2108, 0.1624, 0.1238, 0.0916, 0.0642, 0.0402, 0.0190]
    np.testing.assert_allclose(bits, published, atol=1e-4)


def test_kappa_is_what_the_balanced_threshold_needs():
    """d = kappa k ln N makes both tail exponents equal their union bounds: (1-t)^2 d/2k = ln k, t^2 d/2k = ln N."""
    n_atoms, k = 2**20, 64
    t = capacity.optimal_threshold(n_atoms, k)
    d = capacity.kappa(capacity.sparsity_exponent(n_atoms, k)) * k * math.log(n_atoms)
    assert (1 - t) ** 2 * d / (2 * k) == pytest.approx(math.log(k))
    assert t**2 * d / (2 * k) == pytest.approx(math.log(n_atoms))


def test_map_threshold_is_where_the_posterior_is_even():
    n_atoms, k, d = 1000, 10, 200
    at = capacity.map_threshold(n_atoms, k, d)
    on, off = (stats.norm.pdf(at, mean, math.sqrt(k / d)) for mean in (1, 0))
    assert on * k / n_atoms == pytest.approx(off * (1 - k / n_atoms))


@pytest.mark.parametrize("nonneg", [True, False])
def test_statistical_dimension_is_the_distance_to_the_subdifferential(nonneg):
    """delta = min_t E dist(g, t * subdifferential of the norm)^2, by Monte Carlo over standard normal g."""
    n_atoms, k = 60, 6
    g = np.random.default_rng(0).standard_normal((20_000, n_atoms))
    best = math.inf
    for t in np.linspace(0.5, 2.5, 41):
        off = np.maximum(g[:, k:] - t, 0) if nonneg else np.maximum(np.abs(g[:, k:]) - t, 0)
        best = min(best, float((((g[:, :k] - t) ** 2).sum(1) + (off**2).sum(1)).mean()))
    # Standard error of the mean is below 0.1; the grid over t costs less.
    assert capacity.statistical_dimension(n_atoms, k, nonneg=nonneg) == pytest.approx(best, abs=0.5)


@pytest.mark.parametrize(
    "n_atoms, k, signed, nonneg", [(2**20, 256, 2986, 2705), (2**14, 16, 151.9, 135.2), (2**12, 64, 353.9, 298.6)]
)
def test_statistical_dimension_values(n_atoms, k, signed, nonneg):
    assert capacity.statistical_dimension(n_atoms, k, nonneg=False) == pytest.approx(signed, rel=3e-4)
    assert capacity.statistical_dimension(n_atoms, k) == pytest.approx(nonneg, rel=3e-4)


def test_awgn_bounds_agree_with_each_other_but_not_with_the_printed_proposition():
    for noise in (0.1, 1.0, 10.0):
        needed = capacity.awgn_dim_lower_bound(2**30, noise, 1e-6)
        sufficient = capacity.awgn_dims_sufficient(2**30, noise, slack=0.01)
        assert needed < sufficient
    assert 2.01 * 0.1 * math.log(2**30) < capacity.awgn_dim_lower_bound(2**30, 0.1, 1e-6)
    assert capacity.awgn_dims_sufficient(2**14, 1e6) == pytest.approx(2e6 * math.log(2**14), rel=1e-5)


def test_gaussian_top_k_is_the_probability_of_separation():
    """Against an independent quadrature over the largest inactive score."""
    n_atoms, k, d = 200, 5, 60
    sd_on, sd_off = math.sqrt((k - 1) / d), math.sqrt(k / d)

    def integrand(t):
        density = (n_atoms - k) * stats.norm.pdf(t, 0, sd_off) * stats.norm.cdf(t, 0, sd_off) ** (n_atoms - k - 1)
        return density * stats.norm.sf(t, 1, sd_on) ** k

    expected = integrate.quad(integrand, -1, 3, limit=200)[0]
    assert gaussian.top_k_success(n_atoms, k, d) == pytest.approx(expected, abs=1e-6)


def test_gaussian_threshold_is_a_product_of_tails():
    n_atoms, k, d = 100, 4, 50
    expected = special.ndtr(0.5 * math.sqrt(d / 3)) ** 4 * special.ndtr(0.5 * math.sqrt(d / 4)) ** 96
    assert gaussian.threshold_success(n_atoms, k, d) == pytest.approx(expected)
    assert gaussian.top_k_success(n_atoms, k, d) > expected


def test_no_dimension_is_needed_where_a_guess_succeeds():
    assert gaussian.dims_for(lambda d: gaussian.threshold_success(2, 1, d), 0.4) == 0


@pytest.mark.parametrize("k", [1, 2, 64])
def test_inverse_of_the_success_formulas(k):
    for success in (gaussian.top_k_success, gaussian.threshold_success):
        d = gaussian.dims_for(lambda d, success=success: success(4096, k, d), 0.9)
        assert success(4096, k, d) == pytest.approx(0.9, abs=1e-5)


def test_the_answer_to_768_dimensions_and_10_active():
    published = {
        "compressed_sensing_c1": 2.3e34, "compressed_sensing_c2": 4.8e17, "integer_pursuit": 2.2e18,
        "top_k": 2.2e7, "threshold": 1.5e4,
    }  # fmt: skip
    rows = {row["rule"]: 10 ** row["log10_features"] for row in rules.table(768, 10) if row["rule"] != "storage"}
    for rule, value in published.items():
        assert rows[rule] == pytest.approx(value, rel=0.03), rule


@pytest.mark.parametrize("rule", [name for name in rules.RULES if name != "storage"])
def test_questions_asked_backwards(rule):
    """What fits at most needs d dimensions, and one more active feature does not fit."""
    d = 600
    n_atoms = round(math.exp(rules.ln_max_features(d, 12, rule)))
    assert rules.RULES[rule].dims(math.log(n_atoms), 12) == pytest.approx(d, rel=1e-3)
    most = rules.max_active(2**14, d, rule)
    assert rules.dims_needed(2**14, most, rule) <= d < rules.dims_needed(2**14, most + 1, rule)


@pytest.mark.parametrize(
    "call, named",
    [
        (lambda: capacity.entropy_bits(4, 5), "k = 5"),
        (lambda: capacity.entropy_bits(4.5, 1), "n_atoms = 4.5"),
        (lambda: capacity.entropy_bits(math.nan, 1), "n_atoms = nan"),
        (lambda: capacity.entropy_bits("a", 1), "n_atoms = a"),
        (lambda: gaussian.dims_for(lambda d: math.nan, 0.9), "probability = 0.9: never reached, success is nan"),
        (lambda: gaussian.threshold_success(8, 2, 4, math.nan), "threshold = nan"),
        (lambda: gaussian.threshold_success(8, 2, 4, 1.0), "threshold = 1"),
        (lambda: gaussian.threshold_success(8, 2, 4, 0.0), "threshold = 0"),
        (lambda: capacity.awgn_dims_sufficient(8, 1.0, slack=math.nan), "slack = nan"),
        (lambda: capacity.awgn_dims_sufficient(8, 1.0, slack=math.inf), "slack = inf"),
        (lambda: gaussian.dims_for(lambda d: 0.1, 0.9), "probability = 0.9: never reached"),
        (lambda: capacity.capacity(1.0), "epsilon = 1.0"),
        (lambda: capacity.map_threshold(4, 4, 10), "k = 4"),
        (lambda: capacity.statistical_dimension(4, 5), "k = 5"),
        (lambda: capacity.awgn_dim_lower_bound(4, -1.0, 0.1), "noise = -1.0"),
        (lambda: capacity.awgn_dim_lower_bound(4, 1.0, 0.0), "p = 0.0"),
        (lambda: gaussian.top_k_success(4, 2, 0), "d = 0"),
        (lambda: gaussian.dims_for(lambda d: 1.0, 1.5), "probability = 1.5"),
        (lambda: rules.dims_needed(4, 2, "magic"), "rule = 'magic'"),
        (lambda: rules.table(768, 10, 9), "k = 10"),
    ],
)
def test_bad_arguments_are_named(call, named):
    with pytest.raises(UserError, match=named):
        call()
