"""Coherence and its bounds against the whole Gram matrix and known frames."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax.errors import UserError
from saejax.lab.codes import coherence, dictionaries


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
def test_blocks_do_not_change_the_coherence(block):
    rows = dictionaries.spherical(jax.random.key(0), 45, 20)
    gram = np.abs(np.asarray(rows) @ np.asarray(rows).T) - np.eye(45)
    np.testing.assert_allclose(coherence.coherence(rows, block=block), gram.max(), atol=1e-6)


@pytest.mark.parametrize("n_atoms, d", [(45, 20), (12, 20)])
def test_mean_square_interference_is_the_mean_over_pairs(n_atoms, d):
    rows = dictionaries.gaussian(jax.random.key(0), n_atoms, d)
    gram = np.asarray(rows, np.float64) @ np.asarray(rows, np.float64).T
    expected = (gram[~np.eye(n_atoms, dtype=bool)] ** 2).mean()
    np.testing.assert_allclose(coherence.mean_square_interference(rows), expected, rtol=1e-4)


def test_the_simplex_meets_both_welch_bounds():
    """d + 1 vertices of a simplex are an equiangular tight frame: every |<f_i, f_j>| is 1/d."""
    d = 6
    centred = np.eye(d + 1) - 1 / (d + 1)
    basis = np.linalg.svd(centred)[0][:, :d]
    rows = centred @ basis
    rows = jnp.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), jnp.float32)
    bound = coherence.welch_bound(d + 1, d)
    assert bound == pytest.approx(1 / d**2)
    assert float(coherence.mean_square_interference(rows)) == pytest.approx(bound, rel=1e-4)
    assert float(coherence.coherence(rows)) == pytest.approx(bound**0.5, rel=1e-4)


def test_dims_for_coherence_is_enough():
    """Proposition 1: with d above the bound at most a share p of dictionaries is more coherent than epsilon."""
    n_atoms, epsilon, p = 64, 0.5, 0.5
    d = int(np.ceil(coherence.dims_for_coherence(n_atoms, epsilon, p)))
    keys = jax.random.split(jax.random.key(0), 40)
    exceeded = [float(coherence.coherence(dictionaries.rademacher(key, n_atoms, d))) >= epsilon for key in keys]
    assert np.mean(exceeded) <= p


@pytest.mark.parametrize(
    "call, named",
    [
        (lambda: coherence.coherence(jnp.ones((1, 3))), "n_atoms = 1"),
        (lambda: coherence.coherence(jnp.eye(3), block=0), "block = 0"),
        (lambda: coherence.coherence(jnp.ones(3)), "dictionary = "),
        (lambda: coherence.coherence(2 * jnp.eye(3)), "rows of norm 1, got a row of norm 2"),
        (lambda: coherence.mean_square_interference(jnp.full((3, 3), jnp.nan)), "dictionary must be finite"),
        (lambda: coherence.mean_square_interference(jnp.ones((1, 3))), "n_atoms = 1"),
        (lambda: coherence.welch_bound(4, 0), "d = 0"),
        (lambda: coherence.dims_for_coherence(8, 0.0, 0.1), "epsilon = 0.0"),
        (lambda: coherence.dims_for_coherence(8, 0.1, 1.0), "p = 1.0"),
    ],
)
def test_bad_arguments_are_named(call, named):
    with pytest.raises(UserError, match=named):
        call()
