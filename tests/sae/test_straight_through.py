r"""Every straight-through estimator against finite differences of the objective that a kernel smooths.

Averaged over a window of thresholds, :math:`\bar L(\theta) = \frac1\epsilon \int_{|s| < \epsilon/2} L(\theta + s) ds`
has the derivative :math:`(L(\theta + \epsilon/2) - L(\theta - \epsilon/2)) / \epsilon`, of hard steps and jumps alone.
The estimator of a batch whose pre-activations are spread evenly around the threshold must give the same.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax import sae
from saejax.sae import jumprelu

D, WIDE, OTHERS, HALF = 5, 3, 4, 32
RNG = np.random.default_rng(0)
THETA = 0.4 + 0.4 * RNG.random(D)
W_DEC = RNG.standard_normal((D, WIDE)) * np.linspace(0.3, 0.9, D)[:, None]
EPSILON = 0.004


def config(penalty="step", **fields):
    """A linear encoder that reads its latents off the first D entries of a row."""
    return sae.JumpReLU(
        d_in=D + WIDE, d_sae=D, penalty=sae.SparsityPenalty[penalty], target_l0=2.0, aux_alpha=0.0,
        subtract_b_dec=False, unit_decoder=False, pre_act_coef=1.0, **{"bandwidth": EPSILON} | fields,
    )  # fmt: skip


def params():
    W_enc = np.zeros((D + WIDE, D))
    W_enc[:D] = np.eye(D)
    W_dec = np.concatenate([np.zeros((D, D)), W_DEC], axis=1)
    arrays = {"W_enc": W_enc, "b_enc": np.zeros(D), "W_dec": W_dec, "b_dec": 0.1 * RNG.standard_normal(D + WIDE)}
    arrays = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), arrays)
    return sae.SAEParams(**arrays, extra={"threshold": jnp.asarray(THETA, jnp.float32)})


PARAMS = params()


def batch(latent, spread):
    """Rows whose pre-activation of one latent is spread evenly over theta +- spread, all others far from theirs."""
    rng = np.random.default_rng(latent)
    others = THETA * np.where(rng.random((OTHERS, D)) < 0.5, 0.3, 1.9)
    grid = THETA[latent] + spread * (np.arange(-HALF, HALF) + 0.5) / HALF
    u = np.repeat(others, len(grid), axis=0)
    u[:, latent] = np.tile(grid, OTHERS)
    left = np.repeat(rng.standard_normal((OTHERS, WIDE)), len(grid), axis=0)
    return jnp.asarray(np.concatenate([u, left], axis=1), jnp.float32)


@jax.jit(static_argnums=(0, 1))
def term(config, name, moved, x):
    """One term of the objective at thresholds and encoder biases that are moved by [2, D]."""
    p = PARAMS.replace(b_enc=PARAMS.b_enc + moved[1], extra={"threshold": PARAMS.extra["threshold"] + moved[0]})
    return config.loss(p, x, dead=jnp.zeros(D, bool), step=jnp.asarray(0))[1].terms[name]


gradient = jax.jit(jax.grad(term, argnums=2), static_argnums=(0, 1))
STILL = jnp.zeros((2, D))


def both(case, which, *, ste_to_input=False, spread=EPSILON, step=EPSILON):
    """The gradient in the threshold (0) or the bias (1) of each latent in turn, and the central difference."""
    penalty, name, fields = CASES[case]
    chosen, found, expected = config(penalty, ste_to_input=ste_to_input, **fields), [], []
    for latent in range(D):
        x, to = batch(latent, spread), np.zeros((2, D), np.float32)
        to[which, latent] = step / 2
        found.append(gradient(chosen, name, STILL, x)[which, latent])
        expected.append(float(term(chosen, name, to, x) - term(chosen, name, -to, x)) / step)
    return np.array(found), np.array(expected)


CASES = {
    "mse": ("step", "mse", {}),
    "step": ("step", "sparsity", {}),
    "quadratic": ("quadratic", "sparsity", {}),
    # So small a slope that tanh is nearly straight up to theta: see the last but one test for larger ones.
    "tanh": ("tanh", "sparsity", {"tanh_scale": 0.1}),
    "pre_act": ("step", "pre_act", {}),
}
"""Penalty, name of the term, fields."""
NORMS = np.linalg.norm(W_DEC, axis=1)
# Rows that fire lie epsilon / 4 above theta on average, where the slope of the squared error is larger than at theta:
# theta times its curvature, 2 ||w||^2, over 8, in the half of the rows that the window holds.
CURVED = {"mse": THETA * NORMS**2 / 8}
# Of the others: a^2 / 6 for tanh, a <= 0.1 * 0.8 * 1.6, else two float32 losses of up to 6 over epsilon.
RTOL, ATOL = 3e-3, 2 * 6 * 6e-8 / EPSILON


def check(case, found, expected):
    bound = CURVED.get(case, 0) * 1.02 + RTOL * np.abs(expected) + ATOL
    assert np.all(np.abs(found - expected) <= bound), (found, expected, bound)
    assert np.abs(expected).max() > 20 * np.max(bound)  # the bound would notice


@pytest.mark.parametrize("case", CASES)
def test_thresholds_follow_the_smoothed_objective(case):
    check(case, *both(case, 0))


@pytest.mark.parametrize("case", CASES)
def test_with_ste_to_input_pre_activations_do_so_too(case):
    """Seen at the bias, which moves the pre-activations of all rows against their thresholds."""
    check(case, *both(case, 1, ste_to_input=True))


@pytest.mark.parametrize("case", CASES)
def test_without_it_they_have_the_derivative_between_the_jumps(case):
    """Rows are farther apart than the difference reaches, so that none crosses."""
    step = 0.2 / HALF / 2
    found, expected = both(case, 1, spread=0.2, step=step)
    np.testing.assert_allclose(found, expected, rtol=RTOL, atol=ATOL * EPSILON / step)
    assert np.any(found) == (case in ("mse", "tanh", "pre_act"))  # a count has none


@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
def test_tanh_takes_the_mean_of_its_slopes_at_both_ends_of_the_jump(scale):
    """Half of the window is at f = 0, half at theta: a (1 + sech^2 a) / 2 for the tanh a that the jump costs.

    They agree to a^2 / 6; where a = scale theta ||w|| is 1 the estimator pushes 0.93 times as hard, at 3 1.5 times.
    """
    paid, a = config("tanh", tanh_scale=scale), scale * THETA * NORMS
    for latent in range(D):
        x, to = batch(latent, EPSILON), np.zeros((2, D), np.float32)
        to[0, latent] = EPSILON / 2
        cost = float(term(paid, "sparsity", to, x) - term(paid, "sparsity", -to, x)) / EPSILON
        ratio = a[latent] * (1 + 1 / np.cosh(a[latent]) ** 2) / 2 / np.tanh(a[latent])
        np.testing.assert_allclose(gradient(paid, "sparsity", STILL, x)[0, latent] / cost, ratio, rtol=1e-2)


def test_window_is_open_and_as_wide_as_its_bandwidth():
    """The smoothed step is the ramp clip((u - theta) / epsilon + 1/2, 0, 1), by finite differences of the ramp."""
    u, theta, width = jnp.linspace(-1, 2, 61)[:, None] + 0.013, jnp.array([0.5]), 0.4
    pull = jax.vjp(lambda t: jumprelu.heaviside(u, t, width, False), theta)[1]
    for row in range(len(u)):
        found = pull(jnp.zeros_like(u).at[row].set(1.0))[0][0]
        ramp = [np.clip((float(u[row, 0]) - (0.5 + s)) / width + 0.5, 0, 1) for s in (1e-4, -1e-4)]
        np.testing.assert_allclose(found, (ramp[0] - ramp[1]) / 2e-4, atol=1e-3)
