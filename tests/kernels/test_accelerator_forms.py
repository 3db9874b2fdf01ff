"""The forms that accelerators take, run on a CPU against brute force: selection without order among equals, selection
without sorting, sums without atomics."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax.kernels import choice, kth_largest, sparse_decode, top_k
from saejax.sae import aux_k

ACCELERATOR = SimpleNamespace(platform="tpu", device_kind="a chip that is not here")


def rows(kind, b, n):
    rng = np.random.default_rng(b + n)
    if kind == "distinct":
        return rng.standard_normal((b, n)).astype(np.float32)
    return rng.integers(-2, 3, (b, n)).astype(np.float32) if kind == "ties" else np.full((b, n), 1.5, np.float32)


def brute_force(a, k):
    indices = np.argsort(-a, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(a, indices, axis=1), indices


def unordered(a, k):
    """A selection as GPUs may make it: the k best in any order, of equals those of highest index."""
    values, indices = jax.lax.top_k(a[:, ::-1], k)
    shuffled = np.random.default_rng(k).permutation(k)
    return values[:, shuffled], (a.shape[1] - 1 - indices)[:, shuffled]


@pytest.mark.parametrize("kind", ["distinct", "ties", "all equal"])
@pytest.mark.parametrize(("b", "n", "k"), [(16, 64, 5), (16, 64, 63), (8, 64, 64), (8, 2048, 3), (7, 30, 1)])
def test_equals_are_put_right(monkeypatch, kind, b, n, k):
    monkeypatch.setattr(top_k, "_any_order", unordered)
    a = rows(kind, b, n)
    values, indices = top_k._selected(jnp.asarray(a), k)
    expected_values, expected_indices = brute_force(a, k)
    np.testing.assert_array_equal(values, expected_values)
    np.testing.assert_array_equal(indices, expected_indices)


@pytest.mark.parametrize(("b", "n", "k"), [(16, 64, 5), (16, 64, 20)])
def test_the_largest_of_each_row_are_kept_on_any_mesh(mesh, b, n, k):
    keep = jax.jit(kth_largest.keep, static_argnums=1)
    for kind in ("distinct", "ties", "all equal"):
        a = np.maximum(rows(kind, b, n), 0)
        expected = np.zeros_like(a)
        np.put_along_axis(expected, brute_force(a, k)[1], 1, axis=1)
        np.testing.assert_array_equal(keep(jnp.asarray(a), k), expected)


@pytest.mark.parametrize("k", [1, 100, 1024])
def test_four_bits_at_a_time_find_the_same_entry(mesh, k):
    a = np.maximum(np.random.default_rng(k).standard_normal((16, 64)), 0).astype(np.float32)
    a[0, :3] = [np.inf, 1e-40, 3e38]
    with choice.compiling_for(ACCELERATOR):
        found = jax.jit(functools.partial(kth_largest.kth_largest, k=k))(jnp.asarray(a))
    assert float(found) == np.sort(a.reshape(-1))[-k]


@pytest.mark.parametrize("spread", [1, 5, 40])
def test_sums_by_latent_are_those_of_numpy(spread):
    rng = np.random.default_rng(spread)
    indices, values = rng.integers(0, spread, (32, 4)), rng.standard_normal((32, 4)).astype(np.float32)
    y = rng.standard_normal((32, 1)).astype(np.float32)
    found = sparse_decode._sum_by_latent(jnp.zeros((64, 1)), jnp.asarray(values), jnp.asarray(indices), jnp.asarray(y))
    expected = np.zeros((64, 1))
    np.add.at(expected, indices.reshape(-1), (values * y).reshape(-1, 1).astype(np.float64))
    # A float32 sum of n products is off by at most n u times the sum of their magnitudes, u = 2^-24 (Higham, 4.2).
    np.testing.assert_allclose(found, expected, rtol=0, atol=128 * 2**-24 * np.abs(values * y).sum())


@pytest.mark.parametrize("shape", [None, (4, 2)], ids=str)
@pytest.mark.parametrize("signed", [False, True])
def test_aux_k_has_the_same_gradients(on_mesh, shape, signed):
    rng = np.random.default_rng(0)
    d, n, b, k_aux = 16, 64, 32, 8
    weights = aux_k.Weights(*(jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((d, n), (n,), (n, d))))
    read, residual = (jnp.asarray(rng.standard_normal((b, d)), jnp.float32) for _ in range(2))
    settings = aux_k.Settings(k_aux=k_aux, signed=signed)

    def form():
        return jax.jit(jax.value_and_grad(lambda w, dead: aux_k.aux_k_loss(w, read, residual, dead, settings)))

    here, there = form(), form()
    for n_dead in (0, 1, 8, 30, 64):
        dead = jnp.zeros(n, bool).at[rng.permutation(n)[:n_dead]].set(True)
        with on_mesh(shape):
            expected = here(weights, dead)
            with choice.compiling_for(ACCELERATOR):
                found = there(weights, dead)
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
