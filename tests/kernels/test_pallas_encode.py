"""The fused encoder and top-k, interpreted on a CPU, against a stable sort of the whole product."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax.kernels import mosaic, pallas_encode
from saejax.kernels.pallas_encode import ROWS, TILE

needs_pallas = pytest.mark.skipif(not mosaic.available(), reason="this jax has no Mosaic GPU backend")
D = 64


def brute_force(a, k):
    indices = np.argsort(-a, axis=-1, kind="stable")[..., :k]
    return np.take_along_axis(a, indices, axis=-1), indices


def pre_acts(n, rows=ROWS):
    """One kind of difficulty per row, over and over."""
    rng = np.random.default_rng(n)
    a = rng.standard_normal((rows, n)).astype(np.float32)
    a[1::8] = rng.integers(-2, 3, a[1::8].shape)  # ties
    a[2::8] = -1  # all equal
    a[3::8] = -np.abs(a[3::8])
    a[3::8, :: n // 2] = 1  # fewer than k positives
    a[4::8] = -np.inf  # all at the bottom
    a[5::8, n // 3 :] = -np.inf
    a[5::8, :3] = np.inf
    a[6::8] = 0
    a[6::8, n // 2 : n // 2 + 20] = 1  # the winners in one tile, tied
    a[7::8] = np.arange(n)  # the winners in the last tile, in falling order
    return a


def of_tiles(a, kept):
    """Candidates as the kernel writes them, from a sort of each tile."""
    values, indices = brute_force(a.reshape(len(a), -1, TILE), kept)
    indices = indices + np.arange(a.shape[1] // TILE)[None, :, None] * TILE
    return jnp.asarray(values.transpose(1, 2, 0)), jnp.asarray(indices.transpose(1, 2, 0), jnp.int32)


def as_product(a):
    """(x, W, bias) whose bfloat16 product is `a` rounded to bfloat16: x picks a row of W."""
    return jnp.eye(len(a), dtype=jnp.bfloat16), jnp.asarray(a, jnp.bfloat16), jnp.zeros(a.shape[1])


def rounded(a):
    return np.asarray(jnp.asarray(a, jnp.bfloat16), np.float32)


@pytest.mark.parametrize(("t", "kept"), [(TILE, 5), (12, 12)])
def test_best_of_a_tile_in_order(t, kept):
    a = pre_acts(TILE, rows=8)[:, :t]
    step, last, found = jax.jit(pallas_encode.next_of_tile), pallas_encode.before_first(8), []
    for _ in range(kept):
        last = step(jnp.asarray(a), *last)
        found.append(last)
    for got, expected in zip(zip(*found, strict=True), brute_force(a, kept), strict=True):
        np.testing.assert_array_equal(np.stack(got, axis=1), expected)


@pytest.mark.parametrize(("k", "kept"), [(16, 6), (16, 16), (300, 200)])
def test_selection_is_exact_whatever_the_tiles_kept(k, kept):
    # Finite: what is redone comes from a product, in which infinite weights would make NaN.
    a = rounded(np.clip(pre_acts(4 * TILE), -100, 100))
    values, indices = jax.jit(functools.partial(pallas_encode.select, k=k))(
        *as_product(a), values=of_tiles(a, kept)[0], indices=of_tiles(a, kept)[1]
    )
    expected_values, expected_indices = brute_force(a, k)
    np.testing.assert_array_equal(indices, expected_indices)
    np.testing.assert_array_equal(values, expected_values)


def test_without_redoing_the_selection_would_be_wrong():
    a = rounded(np.clip(pre_acts(4 * TILE), -100, 100))
    some = of_tiles(a, 6)[1].transpose(2, 0, 1).reshape(len(a), -1).tolist()
    best = brute_force(a, 16)[1].tolist()
    assert 0 < np.mean([set(right) <= set(held) for right, held in zip(best, some, strict=True)]) < 1


def test_rows_are_seldom_redone_where_winners_fall_by_chance():
    k, n_tiles = 64, 16
    kept = pallas_encode.kept_per_tile(k, n_tiles)
    counts = np.random.default_rng(0).multinomial(k, [1 / n_tiles] * n_tiles, size=20_000)
    assert np.mean(np.any(counts >= kept, axis=1)) < 1e-3
    assert np.mean(np.any(counts >= kept // 2, axis=1)) > 0.1  # and not by keeping far too many


@pytest.mark.parametrize(("k", "n_tiles"), [(1, 1), (64, 512), (64, 1), (256, 1), (1000, 4), (1024, 4), (5, 1000)])
def test_enough_is_kept(k, n_tiles):
    kept = pallas_encode.kept_per_tile(k, n_tiles)
    assert kept <= min(k, TILE) and kept * n_tiles >= k


def exact_product(b, n):
    """Small integers: products and sums of them are exact in bfloat16 operands and float32, and tie often."""
    rng = np.random.default_rng(b + n)
    x, W, bias = (rng.integers(-2, 3, shape).astype(np.float32) for shape in [(b, D), (D, n), n])
    bias[:: n // 8] = -np.inf  # latents that are switched off
    x[0] = 0  # a row whose product is zero
    return (x, W, bias), x @ W + bias


@needs_pallas
@pytest.mark.parametrize(
    ("b", "n", "k"),
    [
        (ROWS, TILE, 2),
        pytest.param(ROWS, 2 * TILE, 12, marks=pytest.mark.nightly),
        pytest.param(3 * ROWS, 2 * TILE, 3, marks=pytest.mark.nightly),  # bands of rows
        pytest.param(2 * ROWS, 3 * TILE, 5, marks=pytest.mark.nightly),  # neighbours
    ],
)
def test_kernel_equals_a_stable_sort_of_the_product(b, n, k):
    args, a = exact_product(b, n)
    values, indices = jax.jit(functools.partial(pallas_encode.top_k_of_product, k=k, interpret=True))(
        *map(jnp.asarray, args)
    )
    expected_values, expected_indices = brute_force(a, k)
    np.testing.assert_array_equal(indices, expected_indices)
    np.testing.assert_array_equal(values, expected_values)


@needs_pallas
@pytest.mark.parametrize(("b", "k", "n", "d"), [
    (384, 2, 1024, 320), pytest.param(8192, 64, 131072, 4096, marks=pytest.mark.nightly)])  # fmt: skip
def test_lowers_for_a_gpu_without_one(b, k, n, d):
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in [(b, d), (d, n), (n,)]]
    encode = functools.partial(pallas_encode.top_k_of_product, k=k)
    text = jax.jit(encode).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text and f"tensor<{b}x{n}x" not in text  # the pre-activations are nowhere


@pytest.mark.parametrize("b", [1, ROWS + 1])
def test_sizes_that_no_tile_fits_are_refused(b):
    with pytest.raises(ValueError, match="must be multiples of 128, 64 and 256"):
        pallas_encode.top_k_of_product(jnp.ones((b, D)), jnp.ones((D, TILE)), jnp.ones(TILE), 1)
