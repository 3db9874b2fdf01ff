"""Where the gradient of each loss term must and must not flow, for every architecture."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sae_examples import EXAMPLES, VARIANTS, moved

from saejax import sae

WEIGHTS = {"W_enc", "b_enc", "W_dec", "b_dec"}
ENCODER = {"W_enc", "b_enc", "b_dec"}  # b_dec: the encoder subtracts it
HIDDEN = {"W_hidden", "b_hidden"}
QUADRATIC = sae.JumpReLU(
    d_in=16, d_sae=64, penalty=sae.SparsityPenalty.quadratic, target_l0=4, bandwidth=0.3, threshold_init=0.3
)
# Every leaf that a term moves; all others must stay. AuxK is the same for all.
TABLE = {
    "topk": {"mse": WEIGHTS},
    "topk multi": {"mse": WEIGHTS, "multi_mse": WEIGHTS},
    "topk lista": {"mse": WEIGHTS},
    "l1": {"mse": WEIGHTS, "l1": {"W_enc", "b_enc", "W_dec"}},
    "l1 plain": {"mse": WEIGHTS, "l1": ENCODER},
    "l1 mlp": {"mse": WEIGHTS | HIDDEN, "l1": {"W_enc", "b_enc", "W_dec"} | HIDDEN},
    "batch_topk": {"mse": WEIGHTS},
    "jumprelu": {"mse": WEIGHTS | {"threshold"}, "sparsity": {"threshold"}},
    "jumprelu tanh": {name: WEIGHTS | {"threshold"} for name in ("mse", "sparsity", "pre_act")}
    | {"mse": WEIGHTS | {"threshold"}},
    "jumprelu quadratic": {"mse": WEIGHTS | {"threshold"}, "sparsity": {"threshold"}},
    "gated": {"mse": {"W_enc", "W_dec", "b_dec", "r_mag", "b_mag"}, "l1": ENCODER, "gate_mse": {"W_enc", "b_enc"}},
    "matryoshka": {"mse": WEIGHTS, "prefix_mse": WEIGHTS},
    "abs_topk": {"mse": WEIGHTS},
    "p_anneal": {"mse": WEIGHTS, "lp": ENCODER},
    "matching_pursuit": {"mse": WEIGHTS},
    "topk transcoder": {"mse": WEIGHTS | {"W_skip"}},
    "batch_topk crosscoder": {"mse": WEIGHTS},
    "l1 crosscoder": {"mse": WEIGHTS, "l1": {"W_enc", "b_enc", "W_dec"}},
    "jumprelu clt": {"mse": WEIGHTS | {"threshold"}, "sparsity": {"threshold"}},
}
DEAD = [3, 17, 40, 41, 63]


def leaves(params):
    return {name: getattr(params, name) for name in WEIGHTS} | params.extra


@pytest.mark.parametrize("name", ["l1", "l1 plain", "jumprelu", "gated"])
def test_pre_activations_have_the_gradients_of_the_affine_map(name):
    example = (EXAMPLES | VARIANTS)[name]
    params = moved(example.init(jax.random.key(0)))
    x = jax.random.normal(jax.random.key(1), (8, example.d_in))

    def plain(params, x):
        centred = x - params.b_dec[None, :] if example.centres else x
        return centred @ params.W_enc + params.b_enc[None, :]

    def gradients(pre_activations):
        return jax.grad(lambda *args: jnp.sum(jnp.sin(pre_activations(*args))), argnums=(0, 1))(params, x)

    mine, expected = gradients(lambda params, x: example.pre_activations(params, x, None)), gradients(plain)
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)  # sums of 8 x 64 float32 terms of size 1
    assert np.any(mine[0].b_dec) == example.centres == (name != "l1")


def test_every_architecture_is_in_the_table():
    assert set(sae.ARCHITECTURES) <= set(TABLE)


@pytest.mark.parametrize("name", TABLE)
def test_flow(name):
    config = (EXAMPLES | VARIANTS | {"jumprelu quadratic": QUADRATIC})[name]
    params = moved(config.init(jax.random.key(0)))
    dead = np.isin(np.arange(config.d_sae), DEAD)
    x = jnp.asarray(np.random.default_rng(2).standard_normal((48, config.d_row)) + 0.2, "float32")

    @jax.jit
    @jax.jacrev
    def gradients(params):
        return config.loss(params, x, dead=jnp.asarray(dead), step=jnp.asarray(4))[1].terms

    terms = {term: {n: np.asarray(g) for n, g in leaves(grads).items()} for term, grads in gradients(params).items()}
    assert terms.keys() == TABLE[name].keys() | {"aux_k"}
    for term, moves in TABLE[name].items():
        # Gated subtracts b_enc again, to rounding.
        found = {leaf for leaf, grad in terms[term].items() if np.abs(grad).max() > 1e-5}
        assert found == moves, term
    aux = terms["aux_k"]
    assert {leaf for leaf, grad in aux.items() if np.any(grad)} == {"W_enc", "b_enc", "W_dec"}
    for grad in (aux["W_enc"].T, aux["b_enc"][:, None], aux["W_dec"]):
        np.testing.assert_array_equal(np.any(grad != 0, axis=1), dead)
