"""The compiled step: what it changes, what it counts, and that it is compiled once."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_runs as runs

from saejax.parallel import sharding
from saejax.sae import base
from saejax.training import liveness, memory, optim, state, step


def start(architecture, n_lanes=8, n_batches=4, block_rows=16):
    """A state on one device with its step, and a stream of records."""
    cfg = runs.compose(architecture, 50)
    mesh, tx = sharding.make_mesh(), optim.make(cfg.optim, 50)
    rng = np.random.default_rng(0)
    placed = jax.NamedSharding(mesh, jax.P(sharding.DATA))

    def record(*lead):
        return jax.device_put(rng.normal(size=(n_lanes, *lead, block_rows, 64)).astype(np.float32), placed)

    made = step.make(cfg.sae, tx, dead_window_tokens=256, learning_rate=optim.schedule(cfg.optim, 50))
    born = state.create(cfg.sae, tx, cfg.train, cfg.normalize, record(n_batches), seed=0, mesh=mesh)
    return cfg, born, memory.compile_step(made, jax.tree.map(_abstract, born), placed, mesh), made, record


def _abstract(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


# Of every architecture test_frozen takes steps; here each way to select in one, and the rest nightly.
QUICK = ("topk", "jumprelu", "batch_topk")


@pytest.mark.parametrize(
    "architecture",
    [a if a in QUICK else pytest.param(a, marks=pytest.mark.nightly) for a in sorted(base.ARCHITECTURES)],
)
def test_one_step_counts_and_constrains(architecture):
    cfg, before, compiled, _, record = start(architecture)
    bits = jax.tree.map(np.array, before.params)  # copies: a view would keep the old buffers alive
    after, metrics = compiled(before, record())
    assert int(after.step) == 1 and all(np.isfinite(v) for v in metrics.values())
    # The state was donated: its old buffers are gone, so memory holds one copy.
    assert before.params.W_enc.is_deleted()
    assert not np.array_equal(bits.W_enc, after.params.W_enc) or float(metrics["lr"]) == 0
    if architecture == "topk":
        np.testing.assert_allclose(np.linalg.norm(after.params.W_dec, axis=1), 1, atol=1e-6)
    counts = np.asarray(after.liveness.tokens_since_fired)
    assert set(counts) <= {0, 8 * 16} and (counts == 0).any()
    assert float(metrics["dead_share"]) == 0


def test_the_draws_depend_on_the_step_and_the_seed_alone():
    _, first, compiled, _, record = start("topk")
    _, again, other, _, record_again = start("topk")
    for _ in range(3):
        fresh, same = record(), record_again()
        first, a = compiled(first, fresh)
        again, b = other(again, same)
        assert float(a["loss"]) == float(b["loss"])
    np.testing.assert_array_equal(first.buffer.rows, again.buffer.rows)


def test_five_steps_compile_once():
    _, born, _, made, record = start("topk")
    jitted = jax.jit(made, donate_argnums=0)
    for _ in range(5):
        born, _ = jitted(born, record())
    assert jitted._cache_size() <= 2  # the second entry: outputs are committed to their device, the first input was not
    for _ in range(3):
        born, _ = jitted(born, record())
    assert jitted._cache_size() <= 2


def test_a_latent_is_dead_after_its_window_and_alive_when_it_fires():
    live = liveness.init(3)
    for fired in ([1, 0, 0], [1, 1, 0], [1, 0, 0]):
        live = liveness.update(live, jnp.array(fired, bool), 100)
    assert live.tokens_since_fired.tolist() == [0, 100, 300]
    assert liveness.dead(live, 300).tolist() == [False, False, True]
    for _ in range(3):
        live = liveness.update(live, jnp.zeros(3, bool), liveness.MAX_TOKENS - 1)
    assert (np.asarray(live.tokens_since_fired) == liveness.MAX_TOKENS).all(), "saturates, never overflows"


def test_the_optimiser_is_clip_adam_and_schedule_by_hand():
    config = optim.OptimConfig(lr=0.1, clip_norm=1.0, warmup_share=0.0, decay_share=0.0)
    tx = optim.make(config, 10)
    params = {"w": np.array([3.0, 4.0], np.float32)}
    updates, opt_state = tx.update({"w": np.array([3.0, 4.0], np.float32)}, tx.init(params), params)
    # Clipped to norm 1; Adam's first step is lr * g / (|g| + eps).
    np.testing.assert_allclose(updates["w"], [-0.1, -0.1], rtol=1e-5)
    np.testing.assert_allclose(optax.tree.get(opt_state, "mu")["w"], 0.1 * np.array([0.6, 0.8]), rtol=1e-6)
