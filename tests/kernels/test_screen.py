"""Candidates by a bfloat16 product: certain only where they are right, and the float32 form where they are not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax.kernels import choice, encode_top_k, screen


def gaussian(b, d, n, offset=0.0):
    rng = np.random.default_rng(b + d + n)
    x = rng.standard_normal((b, d)) + offset * rng.standard_normal(d)
    W, b = rng.standard_normal((d, n)) / d**0.5, rng.standard_normal(n) / 10
    return x.astype(np.float32), W.astype(np.float32), b.astype(np.float32)


def of_float64(x, W, b, k):
    pre_acts = x.astype(np.float64) @ W.astype(np.float64) + b
    indices = np.argsort(-pre_acts, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(pre_acts, indices, axis=1), indices


@pytest.mark.parametrize("offset", [0.0, 30.0])  # what rows have in common costs no certainty
def test_candidates_hold_the_k_largest_and_say_so(offset):
    x, W, b = gaussian(64, 96, 2048, offset)
    certain, values, indices = jax.jit(screen.candidates(jnp.asarray(W), jnp.asarray(b), 8))(jnp.asarray(x))
    expected, places = of_float64(x, W, b, 8)
    assert certain
    np.testing.assert_array_equal(np.sort(indices, axis=1), np.sort(places, axis=1))
    largest = np.linalg.norm(x, axis=1).max() * np.linalg.norm(W, axis=0).max()
    np.testing.assert_allclose(values, expected, atol=96 * 2**-23 * largest)  # sums of 96 products


def test_what_bfloat16_cannot_tell_apart_is_not_certain():
    x, W, b = gaussian(16, 32, 256)
    # 64 latents that differ by less than half a step of bfloat16, at the top of every row.
    W[:, :64] = np.sign(x[0])[:, None] * (1 + np.random.default_rng(0).uniform(-(2**-10), 2**-10, (32, 64)))
    b[:] = 0
    certain, _, indices = screen.candidates(jnp.asarray(W), jnp.asarray(b), 4)(jnp.asarray(x))
    assert not certain
    wrong = np.sort(indices[0]) != np.sort(of_float64(x, W, b, 4)[1][0])
    assert wrong.any()  # so it would have been a mistake


def test_what_is_called_certain_is_right():
    # Were one bound too low, an entry left out could be among the k largest. Wide ranges make misses likely.
    rng = np.random.default_rng(1)
    find = jax.jit(lambda x, W, b: screen.candidates(W, b, 3)(x))
    n_certain = 0
    for _ in range(100):
        x = rng.standard_normal((2, 24)) + rng.choice([0, 1, 100]) * rng.standard_normal(24)
        W = rng.standard_normal((24, 48)) * 10 ** rng.uniform(-1, 1, 48)
        x, W, b = x.astype(np.float32), W.astype(np.float32), np.zeros(48, np.float32)
        certain, _, indices = find(x, W, b)
        n_certain += bool(certain)
        if certain:
            np.testing.assert_array_equal(np.sort(indices, axis=1), np.sort(of_float64(x, W, b, 3)[1], axis=1))
    assert 20 < n_certain


@pytest.mark.parametrize("alike", [False, True])
def test_the_encoder_finds_the_same_screened_and_not(alike):
    x, W, b = gaussian(48, 32, 1024)
    if alike:
        W[:] = W[:, :1]  # every latent equal: no candidate is certain, and ties go by index
        b[:] = 0
    arrays = [jnp.asarray(a) for a in (x, W, b, np.zeros(32, np.float32))]
    found = {}
    for form in ("sparse", "screened"):
        with choice.use(f"encode={form}"):
            # A function of its own for each form, or the second would be the first from jit's cache.
            found[form] = jax.jit(lambda *a: encode_top_k.encode_top_k(*a, 6, "float32"))(*arrays)  # noqa: B023
    np.testing.assert_array_equal(found["screened"][1], found["sparse"][1])
    largest = np.linalg.norm(x, axis=1).max() * np.linalg.norm(W, axis=0).max()  # two sums of 32 products, 2^-24 each
    np.testing.assert_allclose(found["screened"][0], found["sparse"][0], atol=32 * 2**-23 * largest)
    if alike:
        np.testing.assert_array_equal(found["screened"][1], np.tile(np.arange(6), (48, 1)))


def test_equal_latents_come_by_index_where_it_is_certain():
    x, W, b = gaussian(16, 32, 512)
    W[:, 300] = W[:, 17]  # twins, which are among the largest of some rows
    b[300] = b[17] = 3.0
    certain, values, indices = screen.candidates(jnp.asarray(W), jnp.asarray(b), 6)(jnp.asarray(x))
    assert certain
    for row, places in zip(np.asarray(values), np.asarray(indices), strict=True):
        if 17 in places and 300 in places:
            assert list(places).index(300) == list(places).index(17) + 1
            assert row[list(places).index(300)] == row[list(places).index(17)]
            return
    raise AssertionError("no row has both twins: the test tests nothing")


@pytest.mark.parametrize(
    ("n", "k", "dtype", "pays"),
    [(16384, 32, "float32", True), (16383, 32, "float32", False), (2**20, 32, "bfloat16", False)],
)
def test_it_pays_for_many_latents_in_float32_on_processors_that_multiply_bfloat16(monkeypatch, n, k, dtype, pays):
    monkeypatch.setattr(screen, "_multiplies_bfloat16", lambda: True)
    assert screen.pays(n, k, dtype) is pays
    monkeypatch.setattr(screen, "_multiplies_bfloat16", lambda: False)
    assert not screen.pays(n, k, dtype)
