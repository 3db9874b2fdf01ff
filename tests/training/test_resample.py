"""Resampling: weights and moments of dead latents really change, nothing else does, on every mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_steps

from saejax.training import liveness, optim, resample

DEAD = np.array([3, 7, 20, 31])


def with_dead(steps, now):
    """The state in which DEAD have long been silent and can never fire again by themselves."""
    counters = now.liveness.tokens_since_fired.at[DEAD].set(liveness.MAX_TOKENS)
    params = dataclasses.replace(now.params, b_enc=now.params.b_enc.at[DEAD].set(-1e3))
    params = jax.device_put(params, jax.tree.map(lambda leaf: leaf.sharding, now.params))
    return dataclasses.replace(now, params=params, liveness=liveness.Liveness(tokens_since_fired=counters))


def latents_first(path, leaf):
    """A leaf with its latent axis first, None where it has none."""
    axis = resample.sharding.latent_axis(path, leaf)
    return None if axis is None else np.moveaxis(np.asarray(leaf), axis, 0)


@pytest.mark.parametrize("architecture, name", [("jumprelu", "adam"), ("l1", "muon"), ("l1", "schedule_free")])
def test_weights_and_everything_stored_change_for_dead_latents_and_only_for_them(architecture, name):
    steps = small_steps.Steps(
        architecture, f"optim.name={name}", "sae.d_sae=32", "sae.aux_alpha=0", "train.resample_every_steps=1000"
    )
    now, _ = steps.run(steps.born, [steps.record() for _ in range(3)])
    before = with_dead(steps, now)
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.normal(size=(128, 64)), jnp.float32)
    # Only rows 5, 6, 7, 8 are wrong, so these four are drawn, in some order.
    recon = x.at[5:9].add(jnp.asarray(rng.normal(size=(4, 64)), jnp.float32))
    dead = jnp.zeros(32, bool).at[DEAD].set(True)
    after, count = jax.jit(resample.apply, static_argnums=0)(steps.cfg.sae, before, x, recon, dead, jax.random.key(0))
    assert int(count) == 4
    alive = np.setdiff1d(np.arange(32), DEAD)
    old, new = (jax.tree_util.tree_leaves_with_path((s.params, s.opt_state)) for s in (before, after))
    seen = set()
    for (path, a), (_, b) in zip(old, new, strict=True):
        first, second = latents_first(path, a), latents_first(path, b)
        if first is None:
            np.testing.assert_array_equal(a, b)
            continue
        where = jax.tree_util.keystr(path)
        np.testing.assert_array_equal(first[alive], second[alive], err_msg=where)
        stored = "opt_state" if path[0].idx == 1 else "params"
        seen.add((stored, optim.leaf_name(path)))
        if stored == "params" and optim.leaf_name(path) != "threshold":
            assert (first[DEAD] != second[DEAD]).any(axis=tuple(range(1, first.ndim))).all(), where
        elif stored == "opt_state" and ".z" not in where:
            assert (second[DEAD] == 0).all(), where
            assert (first[alive] != 0).any(), "a moment that never was anything proves nothing"
    assert {("params", "W_enc"), ("opt_state", "W_enc"), ("opt_state", "W_dec"), ("opt_state", "b_enc")} <= seen
    if name == "schedule_free":
        np.testing.assert_array_equal(optax.tree.get(after.opt_state, "z").W_dec[DEAD], after.params.W_dec[DEAD])
        np.testing.assert_array_equal(after.average.W_enc[:, DEAD], after.params.W_enc[:, DEAD])
    if architecture == "jumprelu":
        np.testing.assert_array_equal(after.params.extra["threshold"][DEAD], np.float32(0.1))
    check_what_they_became(before.params, after.params, x, alive)
    assert (np.asarray(after.liveness.tokens_since_fired)[DEAD] == 0).all()


def check_what_they_became(before, after, x, alive):
    """Directions of the four rows, each once; norms by the recipe; biases 0."""
    centred = np.asarray(x - before.b_dec[None, :])
    rows = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    W_dec, W_enc = np.asarray(after.W_dec)[DEAD], np.asarray(after.W_enc)[:, DEAD].T
    cosines = W_dec / np.linalg.norm(W_dec, axis=1, keepdims=True) @ rows.T
    assert sorted(cosines.argmax(1)) == [5, 6, 7, 8] and (cosines.max(1) > 1 - 1e-5).all()
    np.testing.assert_allclose(
        np.linalg.norm(W_dec, axis=1), np.linalg.norm(np.asarray(before.W_dec)[alive], axis=1).mean(), rtol=1e-5
    )
    share = 0.2 * np.linalg.norm(np.asarray(before.W_enc)[:, alive], axis=0).mean()
    np.testing.assert_allclose(W_enc, share * rows[cosines.argmax(1)], rtol=1e-4, atol=1e-6)
    assert (np.asarray(after.b_enc)[DEAD] == 0).all()


def test_rows_are_drawn_in_proportion_to_their_squared_loss():
    losses = jnp.array([1.0, 2.0, 3.0, 0.0])
    dead = jnp.array([False, True, False])
    draw = jax.vmap(lambda key: resample._draw(losses, dead, key)[1][1])
    counts = np.bincount(np.asarray(draw(jax.random.split(jax.random.key(0), 8000))), minlength=4) / 8000
    # Standard error of a share: at most sqrt(.25 / 8000) = .0056; four of them.
    np.testing.assert_allclose(counts, np.array([1, 4, 9, 0]) / 14, atol=0.0224)


def test_a_batch_serves_no_more_latents_than_it_has_rows():
    chosen, rows = resample._draw(jnp.ones(3), jnp.array([True, False, True, True, True]), jax.random.key(0))
    assert chosen.tolist() == [True, False, True, True, False]
    assert sorted(np.asarray(rows)[[0, 2, 3]].tolist()) == [0, 1, 2]


def test_the_step_resamples_when_it_is_due_alike_on_every_mesh():
    found = []
    for mesh in ((1, 1), (4, 2)):
        steps = small_steps.Steps(
            "l1", "sae.d_sae=32", "sae.aux_alpha=0", "train.resample_every_steps=2", "sae.l1_coef=0", mesh=mesh
        )
        now, history = steps.run(with_dead(steps, steps.born), [steps.record() for _ in range(4)])
        assert [metrics["resampled"] for metrics in history] == [0, 4, 0, 0]
        # They fire again.
        assert (np.asarray(now.liveness.tokens_since_fired)[DEAD] == 0).any()
        found.append(([metrics["loss"] for metrics in history], np.asarray(now.params.W_dec)))
    np.testing.assert_allclose(found[1][0], found[0][0], rtol=1e-5)
    np.testing.assert_allclose(found[1][1], found[0][1], rtol=1e-4, atol=1e-5)
