"""What is kept, what is refused, and how arrays come back without the training code."""

import gc
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax.errors import UserError
from saejax.parallel import sharding
from saejax.sae import base
from saejax.storage import array_checksums, checkpoint, checkpoint_record


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


def test_saves_leave_nothing_in_memory(tmp_path):
    state = state_on(sharding.make_mesh())
    saver = checkpoint.Checkpoints(tmp_path, checkpoint.CheckpointConfig())

    def lists_after(steps):
        for step in steps:
            saver.save(step, state, {"position": step}, None)
        saver.wait()
        gc.collect()
        return sum(type(found) is list for found in gc.get_objects())

    before = lists_after(range(3))
    assert lists_after(range(3, 8)) < before + 50, "Orbax's telemetry left 22 lists per save"
    saver.close()


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


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB."""
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(path)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no right to mount a small file system")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


def test_orbax_is_not_asked_where_nothing_may_be_written(tmp_path, monkeypatch, caplog):
    """Its threads would wait for minutes, also when the program wants to end."""
    asked = []

    def refused(**_):
        raise PermissionError("Permission denied")

    saver = checkpoint.Checkpoints(tmp_path, checkpoint.CheckpointConfig())
    monkeypatch.setattr(checkpoint.atomic.tempfile, "TemporaryFile", refused)
    monkeypatch.setattr(saver._checkpointer, "save_checkpointables_async", lambda *_, **__: asked.append(True))
    saver.save(1, state_on(sharding.make_mesh()), {"position": 1}, None)
    assert not asked and "CHECKPOINT NOT WRITTEN" in caplog.text
    saver.close()


def test_a_full_disk_stops_no_run_and_costs_no_checkpoint(small_disk, monkeypatch, caplog):
    """Saves fail loudly while the disk is full, and work again as soon as there is room."""
    monkeypatch.setattr(checkpoint, "PAUSE_SECONDS", 0.0)
    state = state_on(sharding.make_mesh()) | {"noise": jax.random.bits(jax.random.key(5), (200_000,))}
    saver = checkpoint.Checkpoints(small_disk, checkpoint.CheckpointConfig(keep_last=2))
    saver.ensure(1, state, {"position": 1}, None)
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free - 300_000))
    saver.save(2, state, {"position": 2}, None)
    saver.wait()
    assert checkpoint.steps(small_disk) == [1] and "CHECKPOINT NOT WRITTEN" in caplog.text
    with pytest.raises(UserError, match="checkpoint of step 3 could not be written .* last complete one is step 1"):
        saver.ensure(3, state, {"position": 3}, None)
    ballast.unlink()
    saver.ensure(4, state, {"position": 4}, None)
    after, loader = saver.restore(abstract(state))
    saver.close()
    assert loader == {"position": 4} and array_checksums.of(after) == array_checksums.of(state)
    assert checkpoint.steps(small_disk) == [1, 4]
    assert sorted(p.name for p in (small_disk / "checkpoints").iterdir() if "tmp" in p.name) == []


def damage(path, rng):
    """Flip one bit of one of a checkpoint's files of data."""
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.stat().st_size)
    file = files[rng.integers(len(files))]
    content = bytearray(file.read_bytes())
    content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
    file.write_bytes(content)
    return file


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax leaves tasks behind
def test_no_flipped_bit_is_loaded(tmp_path):
    """Every flip of a bit is refused, or changes nothing of what is read (spare bytes, names that are not used)."""
    mesh = sharding.make_mesh()
    older, newer = state_on(mesh), state_on(mesh)
    newer["params"] = jax.tree.map(lambda x: 2 * x, newer["params"])
    saver = checkpoint.Checkpoints(tmp_path / "run", checkpoint.CheckpointConfig(keep_last=2))
    saver.save(1, older, {"position": 1}, None)
    saver.save(2, newer, {"position": 2}, None)
    saver.close()
    rng, refused = np.random.default_rng(0), 0
    for number in range(12):
        run = tmp_path / f"copy-{number}"
        shutil.copytree(tmp_path / "run", run)
        damage(run / "checkpoints" / "2", rng)
        saver = checkpoint.Checkpoints(run, checkpoint.CheckpointConfig(keep_last=2))
        state, loader = saver.restore(abstract(newer))
        saver.close()
        expected = {1: older, 2: newer}[loader["position"]]
        assert array_checksums.of(state) == array_checksums.of(expected)
        refused += loader["position"] == 1
        assert (run / "checkpoints_broken" / "2").is_dir() == (loader["position"] == 1)
    assert refused >= 3


def test_damage_is_named_to_who_reads_arrays(tmp_path, monkeypatch):
    state = state_on(sharding.make_mesh())
    real = array_checksums.of
    monkeypatch.setattr(array_checksums, "of", lambda tree: real(tree) | {"params/b_enc": "float32[16] 0"})
    saver = checkpoint.Checkpoints(tmp_path, checkpoint.CheckpointConfig())
    saver.save(3, state, {"position": 0}, None)
    saver.close()
    monkeypatch.setattr(array_checksums, "of", real)
    with pytest.raises(UserError, match="3 is broken .params/b_enc: the checksum is not that of the save"):
        checkpoint.load_arrays(tmp_path, ("params",))


def test_a_checkpoint_of_a_newer_format_is_refused_and_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_record, "FORMAT_VERSION", 99)
    state = state_on(sharding.make_mesh())
    saver = checkpoint.Checkpoints(tmp_path, checkpoint.CheckpointConfig())
    saver.save(3, state, {"position": 0}, None)
    saver.wait()
    monkeypatch.undo()
    for read in (lambda: saver.restore(abstract(state)), lambda: checkpoint.load_arrays(tmp_path, ("params",))):
        with pytest.raises(UserError, match="in format 99; this is .* reads formats up to 3: install a newer one"):
            read()
    saver.close()
    assert checkpoint.steps(tmp_path) == [3]


@pytest.mark.parametrize("with_record", [True, False])
def test_rows_that_were_saved_as_floats_come_back_as_their_bits(tmp_path, with_record):
    state = state_on(sharding.make_mesh())
    saver = checkpoint.Checkpoints(tmp_path, checkpoint.CheckpointConfig())
    saver.save(3, state, {"position": 5}, None)
    saver.wait()
    if not with_record:
        shutil.rmtree(tmp_path / "checkpoints" / "3" / "record")
    wanted = abstract(state)
    wanted["rows"] = wanted["rows"].update(dtype=jnp.uint16)
    after, _ = saver.restore(wanted)
    saver.close()
    assert np.asarray(after["rows"]).tobytes() == np.asarray(state["rows"]).tobytes()
    assert after["rows"].dtype == jnp.uint16 and after["rows"].sharding == wanted["rows"].sharding
    assert array_checksums.of(after["params"]) == array_checksums.of(state["params"])


def test_a_checkpoint_of_format_1_is_read(tmp_path, caplog):
    state = state_on(sharding.make_mesh())
    saver = checkpoint.Checkpoints(tmp_path, checkpoint.CheckpointConfig())
    saver.save(3, state, {"position": 5}, None)
    saver.wait()
    shutil.rmtree(tmp_path / "checkpoints" / "3" / "record")
    after, loader = saver.restore(abstract(state))
    saver.close()
    assert loader == {"position": 5} and array_checksums.of(after) == array_checksums.of(state)
    assert "format 1, without checksums" in caplog.text
