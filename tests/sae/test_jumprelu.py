"""JumpReLU: the straight-through estimator by hand, its penalties, and a threshold that stays at or above 0."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax import sae
from saejax.sae import jumprelu
from saejax.training import optim

# Thresholds 0.5, bandwidth 0.25: the window is (0.375, 0.625).
U = jnp.array([[0.3, 0.4, 0.5, 0.6, 0.7]])
THETA = jnp.full(5, 0.5)
FIRES = np.array([[0, 0, 0, 1, 1]])  # strictly above
WINDOW = np.array([[0, 4, 4, 4, 0]])  # K / bandwidth
COTANGENT = jnp.array([[1.0, 2.0, 3.0, 4.0, 5.0]])


@pytest.mark.parametrize("ste_to_input", [False, True])
@pytest.mark.parametrize("function, slope", [(jumprelu.jump, 0.5), (jumprelu.heaviside, 1.0)])
def test_pseudo_derivatives_are_those_of_the_paper(function, slope, ste_to_input):
    value, pull = jax.vjp(lambda u, t: function(u, t, 0.25, ste_to_input), U, THETA)
    is_jump = function is jumprelu.jump
    np.testing.assert_allclose(value, FIRES * (U if is_jump else 1), rtol=1e-6)
    d_u, d_theta = pull(COTANGENT)
    np.testing.assert_allclose(d_theta, -(slope * WINDOW * COTANGENT)[0], rtol=1e-6)
    usual = FIRES * COTANGENT if is_jump else 0 * COTANGENT
    np.testing.assert_allclose(d_u, usual + ste_to_input * slope * WINDOW * COTANGENT, rtol=1e-6)


@pytest.mark.parametrize("penalty, expected", [("step", 1.5), ("quadratic", 2 / 3 * (1.5 - 3) ** 2), ("tanh", None)])
def test_penalties_by_hand(penalty, expected):
    config = sae.JumpReLU(
        d_in=3, d_sae=3, penalty=sae.SparsityPenalty[penalty], target_l0=3, l0_coef=2.0, l0_warmup_steps=4,
        tanh_scale=2.0, threshold_init=0.5,
    )  # fmt: skip
    params = config.init(jax.random.key(0)).replace(W_enc=jnp.eye(3), W_dec=jnp.eye(3))
    x = jnp.array([[1.0, 0.5, 2.0], [0.4, 0.6, -1.0]])  # fires 1, -, 2 and -, 0.6, -
    loss, aux = config.loss(params, x, dead=jnp.zeros(3, bool), step=jnp.asarray(1))
    if expected is None:
        expected = (np.tanh(2) + np.tanh(4) + np.tanh(1.2)) / 2
    np.testing.assert_allclose(aux.terms["sparsity"], expected, rtol=1e-6)
    mse = (0.25 + 0.16 + 1.0) / 2
    np.testing.assert_allclose(aux.terms["mse"], mse, rtol=1e-6)
    np.testing.assert_allclose(loss, mse + 2.0 / 4 * expected, rtol=1e-6)


def test_thresholds_stay_at_or_above_zero():
    config = sae.JumpReLU(d_in=2, d_sae=3)
    params = config.init(jax.random.key(0)).replace(extra={"threshold": jnp.array([-0.1, 0.0, 0.2])})
    np.testing.assert_array_equal(config.constrain(params).extra["threshold"], np.float32([0, 0, 0.2]))


def test_the_optimiser_scales_single_leaves_and_freezes_them():
    plain = optim.OptimConfig(lr=0.1, warmup_share=0.0, decay_share=0.0)
    config = sae.JumpReLU(d_in=2, d_sae=3, threshold_lr_factor=0.25)
    params = config.init(jax.random.key(0))
    grads = jax.tree.map(jnp.ones_like, params)

    def updates(scales):
        tx = optim.make(plain, 10, scales)
        return tx.update(grads, tx.init(params), params)[0]

    usual, scaled, frozen = updates(None), updates(config.lr_scales()), updates({"b_enc": 0.0})
    np.testing.assert_allclose(scaled.extra["threshold"], usual.extra["threshold"] / 4, rtol=1e-6)
    np.testing.assert_array_equal(scaled.W_dec, usual.W_dec)
    assert not np.any(frozen.b_enc) and np.all(frozen.W_enc != 0)
