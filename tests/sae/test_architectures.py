"""What holds for every registered architecture."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax import sae
from saejax.errors import UserError

ALIVE = jnp.zeros(64, bool)
STEP = jnp.zeros((), jnp.int32)
# Sums of up to 64 products of O(1) numbers in float32, in either order.
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


def naive_loss(config, params, x, *, step):
    """The loss as the papers write it: dense latents, no kernels, autodiff."""
    if isinstance(config, sae.TopK):
        pre_acts = (x - params.b_dec[None, :]) @ params.W_enc + params.b_enc[None, :]
        kth = jnp.sort(pre_acts, axis=1)[:, -config.k][:, None]
        latents = jnp.where(pre_acts >= kth, jax.nn.relu(pre_acts), 0)
        penalty = 0.0
    else:
        latents = jax.nn.relu(x @ params.W_enc + params.b_enc[None, :])
        weights = jnp.sum(latents * jnp.linalg.norm(params.W_dec, axis=1)[None, :], axis=1)
        penalty = config.l1_coef * min(step / 10, 1.0) * jnp.mean(weights)
    recon = latents @ params.W_dec + params.b_dec[None, :]
    return jnp.mean(jnp.sum((x - recon) ** 2, axis=1)) + penalty


def test_init_shapes_and_norms(sparsifier):
    p = sparsifier.init(jax.random.key(0))
    d, n = sparsifier.d_in, sparsifier.d_sae
    shapes = {f: getattr(p, f).shape for f in ("W_enc", "b_enc", "W_dec", "b_dec")}
    assert shapes == {"W_enc": (d, n), "b_enc": (n,), "W_dec": (n, d), "b_dec": (d,)}
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(p))
    np.testing.assert_array_equal(p.W_enc, p.W_dec.T)
    norm = getattr(sparsifier, "decoder_init_norm", 1.0)
    np.testing.assert_allclose(jnp.linalg.norm(p.W_dec, axis=1), norm, rtol=1e-5)


def test_independent_encoder_has_its_own_directions(sparsifier):
    own = dataclasses.replace(sparsifier, encoder_init=sae.EncoderInit.independent)
    p = own.init(jax.random.key(0))
    cosine = jnp.sum(p.W_enc.T * p.W_dec, axis=1) / jnp.sum(p.W_dec**2, axis=1)
    assert abs(float(jnp.mean(cosine))) < 0.15  # 64 random pairs in 16 dimensions: sd 1/32


def test_encode_and_decode(sparsifier, params, x):
    encoding = sparsifier.encode(params, x)
    latents = encoding.dense()
    assert latents.shape == (x.shape[0], sparsifier.d_sae) and float(latents.min()) >= 0
    np.testing.assert_array_equal(encoding.l0(), jnp.sum(latents > 0, axis=1))
    np.testing.assert_array_equal(encoding.fired(), jnp.any(latents > 0, axis=0))
    assert 0 < int(jnp.sum(latents > 0)) < latents.size  # both kinds are there
    if hasattr(sparsifier, "k"):
        assert float(encoding.l0().max()) <= sparsifier.k
    recon = sparsifier.decode(params, encoding)
    np.testing.assert_allclose(recon, latents @ params.W_dec + params.b_dec[None, :], **CLOSE)
    dense = sparsifier.decode(params, sae.Encoding(latents=latents, d_sae=sparsifier.d_sae))
    np.testing.assert_allclose(recon, dense, **CLOSE)


def test_permuting_latents_permutes_the_code_and_nothing_else(sparsifier, params, x):
    order = np.random.default_rng(0).permutation(sparsifier.d_sae)
    shuffled = params.replace(W_enc=params.W_enc[:, order], b_enc=params.b_enc[order], W_dec=params.W_dec[order])
    before, after = sparsifier.encode(params, x), sparsifier.encode(shuffled, x)
    np.testing.assert_allclose(after.dense(), before.dense()[:, order], **CLOSE)
    np.testing.assert_allclose(sparsifier.decode(shuffled, after), sparsifier.decode(params, before), **CLOSE)


def test_loss_and_gradient_equal_the_naive_dense_form(sparsifier, params, x):
    step = jnp.asarray(4)
    loss = jax.jit(jax.value_and_grad(lambda p: sparsifier.loss(p, x, dead=ALIVE, step=step), has_aux=True))
    (value, aux), grads = loss(params)
    expected, expected_grads = jax.value_and_grad(lambda p: naive_loss(sparsifier, p, x, step=4))(params)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), grads, expected_grads)
    np.testing.assert_allclose(aux.terms["mse"], jnp.mean(jnp.sum((x - aux.recon) ** 2, axis=1)), rtol=1e-5)


def test_gradient_of_the_data_equals_the_naive_one(sparsifier, params, x):
    mine = jax.grad(lambda x: sparsifier.loss(params, x, dead=ALIVE, step=STEP)[0])(x)
    expected = jax.grad(lambda x: naive_loss(sparsifier, params, x, step=0))(x)
    np.testing.assert_allclose(mine, expected, **CLOSE)


def test_bfloat16_products_stay_near_float32(sparsifier, params, x):
    half = dataclasses.replace(sparsifier, matmul_dtype=sae.MatmulDtype.bfloat16)
    low, aux = half.loss(params, x, dead=ALIVE, step=STEP)
    high, _ = sparsifier.loss(params, x, dead=ALIVE, step=STEP)
    assert aux.recon.dtype == jnp.float32
    assert 0 < abs(float(low - high)) / float(high) < 0.02  # operands carry 8 bits: 2^-8 each


@pytest.mark.parametrize("scale", [0.25, 7.0])
def test_folding_moves_the_normalisation_into_the_parameters(sparsifier, params, x, scale):
    mean = jnp.linspace(-1.0, 2.0, sparsifier.d_in)
    normalised = (x - mean[None, :]) * scale
    folded = sparsifier.fold(params, mean=mean, scale=jnp.asarray(scale))
    inside, outside = sparsifier.encode(params, normalised), sparsifier.encode(folded, x)
    np.testing.assert_allclose(outside.dense() * scale, inside.dense(), rtol=1e-4, atol=1e-4)
    inside, outside = sparsifier.decode(params, inside), sparsifier.decode(folded, outside)
    np.testing.assert_allclose(outside, inside / scale + mean[None, :], rtol=1e-4, atol=1e-4)
    # The inverse normalisation undoes it.
    back = sparsifier.fold(folded, mean=-mean * scale, scale=jnp.asarray(1 / scale))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), back, params)


def test_project_keeps_the_constraint_to_first_order(sparsifier, params, x):
    grads = jax.grad(lambda p: sparsifier.loss(p, x, dead=ALIVE, step=STEP)[0])(params)
    once = sparsifier.project(params, grads)
    free = jax.tree.map(lambda p, g: p - 1e-3 * g, params, once)
    held = sparsifier.constrain(free)
    # What the constraint changes is of second order in the step.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), held, free)
    twice = sparsifier.project(params, once)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), twice, once)


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("topk", {"k": 999}, "sae.k must be in [1, d_sae=64], got 999"),
        ("topk", {"k": 0}, "sae.k must be in [1, d_sae=64], got 0"),
        ("topk", {"k_aux": 65}, "sae.k_aux must be null or in [1, d_sae=64], got 65"),
        ("topk", {"aux_alpha": -1.0}, "sae.aux_alpha must be at least 0, got -1.0"),
        ("topk", {"d_sae": 0}, "sae.d_sae must be at least 1, got 0"),
        ("l1", {"l1_coef": -0.5}, "sae.l1_coef must be at least 0, got -0.5"),
        ("l1", {"l1_warmup_steps": -1}, "sae.l1_warmup_steps must be at least 0, got -1"),
        ("l1", {"decoder_init_norm": 0.0}, "sae.decoder_init_norm must be above 0, got 0.0"),
        ("l1", {"matmul_dtype": "fp8"}, "sae.matmul_dtype must be one of float32, bfloat16, got fp8"),
    ],
)
def test_config_errors_name_the_field(name, wrong, message):
    valid = {"d_in": 16, "d_sae": 64}
    with pytest.raises(UserError) as caught:
        sae.ARCHITECTURES[name](**(valid | wrong))
    assert str(caught.value) == message


def test_config_is_static(sparsifier):
    assert hash(sparsifier) == hash(dataclasses.replace(sparsifier))
    with pytest.raises(dataclasses.FrozenInstanceError):
        sparsifier.d_in = 3
