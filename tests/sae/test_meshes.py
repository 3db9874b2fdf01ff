"""Fifty Adam steps give the same losses and the same selections on every mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from sae_examples import SITES

from saejax import sae
from saejax.parallel import sharding

MESHES = [(1, 1), (8, 1), (4, 2), (2, 4), (1, 8)]
D_IN, D_SAE, B, STEPS = 16, 64, 32, 50
CONFIGS = {
    # Up to 20 latents are dead at once: AuxK runs with fewer and with more than k_aux of them.
    "topk": sae.TopK(d_in=D_IN, d_sae=D_SAE, k=4, k_aux=3),
    # 20 latents exceed the 8 that one of eight shards holds.
    "topk wide": sae.TopK(d_in=D_IN, d_sae=D_SAE, k=20, k_aux=12),
    "l1": sae.L1(d_in=D_IN, d_sae=D_SAE, l1_coef=0.3, l1_warmup_steps=10),
}
SIZES = {"d_in": D_IN, "d_sae": D_SAE, "k_aux": 3}
NEWER = {
    "batch_topk": sae.BatchTopK(**SIZES, k=4),
    "jumprelu": sae.JumpReLU(**SIZES, l0_coef=0.01, bandwidth=0.2, threshold_init=0.1),
    "gated lista": sae.Gated(**SIZES, encoder=sae.EncoderKind.lista),
    "matryoshka topk": sae.Matryoshka(**SIZES, k=4, selection=sae.Selection.topk, encoder=sae.EncoderKind.mlp),
    "abs_topk": sae.AbsTopK(**SIZES, k=4),
    "p_anneal": sae.PAnneal(**SIZES, anneal_steps=10),
    "matching_pursuit": sae.MatchingPursuit(**SIZES, k=4),
} | SITES
"""One step on fewer meshes: what they share with the others is tried above. (A pursuit amplifies rounding.)"""
TX = optax.adam(3e-3)


@functools.partial(jax.jit, static_argnums=0)
def step(config, params, opt, quiet, x, n):
    """One step; a latent is dead when it has not fired for three."""
    grad = jax.value_and_grad(config.loss, has_aux=True)
    (loss, aux), grads = grad(params, x, dead=quiet >= 3, step=n)
    updates, opt = TX.update(config.project(params, grads), opt, params)
    params = config.track(config.constrain(optax.apply_updates(params, updates)), aux, n)
    quiet = jnp.where(aux.encoding.fired(), 0, quiet + 1)
    return params, opt, quiet, loss, aux.encoding.indices, jnp.sum(quiet >= 3)


def run(config, shape):
    """Returns the losses, the selections and the numbers of dead latents of all steps."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((40, D_IN)) / np.sqrt(D_IN)
    codes = rng.random((STEPS, B, 40)) * (rng.random((STEPS, B, 40)) < 0.1)
    data = (codes @ features).astype(np.float32)
    params = config.init(jax.random.key(0))
    losses, chosen, dead = [], [], []
    mesh = sharding.make_mesh(*shape)
    with jax.set_mesh(mesh):
        state = (params, TX.init(params), {"tokens_since_fired": jnp.zeros(D_SAE, jnp.int32)})
        params, opt, liveness = jax.device_put(state, sharding.tree_shardings(mesh, state))
        quiet = liveness["tokens_since_fired"]
        for n, x in enumerate(data):
            x = jax.device_put(x, jax.sharding.NamedSharding(mesh, P("data")))
            params, opt, quiet, loss, indices, n_dead = step(config, params, opt, quiet, x, n)
            losses.append(float(loss))
            dead.append(int(n_dead))
            chosen.append(indices)
    return np.array(losses), jax.device_get(chosen), dead


@functools.lru_cache
def reference(name):
    return run(CONFIGS[name], (1, 1))


def quick(name, shape):
    """Every mesh for one, and for the others those that split the latents over two and over all devices."""
    return name == "topk" or shape in ((4, 2), (1, 8))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        pytest.param(name, shape, id=f"{name}-{shape}", marks=() if quick(name, shape) else pytest.mark.nightly)
        for name in CONFIGS
        for shape in MESHES[1:]
    ],
)
def test_same_losses_and_selections(name, shape):
    losses, chosen, dead = run(CONFIGS[name], shape)
    expected, expected_chosen, expected_dead = reference(name)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert dead == expected_dead
    for n, (mine, other) in enumerate(zip(chosen, expected_chosen, strict=True)):
        np.testing.assert_array_equal(mine, other, err_msg=f"step {n}")


# Encoders with loops take long to compile for a mesh; crosscoders share all but a norm with other members.
COSTLY = ("gated lista", "matching_pursuit", "batch_topk crosscoder", "l1 crosscoder")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.nightly) if n in COSTLY else n for n in NEWER])
def test_same_gradients_and_codes_of_the_newer(name):
    config = NEWER[name]
    dead = jnp.arange(config.d_sae) < 10
    rows = np.random.default_rng(0).standard_normal((B, config.d_row)).astype(np.float32)
    start = config.init(jax.random.key(0))

    def one_step(params, x):
        grad = jax.grad(lambda p: config.loss(p, x, dead=dead, step=jnp.asarray(3)), has_aux=True)
        grads, aux = grad(params)
        params = config.track(config.constrain(params), aux, jnp.asarray(3))
        return (
            config.project(params, grads),
            aux.encoding.dense(),
            params.extra,
            config.encode(params, config.split(x)[0]).dense(),
        )

    expected = jax.jit(one_step)(start, rows)
    for shape in [(4, 2), (1, 8)]:
        mesh = sharding.make_mesh(*shape)
        with jax.set_mesh(mesh):
            params = jax.device_put(start, sharding.tree_shardings(mesh, start))
            found = jax.jit(one_step)(params, jax.device_put(rows, jax.NamedSharding(mesh, P("data"))))
        # Float32 sums of 32 numbers of O(1) in another order.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-6), found, expected)


def test_the_run_learns_and_uses_both_forms_of_aux_k():
    losses, _, dead = reference("topk")
    assert losses[-1] < 0.7 * losses[0]
    assert 0 in dead and any(0 < n <= 3 for n in dead) and any(n > 3 for n in dead)
