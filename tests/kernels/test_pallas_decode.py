"""The Pallas forms of the sparse passes, interpreted on a CPU, against the dense algebra; what lowers for a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax.kernels import mosaic, pallas_decode

pytestmark = pytest.mark.skipif(not mosaic.available(), reason="this jax has no Mosaic GPU backend")

B, K, N = 5, 3, 4
# Sums of at most 256 products of O(1) numbers: 256 eps(float32) = 3e-5, for either order.
TOLERANCE = {"rtol": 0, "atol": 3e-5}


def problem(d):
    """(values, indices, W, y) with a repeat inside a row, a latent that nothing names, zeros and a full latent."""
    rng = np.random.default_rng(d)
    indices = rng.integers(0, N - 1, (B, K)).astype(np.int32)  # nothing names the last latent
    indices[0] = [1, 1, 2]
    indices[:, 0] = 1
    values = rng.standard_normal((B, K)).astype(np.float32)
    values[2] = 0  # nothing active
    values[3, 1] = 0
    return values, indices, *(rng.standard_normal((rows, d)).astype(np.float32) for rows in (N, B))


def run(kernel, *args):
    return np.asarray(jax.jit(functools.partial(kernel, interpret=True))(*map(jnp.asarray, args)))


@pytest.mark.parametrize("d", [128, pytest.param(384, marks=pytest.mark.nightly)])
def test_combine_is_the_weighted_sum(d):
    values, indices, W, _ = problem(d)
    expected = np.einsum("bk,bkd->bd", values, W[indices])
    np.testing.assert_allclose(run(pallas_decode.combine_rows, values, indices, W), expected, **TOLERANCE)


@pytest.mark.parametrize("d", [128, pytest.param(3072, marks=pytest.mark.nightly)])  # 3,072: three parts of a row
def test_dot_is_the_inner_product(d):
    _, indices, W, y = problem(d)
    expected = np.einsum("bd,bkd->bk", y, W[indices])
    np.testing.assert_allclose(run(pallas_decode.dot_rows, y, indices, W), expected, rtol=0, atol=d * 1.2e-7)


@pytest.mark.parametrize("d", [128, pytest.param(384, marks=pytest.mark.nightly)])  # 384: three parts of a row
def test_accumulate_adds_every_place_once(d):
    values, indices, _, y = problem(d)
    expected = np.zeros((N, d))
    for row in range(B):
        for slot in range(K):
            expected[indices[row, slot]] += values[row, slot] * y[row]
    got = run(functools.partial(pallas_decode.accumulate_rows, n=N), values, indices, y)
    np.testing.assert_allclose(got, expected, **TOLERANCE)
    assert np.any(expected[0]) and not np.any(got[N - 1])


def test_places_are_sorted_by_latent_then_row():
    values, indices, _, _ = problem(128)
    sorted_values, rows, starts = map(
        np.asarray, pallas_decode._by_latent(jnp.asarray(values), jnp.asarray(indices), N)
    )
    assert starts[0] == 0 and starts[N] == np.sum(values != 0)  # zeros are past the end
    for latent in range(N):
        mine = slice(starts[latent], starts[latent + 1])
        places = np.argwhere((indices == latent) & (values != 0))
        np.testing.assert_array_equal(rows[mine], places[:, 0])
        np.testing.assert_array_equal(sorted_values[mine], values[tuple(places.T)])


@pytest.mark.parametrize("name", ["combine_rows", "dot_rows", "accumulate_rows"])
def test_lowers_for_a_gpu_at_full_size_without_one(name):
    b, k, n, d = 8192, 64, 131072, 4096
    values, indices, W, y = (
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in [((b, k), "float32"), ((b, k), "int32"), ((n, d), "float32"), ((b, d), "float32")]
    )
    kernel, args = {
        "combine_rows": (pallas_decode.combine_rows, (values, indices, W)),
        "dot_rows": (pallas_decode.dot_rows, (y, indices, W)),
        "accumulate_rows": (functools.partial(pallas_decode.accumulate_rows, n=n), (values, indices, y)),
    }[name]
    text = jax.jit(kernel).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text
    assert f"{b}x{k}x{d}" not in text  # the gathered rows are nowhere


def test_a_width_that_no_block_can_read_is_refused():
    with pytest.raises(ValueError, match="multiple of 128 wide, got 100"):
        pallas_decode.combine_rows(jnp.ones((1, 1)), jnp.zeros((1, 1), jnp.int32), jnp.ones((2, 100)))
