"""TopK by hand, its constraint and its projection."""

import jax
import jax.numpy as jnp
import numpy as np

from saejax import sae


def by_hand():
    config = sae.TopK(d_in=2, d_sae=3, k=2)
    params = sae.SAEParams(
        W_enc=jnp.array([[1.0, 0.0, -1.0], [0.0, 1.0, 0.0]]),
        b_enc=jnp.array([0.0, 0.5, 0.0]),
        W_dec=jnp.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]),
        b_dec=jnp.array([1.0, 0.0]),
    )
    return config, params


def test_centres_selects_then_clips():
    config, params = by_hand()
    # x - b_dec = (2, -3): pre_acts (2, -2.5, -2); the two best are 2 and -2, and -2 is clipped.
    encoding = config.encode(params, jnp.array([[3.0, -3.0]]))
    assert encoding.dense().tolist() == [[2.0, 0.0, 0.0]]
    assert encoding.l0().tolist() == [1.0]
    assert config.decode(params, encoding).tolist() == [[3.0, 0.0]]


def test_loss_sums_over_d_in_and_averages_over_rows():
    config, params = by_hand()
    x = jnp.array([[3.0, -3.0], [1.0, 1.0]])  # errors (0, -3) and, code (0, 1.5, 0), (0, -0.5)
    loss, aux = config.loss(params, x, dead=jnp.zeros(3, bool), step=jnp.zeros((), int))
    assert float(loss) == float(aux.terms["mse"]) == (9 + 0.25) / 2
    assert float(aux.terms["aux_k"]) == 0


def test_aux_alpha_zero_has_no_aux_term():
    config = sae.TopK(d_in=2, d_sae=3, k=2, aux_alpha=0.0)
    _, aux = config.loss(by_hand()[1], jnp.ones((1, 2)), dead=jnp.ones(3, bool), step=jnp.zeros((), int))
    assert set(aux.terms) == {"mse"}


def test_constraint_and_projection():
    config = sae.TopK(d_in=16, d_sae=64, k=4)
    params = config.init(jax.random.key(0))
    stretched = params.replace(W_dec=params.W_dec * jnp.arange(1.0, 65.0)[:, None])
    np.testing.assert_allclose(config.constrain(stretched).W_dec, params.W_dec, rtol=1e-6)
    grads = params.replace(W_dec=jax.random.normal(jax.random.key(1), (64, 16)))
    tangent = config.project(params, grads)
    np.testing.assert_allclose(jnp.sum(tangent.W_dec * params.W_dec, axis=1), 0, atol=2e-6)
    np.testing.assert_array_equal(tangent.W_enc, grads.W_enc)
