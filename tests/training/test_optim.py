"""Update rules against their definitions; each resumes bit for bit and lies on its mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_steps

from saejax.errors import UserError
from saejax.parallel import sharding
from saejax.storage import checkpoint
from saejax.training import optim, state

NAMES = [rule.name for rule in optim.Optimiser]
PLAIN = ("l1", "sae.d_sae=32", "sae.aux_alpha=0")  # compiles fastest
FREE = ("optim.name=schedule_free", "optim.lr=0.05")
FLAT = {"warmup_share": 0.0, "decay_share": 0.0, "clip_norm": None}


@pytest.mark.parametrize("name", NAMES)
def test_three_steps_saved_restored_and_three_more_equal_six(name, tmp_path):
    steps = small_steps.Steps(*PLAIN, f"optim.name={name}")
    records = [steps.record() for _ in range(6)]
    straight, history = steps.run(steps.born, records)
    half, _ = steps.run(steps.born, records[:3])
    checkpoints = checkpoint.Checkpoints(tmp_path, checkpoint.CheckpointConfig())
    checkpoints.save(3, half, {"at": 3}, None)
    checkpoints.wait()
    cfg = steps.cfg
    rows = jax.ShapeDtypeStruct(half.buffer.rows.shape, half.buffer.dtype)
    wanted = state.abstract(cfg.sae, steps.tx, cfg.train, cfg.normalize, rows, mesh=steps.mesh)
    restored, _ = checkpoints.restore(wanted)
    checkpoints.close()
    resumed, again = steps.run(restored, records[3:])
    assert again == history[3:]
    expected, found = small_steps.bits(straight), small_steps.bits(resumed)
    assert expected.keys() == found.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)


@pytest.mark.parametrize("name", NAMES)
def test_what_an_optimiser_stores_is_split_like_the_parameters(name):
    cfg = small_steps.runs.compose("jumprelu", 4, f"optim.name={name}")
    tx, mesh = optim.make(cfg.optim, 4, cfg.sae.lr_scales()), sharding.make_mesh(4, 2)
    rows = jax.ShapeDtypeStruct((8, 4, 16, 64), jnp.float32)
    wanted = state.abstract(cfg.sae, tx, cfg.train, cfg.normalize, rows, mesh=mesh)
    found = jax.tree_util.tree_leaves_with_path(wanted.opt_state)
    large = [(path, leaf) for path, leaf in found if leaf.size >= cfg.sae.d_sae]
    assert {optim.leaf_name(path) for path, _ in large} >= {"W_enc", "W_dec", "b_enc", "threshold"}
    for path, leaf in large:
        expected = sharding.spec_of(path)
        assert leaf.sharding.spec == expected, jax.tree_util.keystr(path)


@pytest.mark.parametrize("name", ["muon", "schedule_free"])  # those that mix latents, or store parameters
def test_the_mesh_does_not_show(name):
    losses = []
    for mesh in ((1, 1), (4, 2)):
        steps = small_steps.Steps(*PLAIN, f"optim.name={name}", "optim.warmup_share=0", mesh=mesh)
        _, history = steps.run(steps.born, [steps.record() for _ in range(5)])
        losses.append([metrics["loss"] for metrics in history])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


def one_update(config, gradient, n=1):
    """The n-th update of a matrix W and a vector b under a constant gradient."""
    tx = optim.make(config, 10)
    params = jax.tree.map(jnp.zeros_like, gradient)
    stored = tx.init(params)
    for _ in range(n):
        updates, stored = tx.update(gradient, stored, params)
        params = optax.apply_updates(params, updates)
    return updates, params


def test_muon_orthogonalises_matrices_at_adams_size_and_leaves_vectors_to_adam():
    rng = np.random.default_rng(0)
    gradient = {"W": jnp.asarray(rng.normal(size=(8, 32)), jnp.float32), "b": jnp.asarray([2.0, -3.0])}
    updates, _ = one_update(optim.OptimConfig(name=optim.Optimiser.muon, lr=0.1, **FLAT), gradient)
    np.testing.assert_allclose(updates["b"], [-0.1, 0.1], rtol=1e-5)
    singular = np.linalg.svd(np.asarray(updates["W"]), compute_uv=False)
    # Five Newton-Schulz iterations leave singular values in [0.68, 1.13] (Jordan et al.), here times 0.2 sqrt(32) lr.
    assert (singular / (0.1 * 0.2 * 32**0.5) > 0.65).all() and (singular / (0.1 * 0.2 * 32**0.5) < 1.2).all()
    left, _, right = np.linalg.svd(np.asarray(gradient["W"]), full_matrices=False)
    cosine = -np.sum(np.asarray(updates["W"]) * (left @ right)) / np.linalg.norm(updates["W"]) / 8**0.5
    assert cosine > 0.98
    rms = np.sqrt(np.mean(np.square(updates["W"])))
    assert 0.2 * 0.1 * 0.65 < rms < 0.2 * 0.1 * 1.2


def test_sign_is_the_sign_of_the_running_gradient():
    config = optim.OptimConfig(name=optim.Optimiser.sign, lr=0.1, beta1=0.9, **FLAT)
    tx = optim.make(config, 10)
    stored = tx.init({"b": jnp.zeros(3)})
    _, stored = tx.update({"b": jnp.array([10.0, 1.0, 0.0])}, stored, {"b": jnp.zeros(3)})
    updates, _ = tx.update({"b": jnp.array([-5.0, -5.0, 0.0])}, stored, {"b": jnp.zeros(3)})
    # 0.9 * 1 - 0.5 = 0.4; 0.9 * 0.1 - 0.5 = -0.41.
    np.testing.assert_allclose(updates["b"], [-0.1, 0.1, 0.0], atol=1e-7)


def test_schedule_free_by_hand():
    config = optim.OptimConfig(name=optim.Optimiser.schedule_free, lr=0.1, beta1=0.8, **FLAT)
    tx, gradient = optim.make(config, 10), {"b": jnp.array([2.0])}
    params = {"b": jnp.array([1.0])}
    stored = tx.init(params)
    x = z = y = 1.0
    for t in range(4):
        updates, stored = tx.update(gradient, stored, params)
        params = optax.apply_updates(params, updates)
        z -= 0.1  # a constant gradient over its root mean square is 1
        x += (z - x) / (t + 1)
        y = 0.8 * x + 0.2 * z
        np.testing.assert_allclose(params["b"], y, rtol=1e-5)
        np.testing.assert_allclose(optim.average(stored, params)["b"], x, rtol=1e-5)


def test_a_frozen_leaf_of_schedule_free_keeps_what_others_write_into_it():
    config = optim.OptimConfig(name=optim.Optimiser.schedule_free, **FLAT)
    tx = optim.make(config, 10, {"threshold": 0.0})
    params = {"b": jnp.ones(2), "threshold": jnp.zeros(())}
    stored = tx.init(params)
    params["threshold"] = jnp.array(3.0)
    updates, _ = tx.update({"b": jnp.ones(2), "threshold": jnp.ones(())}, stored, params)
    assert float(updates["threshold"]) == 0 and (np.asarray(updates["b"]) != 0).all()


def test_the_fast_iterate_of_schedule_free_stays_on_the_constraint():
    steps = small_steps.Steps(*PLAIN, "sae.unit_decoder=true", "sae.decoder_init_norm=1", *FREE)
    now, _ = steps.run(steps.born, [steps.record() for _ in range(4)])
    for rows in (now.params.W_dec, now.average.W_dec, optax.tree.get(now.opt_state, "z").W_dec):
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    assert np.abs(now.params.W_dec - now.average.W_dec).max() > 1e-3


def test_cosine_ramps_meet_linear_ones_at_their_ends_and_in_the_middle():
    given = {"lr": 2.0, "warmup_share": 0.2, "decay_share": 0.4}
    linear = optim.schedule(optim.OptimConfig(**given), 100)
    cosine = optim.schedule(optim.OptimConfig(**given, warmup=optim.Ramp.cosine, decay=optim.Ramp.cosine), 100)
    for step in (0, 10, 20, 40, 60, 80, 100):
        np.testing.assert_allclose(float(cosine(step)), float(linear(step)), atol=1e-6)
    np.testing.assert_allclose(float(cosine(5)), 2 * (1 - np.cos(np.pi / 4)) / 2, rtol=1e-5)
    np.testing.assert_allclose(float(cosine(70)), 2 * (1 + np.cos(np.pi / 4)) / 2, rtol=1e-5)


def test_schedule_free_has_no_decay_and_width_scales_the_peak():
    free = optim.schedule(optim.OptimConfig(name=optim.Optimiser.schedule_free, lr=1.0), 100)
    assert float(free(5)) == float(free(99)) == 1.0
    cfg = small_steps.runs.compose("topk", 10, "optim.lr=0.1", "optim.lr_reference_d_sae=32", "optim.warmup_share=0")
    assert cfg.sae.d_sae == 128
    assert float(optim.schedule(cfg.optim, 10, cfg.sae.d_sae)(0)) == pytest.approx(0.05)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["optim.name=schedule_free", "optim.beta1=0"], "optim.beta1 must be above 0 with optim.name=schedule_free"),
        (["optim.name=schedule_free", "train.ema_decay=0.9"], "train.ema_decay must be null with"),
        (["optim.lr_reference_d_sae=0"], "optim.lr_reference_d_sae must be at least 1 or null, got 0"),
        (["optim.name=adan"], "optim.name: Invalid value 'adan'"),
    ],
)
def test_impossible_settings_are_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        small_steps.runs.compose("topk", 4, *overrides)
