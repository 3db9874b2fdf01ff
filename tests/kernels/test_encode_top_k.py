"""Top-k of the encoder product, block by block, against the whole product and a stable sort."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax.kernels import encode_top_k, sparse_encode, top_k


def encoder(b, d, n, ties=False):
    rng = np.random.default_rng(b + n)
    # Small integers: every product is exact, so that ties are ties and equality is to the bit.
    high = 2 if ties else 40
    arrays = [rng.integers(-high, high + 1, shape).astype(np.float32) for shape in ((b, d), (d, n), (n,), (d,))]
    return [jnp.asarray(a) for a in arrays]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(
    ("b", "n", "k"),
    [
        (16, 64, 5),
        (16, 64, 20),  # more than one of eight shards holds
        (7, 30, 4),  # divides over no mesh
        (8, 2048, 3),
    ],
)
def test_equals_top_k_of_the_whole_product_on_every_mesh(mesh, b, n, k, ties):
    arrays = encoder(b, 8, n, ties)
    found = jax.jit(encode_top_k.encode_top_k, static_argnums=(4, 5))(*arrays, k, "float32")
    pre_acts = sparse_encode.pre_activations(*arrays, "float32")
    wanted = np.argsort(-np.asarray(pre_acts), axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(found[1], wanted)
    np.testing.assert_array_equal(found[0], np.take_along_axis(np.asarray(pre_acts), wanted, axis=1))


@pytest.mark.parametrize("n_rows", [1, 12, 13])
def test_any_number_of_blocks_gives_the_same(n_rows):
    x, W_enc, b_enc, _ = encoder(n_rows, 8, 64)
    whole = top_k.top_k(x @ W_enc + b_enc[None, :], 6)
    for rows in (1, 4, 5, 100):
        blocks = functools.partial(encode_top_k._in_blocks, k=6, dtype="float32", block_bytes=rows * 64 * 4)
        for got, want in zip(jax.jit(blocks)(x, W_enc, b_enc), whole, strict=True):
            np.testing.assert_array_equal(got, want)


def test_the_pre_activations_of_the_batch_never_exist_whole():
    # 16,384 x 8,192 float32 are 512 MiB; a block has 64, and is there with and without its bias.
    x, W_enc, b_enc, b_dec = (jnp.zeros(shape) for shape in ((16384, 4), (4, 8192), (8192,), (4,)))
    encode = jax.jit(encode_top_k.encode_top_k, static_argnums=(4, 5))
    analysis = encode.lower(x, W_enc, b_enc, b_dec, 8, "float32").compile().memory_analysis()
    assert analysis.temp_size_in_bytes < 160 * 2**20


@pytest.mark.parametrize("k", [0, 65])
def test_k_out_of_range_is_refused_by_the_encoder(k):
    with pytest.raises(ValueError, match=r"k must be in \[1, 64\]"):
        encode_top_k.encode_top_k(*encoder(2, 8, 64), k, "float32")
