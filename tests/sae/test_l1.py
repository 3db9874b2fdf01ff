"""L1: the penalty by hand, its warm-up, and the gradient at a zero decoder row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax import sae

PARAMS = sae.SAEParams(
    W_enc=jnp.array([[1.0, 0.0], [0.0, 1.0]]),
    b_enc=jnp.zeros(2),
    W_dec=jnp.array([[3.0, 4.0], [0.0, 2.0]]),
    b_dec=jnp.array([0.0, 1.0]),
)
ALIVE = jnp.zeros(2, bool)


def test_penalty_is_the_latent_times_its_decoder_norm():
    config = sae.L1(d_in=2, d_sae=2, l1_coef=0.5)
    x = jnp.array([[1.0, 2.0], [-1.0, 1.0]])
    # Latents (1, 2) and (0, 1); norms 5 and 2: penalties 9 and 2, mean 5.5.
    # Reconstructions (3, 9) and (0, 3): squared errors 4 + 49 and 1 + 4, mean 29.
    loss, aux = config.loss(PARAMS, x, dead=ALIVE, step=jnp.zeros((), int))
    assert float(aux.terms["l1"]) == 5.5
    assert float(aux.terms["mse"]) == 29.0
    assert float(loss) == 29.0 + 0.5 * 5.5


def test_penalty_does_not_change_when_scale_moves_between_latent_and_decoder():
    config = sae.L1(d_in=2, d_sae=2)
    x = jnp.array([[1.0, 2.0], [-1.0, 1.0]])
    by = jnp.array([4.0, 0.25])
    moved = PARAMS.replace(W_enc=PARAMS.W_enc * by[None, :], W_dec=PARAMS.W_dec / by[:, None])
    losses = [config.loss(p, x, dead=ALIVE, step=jnp.asarray(0))[0] for p in (PARAMS, moved)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)


@pytest.mark.parametrize(
    ("warmup", "step", "expected"), [(0, 0, 2.0), (10, 0, 0.0), (10, 5, 1.0), (10, 10, 2.0), (10, 99, 2.0)]
)
def test_warmup(warmup, step, expected):
    config = sae.L1(d_in=2, d_sae=2, l1_coef=2.0, l1_warmup_steps=warmup)
    assert float(jax.jit(config.coefficient)(jnp.asarray(step))) == expected


def test_gradient_is_finite_at_a_zero_decoder_row():
    config = sae.L1(d_in=2, d_sae=2)
    params = PARAMS.replace(W_dec=PARAMS.W_dec.at[0].set(0.0))
    grads = jax.grad(lambda p: config.loss(p, jnp.ones((3, 2)), dead=ALIVE, step=jnp.asarray(0))[0])(params)
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))


def test_nothing_is_constrained():
    config = sae.L1(d_in=2, d_sae=2)
    assert config.constrain(PARAMS) is PARAMS and config.project(PARAMS, PARAMS) is PARAMS
