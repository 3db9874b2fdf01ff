"""What is kept, what is refused, and how arrays come back without the training code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax import checkpoint, sharding
from saejax.errors import UserError
from saejax.sae import base


def state_on(mesh):
    """Parameters, a key and bf16 rows, placed by name."""
    tree = {
        "params": base.SAEParams(
            W_enc=jax.random.normal(jax.random.key(0), (6, 16)),
            b_enc=jnp.arange(16.0),
            W_dec=jax.random.normal(jax.random.key(1), (16, 6)),
            b_dec=jnp.ones(6),
        ),
        "rows": jax.random.normal(jax.random.key(2), (8, 3)).astype(jnp.bfloat16),
        "key": jax.random.key(7),
        "step": jnp.asarray(3, jnp.int32),
    }
    return jax.device_put(tree, sharding.tree_shardings(mesh, tree))


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def test_the_newest_and_the_best_are_kept(tmp_path):
    state = state_on(sharding.make_mesh())
    saver = checkpoint.Checkpoints(tmp_path, checkpoint.CheckpointConfig(keep_last=2, keep_best=1))
    for step, fvu in ((1, 0.5), (2, 0.2), (3, None), (4, 0.3), (5, 0.4)):
        saver.save(step, state, {"position": step}, fvu)
    saver.close()
    assert checkpoint.steps(tmp_path) == [2, 4, 5]


def test_bits_types_and_placement_survive_onto_another_mesh(tmp_path):
    before = state_on(sharding.make_mesh(4, 2))
    saver = checkpoint.Checkpoints(tmp_path, checkpoint.CheckpointConfig())
    saver.save(3, before, {"position": 17, "stream": "x"}, None)
    saver.wait()
    wanted = abstract(state_on(sharding.make_mesh(2, 4)))
    after, loader = saver.restore(wanted)
    saver.close()
    assert loader == {"position": 17, "stream": "x"}
    for path, leaf in jax.tree_util.tree_leaves_with_path(after):
        other = dict(jax.tree_util.tree_leaves_with_path(before))[path]
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf, other = jax.random.key_data(leaf), jax.random.key_data(other)
        assert leaf.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(other))
    assert after["params"].W_enc.sharding == wanted["params"].W_enc.sharding


def test_arrays_for_analysis_and_clear_refusals(tmp_path):
    with pytest.raises(UserError, match="no checkpoint in .*has the run saved yet"):
        checkpoint.load_arrays(tmp_path, ("params",))
    state = state_on(sharding.make_mesh(4, 2))
    saver = checkpoint.Checkpoints(tmp_path, checkpoint.CheckpointConfig())
    saver.save(3, state, {"position": 0}, None)
    saver.close()
    step, found = checkpoint.load_arrays(tmp_path, ("params",))
    assert step == 3 and found["params"]["W_enc"].sharding.device_set == {jax.local_devices()[0]}
    np.testing.assert_array_equal(found["params"]["W_dec"], state["params"].W_dec)
    with pytest.raises(UserError, match="step=9: .* holds 3"):
        checkpoint.load_arrays(tmp_path, ("params",), step=9)
    with pytest.raises(UserError, match="normalizer is missing"):
        checkpoint.load_arrays(tmp_path, ("normalizer",))


def test_a_disk_that_cannot_be_written_is_one_clear_line(tmp_path, monkeypatch):
    saver = checkpoint.Checkpoints(tmp_path, checkpoint.CheckpointConfig())
    saver.save(1, state_on(sharding.make_mesh()), {"position": 0}, None)
    saver.wait()

    class Full:
        def result(self):
            raise OSError(28, "No space left on device")

    saver._pending = Full()
    with pytest.raises(UserError, match="No space left on device; the last complete one is step 1"):
        saver.wait()
    saver.close()
