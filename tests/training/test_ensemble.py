"""A vmapped ensemble of n equals n runs: the pure step over stacked states, compiled once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_runs as runs
from small_steps import Steps, bits

STEPS = 5
# Seeds with their numbers of latents that begin dead and silent: none, fewer and more than k_aux = 32 (of 128).
MEMBERS = {0: 0, 1: 5, 2: 70}
# Products over a stack of matrices add up in another order: a rounding of the largest entry, 6e-8, in each of some five
# sums in a row, at each step; less than 6e-7 was measured. Optimisers divide by what they have seen, so entries that
# are small beside the largest are not held to more.
TOLERANCE = 2e-6


def member(born, sparsifier, seed, n_dead):
    """A state with parameters and draws of another seed."""
    params = sparsifier.init(jax.random.key(seed))
    silent = jnp.arange(sparsifier.d_sae) < n_dead
    # Positive but never among the best or above a threshold: silent, and AuxK moves them; a ReLU needs less.
    bias = 1e-3 if hasattr(sparsifier, "k") or "threshold" in params.extra else -9.0
    params = dataclasses.replace(
        params,
        W_enc=jnp.where(silent[None, :], 1e-3 * params.W_enc, params.W_enc),
        b_enc=jnp.where(silent, bias, params.b_enc),
        b_dec=born.params.b_dec,
    )
    return dataclasses.replace(
        born,
        params=params,
        liveness=dataclasses.replace(born.liveness, tokens_since_fired=jnp.where(silent, 10_000, 0)),
        key=jax.random.key(100 + seed),
    )


@pytest.mark.parametrize("architecture", runs.every_architecture("topk"))
def test_an_ensemble_equals_its_runs(architecture):
    """With AuxK all along and a resampling on the way; the rows are shared, as in a sweep over one stream."""
    one = Steps(architecture, "train.dead_after_tokens=1024", "train.resample_every_steps=4")
    records = [one.record() for _ in range(STEPS)]
    starts = [member(one.born, one.cfg.sae, seed, n_dead) for seed, n_dead in MEMBERS.items()]
    placed, history = jax.NamedSharding(one.mesh, jax.P()), []
    together = jax.jit(jax.vmap(one.made, in_axes=(0, None)), out_shardings=placed)
    states = jax.device_put(jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts), placed)
    with jax.set_mesh(one.mesh):
        for fresh in records:
            states, metrics = together(states, fresh)
            history.append(metrics)
    assert together._cache_size() == 1
    found, resampled = bits(states), np.sum([now["resampled"] for now in history], axis=0)
    for n, start in enumerate(starts):
        end, alone = one.run(start, records)
        for name, leaf in bits(end).items():
            if np.issubdtype(leaf.dtype, np.floating):
                np.testing.assert_allclose(found[name][n], leaf, rtol=0, atol=TOLERANCE * np.abs(leaf).max())
            else:
                np.testing.assert_array_equal(found[name][n], leaf, err_msg=name)  # counters, keys, the step
        for now, then in zip(history, alone, strict=True):
            for name, value in then.items():
                np.testing.assert_allclose(now[name][n], value, rtol=TOLERANCE, err_msg=name)
    if one.cfg.sae.lr_scales().get("b_enc") != 0:  # the encoder of a pursuit is its decoder: they fire again
        np.testing.assert_array_equal(resampled, list(MEMBERS.values()))
