"""Dictionaries: the statistics that each ensemble promises; implicit rows do not depend on how they are asked for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax.errors import UserError
from saejax.lab.codes import coherence, dictionaries


@pytest.mark.parametrize("name", sorted(dictionaries.ENSEMBLES))
def test_rows_are_unit_vectors(name):
    rows = dictionaries.ENSEMBLES[name](jax.random.key(0), 96, 32)
    assert rows.shape == (96, 32) and rows.dtype == jnp.float32
    norms = np.linalg.norm(rows, axis=1)
    if name == "gaussian":  # squared norms have mean 1 and variance 2/d
        assert abs((norms**2).mean() - 1) < 5 * np.sqrt(2 / 32 / 96)
    else:
        np.testing.assert_allclose(norms, 1, atol=1e-5)


@pytest.mark.parametrize("name", ["rademacher", "gaussian", "spherical"])
def test_random_atoms_interfere_with_mean_square_one_over_d(name):
    n_atoms, d = 512, 64
    measured = float(coherence.mean_square_interference(dictionaries.ENSEMBLES[name](jax.random.key(1), n_atoms, d)))
    # Squares of inner products have standard deviation near sqrt(2)/d, and pairs are nearly independent.
    tolerance = 6 * np.sqrt(2) / d / np.sqrt(n_atoms * (n_atoms - 1) / 2)
    if name == "gaussian":  # norms vary too: the mean over pairs inherits (1 + sqrt(2/(d n)))^2
        tolerance += 6 * 2 * np.sqrt(2 / d / n_atoms) / d
    assert abs(measured - 1 / d) < tolerance


def test_orthonormal_rows_and_their_unions():
    rows = dictionaries.orthonormal(jax.random.key(0), 96, 32)
    np.testing.assert_allclose(rows[32:64] @ rows[32:64].T, np.eye(32), atol=1e-5)
    # Whole bases form a tight frame: the Welch bound is met.
    np.testing.assert_allclose(coherence.mean_square_interference(rows), coherence.welch_bound(96, 32), rtol=1e-4)


@pytest.mark.parametrize("n_atoms, d", [(64, 32), (20, 32), (32, 32)])
def test_optimised_interference_meets_the_welch_bound(n_atoms, d):
    rows = dictionaries.minimise_interference(jax.random.key(2), n_atoms, d)
    start = dictionaries.spherical(jax.random.key(2), n_atoms, d)
    reached = float(coherence.mean_square_interference(rows))
    assert reached <= coherence.welch_bound(n_atoms, d) * 1.001 + 1e-6
    assert reached < 0.8 * float(coherence.mean_square_interference(start))


def test_implicit_rows_do_not_depend_on_the_request():
    implicit = dictionaries.Implicit(n_atoms=2**20, d=50, seed=4)
    indices = jnp.array([[0, 2**20 - 1, 7], [7, 1234, 0]])
    rows = implicit.rows(indices)
    assert rows.shape == (2, 3, 50)
    np.testing.assert_array_equal(rows[0, 2], rows[1, 0])
    np.testing.assert_array_equal(rows[1, 1], implicit.rows(jnp.array([1234]))[0])
    np.testing.assert_allclose(np.abs(rows), 1 / np.sqrt(50), rtol=1e-6)
    assert not np.array_equal(rows[0, 0], dictionaries.Implicit(n_atoms=2**20, d=50, seed=5).rows(jnp.array([0]))[0])


def test_implicit_signs_are_balanced_and_independent():
    n_atoms, d = 1024, 100  # d is no multiple of 32: the last word is cut
    rows = np.asarray(dictionaries.Implicit(n_atoms=n_atoms, d=d).whole()) * np.sqrt(d)
    assert np.abs(rows.mean(axis=0)).max() < 5 / np.sqrt(n_atoms)
    covariance = rows.T @ rows / n_atoms - np.eye(d)
    assert np.abs(covariance).max() < 5.5 / np.sqrt(n_atoms)


@pytest.mark.parametrize(
    "make, named",
    [
        (lambda: dictionaries.rademacher(jax.random.key(0), 0, 3), "n_atoms = 0"),
        (lambda: dictionaries.gaussian(jax.random.key(0), 3, 0), "d = 0"),
        (lambda: dictionaries.minimise_interference(jax.random.key(0), 3, 2, steps=0), "steps = 0"),
        (lambda: dictionaries.Implicit(n_atoms=2**31, d=2), "n_atoms = 2147483648"),
        (lambda: dictionaries.Implicit(n_atoms=2, d=2, seed=-1), "seed must be at least 0, got -1"),
        (lambda: dictionaries.Implicit(n_atoms=2, d=2, seed=2**32), "seed must be at most 4294967295"),
    ],
)
def test_bad_sizes_are_named(make, named):
    with pytest.raises(UserError, match=named):
        make()
