"""Decoders: hand cases, the definition of integer pursuit, posteriors by enumeration, and what bounds what."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax.errors import UserError
from saejax.lab.codes import decoders, dictionaries, subsets, success
from saejax.lab.codes.decoders import Decoder, decode


def code(n_atoms=60, d=40, k=3, b=12, seed=0):
    """(signals, dictionary, 0/1 code)."""
    rng = np.random.default_rng(seed)
    dictionary = rng.standard_normal((n_atoms, d))
    dictionary /= np.linalg.norm(dictionary, axis=1, keepdims=True)
    truth = np.zeros((b, n_atoms), int)
    truth[:, :k] = 1
    truth = rng.permuted(truth, axis=1)
    return jnp.asarray(truth @ dictionary, jnp.float32), jnp.asarray(dictionary, jnp.float32), truth


@pytest.mark.parametrize("method", ["threshold_half", "threshold_optimal", "top_k", "map", "integer_pursuit"])
def test_orthonormal_atoms_are_always_found(method):
    dictionary = dictionaries.orthonormal(jax.random.key(0), 32, 32)
    chosen = subsets.sample(jax.random.key(1), 32, 5, 20)
    # Isotropic interference is k/d here: the MAP threshold is 0.5 + 5/32 ln(27/5) = 0.76, below the score 1.
    assert np.asarray(success.recovered(method, dictionary, chosen)).all()


@pytest.mark.parametrize("method", ["mp", "omp", "gradient_pursuit", "basis_pursuit", "fista", "ista"])
def test_every_solver_joins_through_rounding(method):
    x, dictionary, truth = code(n_atoms=50, d=45, k=2, b=4)
    options = (("l1_coef", 0.1),) if method in ("fista", "ista") else ()
    for rounding in decoders.ROUNDING:
        counts = decode(x, dictionary, 2, Decoder(method=method, rounding=rounding, options=options))
        np.testing.assert_array_equal(counts, truth)


def test_rounding_rules_differ():
    values = jnp.array([[0.6, 0.7, 0.9, 0.1]])
    assert decoders.round_code(values, 2, "half").tolist() == [[1, 1, 1, 0]]
    assert decoders.round_code(values, 2, "largest").tolist() == [[0, 1, 1, 0]]


def test_integer_pursuit_as_written_down():
    x, dictionary, _ = code(n_atoms=80, d=12, k=4, b=30)
    expected = np.zeros((30, 80), int)
    for row, signal in enumerate(np.asarray(x, np.float64)):
        for _ in range(4):
            left = signal - expected[row] @ np.asarray(dictionary, np.float64)
            expected[row, np.argmax(np.asarray(dictionary, np.float64) @ left)] += 1
    counts = np.asarray(decode(x, dictionary, 4, "integer_pursuit"))
    np.testing.assert_array_equal(counts, expected)
    assert (counts.sum(axis=1) == 4).all()


def test_integer_pursuit_may_repeat_an_atom_and_then_has_failed():
    # Both active atoms lean on a third: x = a + b is closest to c, and what is left of it to c again.
    c = np.array([1.0, 0, 0])
    a, b = np.array([0.8, 0.6, 0]), np.array([0.8, -0.6, 0])
    dictionary = jnp.asarray([a, b, c, [0, 0, 1]], jnp.float32)
    counts = decode(dictionary[:1] + dictionary[1:2], dictionary, 2, "integer_pursuit")
    assert counts.tolist() == [[0, 0, 2, 0]]
    assert not bool(success.recovered("integer_pursuit", dictionary, jnp.array([[0, 1]]))[0])


def test_covariance_is_that_of_all_subsets():
    dictionary = dictionaries.gaussian(jax.random.key(0), 7, 3)
    signals = [np.asarray(dictionary)[list(chosen)].sum(axis=0) for chosen in itertools.combinations(range(7), 3)]
    expected = np.cov(np.array(signals), rowvar=False, bias=True)
    np.testing.assert_allclose(decoders.interference_covariance(dictionary, 3), expected, atol=1e-5)


def test_log_odds_are_those_of_two_gaussians():
    """Against densities: x ~ N(f, S) where the atom is on, N(0, S) where it is off."""
    from scipy.stats import multivariate_normal

    rng = np.random.default_rng(0)
    root = rng.standard_normal((4, 4))
    covariance, prior = root @ root.T + np.eye(4), 0.2
    x, dictionary = rng.standard_normal((5, 4)), rng.standard_normal((6, 4))
    lam, rho = decoders.matched_filter(*(jnp.asarray(a, jnp.float32) for a in (x, dictionary, covariance)))
    odds = np.asarray(decoders.log_odds(lam, rho, prior))
    for i, atom in enumerate(dictionary):
        on, off = (multivariate_normal(mean, covariance).logpdf(x) for mean in (atom, np.zeros(4)))
        np.testing.assert_allclose(odds[:, i], on - off + np.log(prior / (1 - prior)), atol=2e-3)


def test_full_covariance_beats_the_isotropic_one_where_interference_is_not_white():
    """Atoms crowd into half of the dimensions; only the full S tells the quiet dimensions."""
    _, dictionary, truth = code(n_atoms=256, d=64, k=4, b=200)
    loud = np.asarray(dictionary) * np.where(np.arange(64) < 16, 3.0, 0.5)
    dictionary = jnp.asarray(loud / np.linalg.norm(loud, axis=1, keepdims=True), jnp.float32)
    x = jnp.asarray(truth @ np.asarray(dictionary), jnp.float32)
    errors = {m: np.sum(np.asarray(decode(x, dictionary, 4, m)) != truth) for m in ("map", "map_full")}
    assert errors["map_full"] < 0.7 * errors["map"]


def test_a_threshold_that_succeeds_implies_top_k():
    x, dictionary, truth = code(n_atoms=200, d=60, k=3, b=200)
    by = {m: (np.asarray(decode(x, dictionary, 3, m)) == truth).all(axis=1) for m in ("threshold_half", "top_k")}
    assert by["threshold_half"].any() and (by["top_k"] & ~by["threshold_half"]).any()
    assert not (by["threshold_half"] & ~by["top_k"]).any()


def test_rows_that_a_solver_gave_up_on_are_named():
    dictionary = dictionaries.rademacher(jax.random.key(0), 64, 32)
    x = dictionary[:4] + dictionary[4:8]
    hurried = Decoder(method="fista", options=(("l1_coef", 0.01), ("max_iterations", 1)))
    with pytest.warns(RuntimeWarning, match="did not converge on 100.0% of 4 rows"):
        counts = decode(x, dictionary, 2, hurried)
    again, converged = decoders.attempt(x, dictionary, 2, hurried)
    np.testing.assert_array_equal(again, counts)
    assert not converged.any() and decoders.attempt(x, dictionary, 2, "map")[1].all()
    assert success.curve(hurried, 64, 2, [32], n_supports=8).unconverged.tolist() == [8]


def test_top_k_breaks_ties_by_index():
    assert decoders.largest(jnp.array([[1.0, 2.0, 1.0, 1.0]]), 2).tolist() == [[1, 1, 0, 0]]


@pytest.mark.parametrize(
    "call, named",
    [
        (lambda: decode(jnp.ones((1, 3)), jnp.eye(4), 1, "top_k"), "x = "),
        (lambda: decode(jnp.ones((1, 4)), jnp.eye(4), 5, "top_k"), "k = 5"),
        (lambda: decode(jnp.ones((1, 4)), jnp.eye(4), math.nan, "top_k"), "k = nan"),
        (lambda: decode(jnp.full((1, 4), jnp.nan), jnp.eye(4), 1, "top_k"), "x must be finite"),
        (lambda: decode(jnp.ones((1, 4)), 2 * jnp.eye(4), 1, "map"), "dictionary must have rows of norm 1"),
        (lambda: decode(jnp.ones((1, 4)), jnp.zeros((4, 4)), 1, "map_full"), "dictionary must have no row of zeros"),
        (lambda: decode(jnp.ones((1, 4)), jnp.eye(4), 1, "map_full"), "covariance with eigenvalues"),
        (
            lambda: decode(jnp.ones((1, 4)), jnp.eye(4)[jnp.array([0, 1, 2, 3, 0, 1])], 2, "map_full"),
            "covariance with eigenvalues",
        ),
        (lambda: decode(jnp.ones((1, 4)), jnp.eye(4)[:1], 1, "map_full"), "covariance with eigenvalues"),
        (lambda: decode(jnp.ones((1, 4)), jnp.ones((8, 4)) / 2, 2, "map_full"), "covariance with eigenvalues"),
        (
            lambda: decoders.matched_filter(jnp.ones((1, 2)), jnp.eye(2), jnp.zeros((2, 2))),
            "covariance with eigenvalues",
        ),
        (lambda: decoders.matched_filter(jnp.ones((1, 2)), jnp.eye(2), jnp.full((2, 2), jnp.nan)), "covariance with"),
        (lambda: Decoder(method="threshold", threshold=math.nan), "threshold = nan"),
        (lambda: decode(jnp.ones((1, 4)), jnp.eye(4), 1, "magic"), "method = 'magic'"),
        (lambda: Decoder(method="threshold"), "threshold = None"),
        (lambda: Decoder(method="top_k", threshold=0.3), "threshold = 0.3"),
        (lambda: Decoder(method="omp", rounding="up"), "rounding = 'up'"),
        (lambda: decode(jnp.ones((1, 4)), jnp.eye(4), 1, Decoder(method="fista")), "l1_coef"),
    ],
)
def test_bad_arguments_are_named(call, named):
    with pytest.raises(UserError, match=named):
        call()
