"""AuxK: its value, and where its gradient must and must not flow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax import sae
from saejax.sae import aux_k

CONFIG = sae.TopK(d_in=16, d_sae=64, k=4, k_aux=8)
SETTINGS = aux_k.Settings(k_aux=8)


@pytest.fixture
def params():
    start = CONFIG.init(jax.random.key(0))
    return start.replace(b_dec=jnp.linspace(-0.3, 0.3, 16))


def dead_latents(n):
    return jnp.asarray(np.isin(np.arange(64), np.random.default_rng(n).permutation(64)[:n]))


@jax.jit
def loss(params, x, dead):
    fixed = jax.lax.stop_gradient(x - params.b_dec[None, :])
    residual = jax.lax.stop_gradient(x - CONFIG.decode(params, CONFIG.encode(params, x)))
    return aux_k.aux_k_loss(aux_k.Weights.of(params), fixed, residual, dead, SETTINGS)


@jax.jit
def naive(params, x, dead):
    """The definition, dense, with a full sort."""
    fixed = jax.lax.stop_gradient(x - params.b_dec[None, :])
    residual = jax.lax.stop_gradient(x - CONFIG.decode(params, CONFIG.encode(params, x)))
    pre_acts = jnp.where(dead[None, :], fixed @ params.W_enc + params.b_enc[None, :], -jnp.inf)
    kth = jnp.sort(pre_acts, axis=1)[:, -8][:, None]
    values = jnp.where(pre_acts >= kth, jax.nn.relu(pre_acts), 0)
    spread = jnp.sum((residual - residual.mean(0)[None, :]) ** 2)
    return jnp.sum((residual - values @ params.W_dec) ** 2) / spread * jnp.minimum(dead.sum() / 8, 1)


@jax.jit
def whole(params, x, dead):
    """All terms together."""
    return CONFIG.loss(params, x, dead=dead, step=jnp.zeros((), int))[0]


# Compiled once for every test, not operation by operation.
VALUE_AND_GRAD, NAIVE, WHOLE = (jax.jit(jax.value_and_grad(f)) for f in (loss, naive, whole))


@pytest.mark.parametrize("n_dead", [1, 5, 8, 9, 40, 64])
def test_value_and_gradient_equal_the_definition(params, x, n_dead):
    dead = dead_latents(n_dead)
    value, grads = VALUE_AND_GRAD(params, x, dead)
    expected, expected_grads = NAIVE(params, x, dead)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), grads, expected_grads)


@pytest.mark.parametrize("n_dead", [3, 30])
def test_gradient_reaches_dead_latents_and_nothing_else(params, x, n_dead):
    dead = np.asarray(dead_latents(n_dead))
    _, grads = VALUE_AND_GRAD(params, x, jnp.asarray(dead))
    for moved in (grads.W_enc.T, grads.b_enc[:, None], grads.W_dec):
        moved = np.any(np.asarray(moved) != 0, axis=1)
        assert not np.any(moved & ~dead)  # live latents stay
        assert np.all(moved[dead])  # 48 rows: every dead latent is active in some
    assert not np.any(grads.b_dec)  # neither through the target nor through the centring


def test_no_gradient_through_the_target_or_the_input(params, x):
    dead = dead_latents(5)
    weights = aux_k.Weights.of(params)
    aux = jax.jit(lambda fixed, residual: aux_k.aux_k_loss(weights, fixed, residual, dead, SETTINGS))
    grads = jax.grad(aux, argnums=(0, 1))(x, x)
    assert not np.any(grads[0]) and not np.any(grads[1])


def test_whole_loss_adds_alpha_times_the_term_to_the_main_path(params, x):
    (total, with_aux), (main, without) = (WHOLE(params, x, dead) for dead in (dead_latents(5), dead_latents(0)))
    term, aux = VALUE_AND_GRAD(params, x, dead_latents(5))
    weight = jnp.mean(jnp.sum((x - x.mean(0)[None, :]) ** 2, axis=1)) / 32
    jax.tree.map(lambda a, b, c: np.testing.assert_allclose(a - b, c * weight, atol=5e-5), with_aux, without, aux)
    np.testing.assert_allclose(total - main, term * weight, rtol=1e-4)


def test_alpha_means_the_same_at_every_scale_of_the_data(x):
    """Scaling data and biases by 8 scales the loss by 64: no term keeps a unit of its own."""
    losses = []
    for scale in (1.0, 8.0):
        params = CONFIG.init(jax.random.key(0)).replace(b_dec=scale * jnp.linspace(-0.3, 0.3, 16))
        losses.append(WHOLE(params, scale * x, dead_latents(5))[0])
    np.testing.assert_allclose(losses[1], 64 * losses[0], rtol=1e-5)


def test_zero_when_nothing_is_dead(params, x):
    value, grads = VALUE_AND_GRAD(params, x, dead_latents(0))
    assert value == 0 and not any(np.any(g) for g in jax.tree.leaves(grads))


def test_finite_when_the_residual_has_no_variance(params):
    x = jnp.zeros((4, 16))
    aux = jax.jit(lambda weights: aux_k.aux_k_loss(weights, x, jnp.zeros_like(x), dead_latents(5), SETTINGS))
    value, grads = jax.value_and_grad(aux)(aux_k.Weights.of(params))
    assert np.isfinite(value) and all(np.all(np.isfinite(g)) for g in grads)


def test_auxiliary_values_pass_a_relu(params, x):
    silent = params.replace(b_enc=jnp.full(64, -100.0))
    dead = dead_latents(8)
    residual = jax.jit(lambda params: x - CONFIG.decode(params, CONFIG.encode(params, x)))(silent)
    expected = jnp.sum(residual**2) / jnp.sum((residual - residual.mean(0)[None, :]) ** 2)
    np.testing.assert_allclose(loss(silent, x, dead), expected, rtol=1e-5)  # nothing is decoded


def test_default_k_aux_is_half_of_d_in_capped_by_the_latents():
    assert sae.TopK(d_in=64, d_sae=256, k=4).n_aux == 32
    assert sae.TopK(d_in=64, d_sae=16, k=4).n_aux == 16
    assert sae.TopK(d_in=64, d_sae=256, k=4, k_aux=7).n_aux == 7


def test_many_dead_latents_pass_in_blocks_of_rows(monkeypatch):
    params, x = CONFIG.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (24, CONFIG.d_in))
    dead = dead_latents(CONFIG.d_sae)
    given = {"dead": dead, "step": jnp.zeros((), int)}
    together = jax.jit(lambda p: CONFIG.value_and_grad(p, x, **given))(params)
    assert aux_k._blocks(24, CONFIG.d_sae) == 1
    monkeypatch.setattr(aux_k, "_BLOCK_BYTES", 4 * CONFIG.d_sae * 5)  # 5 rows at most: 4 divide 24
    assert aux_k._blocks(24, CONFIG.d_sae) == 6
    blocks = jax.jit(lambda p: CONFIG.value_and_grad(p, x, **given))(params)
    for got, want in zip(jax.tree.leaves(blocks), jax.tree.leaves(together), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
