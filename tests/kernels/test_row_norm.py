"""Rows normalised one by one, against NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from saejax.kernels import row_norm
from saejax.kernels.row_norm import RowNorm


def plain(x, kind):
    """(normalised, mean, scale) in float64."""
    x = x.astype(np.float64)
    if kind is RowNorm.length:
        scale = np.linalg.norm(x, axis=1, keepdims=True) / np.sqrt(x.shape[1])
        return x / scale, 0 * scale, scale
    mean = x.mean(axis=1, keepdims=True)
    if kind is RowNorm.deviation:
        scale = x.std(axis=1, ddof=1, keepdims=True)
        return (x - mean) / (scale + 1e-5), mean, scale
    scale = np.sqrt(x.var(axis=1, keepdims=True) + 1e-5)
    return (x - mean) / scale, mean, scale


@pytest.mark.parametrize("size", [3.0, 1e-3])
@pytest.mark.parametrize("kind", RowNorm)
def test_rows_and_what_undoes_them(kind, size):
    x = (np.random.default_rng(0).normal(size=(5, 7)) * size + size).astype(np.float32)
    for ours, theirs in zip(row_norm.normalized(jnp.asarray(x), kind), plain(x, kind), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-6)
    if kind is not RowNorm.deviation:  # which leaves EPS out on the way back
        rows, mean, scale = row_norm.normalized(jnp.asarray(x), kind)
        np.testing.assert_allclose(rows * scale + mean, x, rtol=1e-5, atol=1e-6 * size)


@pytest.mark.parametrize("kind", RowNorm)
def test_rows_of_one_value_stay_finite(kind):
    for value in (0.0, 2.0):
        rows, _, _ = row_norm.normalized(jnp.full((1, 4), value, jnp.float32), kind)
        np.testing.assert_array_equal(rows, np.full((1, 4), float(kind is RowNorm.length and value > 0)))
