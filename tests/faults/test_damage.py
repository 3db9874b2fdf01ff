"""Bits flipped, files cut off and files gone, at random places: what is read is what was written, or is refused."""

import random
import shutil

import numpy as np
import pytest
from fault_runs import RHYTHM, STEPS, TRIALS, arrays, losses, same
from test_checkpoint import abstract, state_on
from test_store_source import write

from saejax.activations import store
from saejax.activations.store.source import Store
from saejax.errors import UserError
from saejax.parallel import sharding
from saejax.storage import array_checksums, checkpoint


def flip(file, rng: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def cut(file, rng: random.Random) -> None:
    file.write_bytes(file.read_bytes()[: rng.randrange(file.stat().st_size)])


KINDS = {"a flipped bit": flip, "a file cut off": cut, "a file gone": lambda file, rng: file.unlink()}


def damage(path, rng: random.Random, kind: str):
    """Does it to one of the files below; returns which."""
    file = rng.choice(sorted(file for file in path.rglob("*") if file.is_file() and file.stat().st_size))
    KINDS[kind](file, rng)
    return file.relative_to(path)


def kinds(quick: int, full: int):
    """Every kind, a few times always and many times in the long suite."""
    values = [(kind, n) for kind in KINDS for n in (quick, full)]
    return pytest.mark.parametrize(
        ("kind", "n"), [pytest.param(*v, marks=pytest.mark.faults if v[1] == full else ()) for v in values]
    )


@pytest.mark.timeout(3000)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax leaves tasks behind
@kinds(3, 2 * TRIALS)
def test_a_checkpoint(tmp_path, count, caplog, kind, n):
    mesh, rng = sharding.make_mesh(), random.Random(f"{kind}{n}")
    states = {1: state_on(mesh), 2: state_on(mesh)}
    states[2]["params"] = states[2]["params"].replace(b_dec=2 * states[2]["params"].b_dec)
    saver = checkpoint.Checkpoints(tmp_path / "run", checkpoint.CheckpointConfig(keep_last=2))
    for step, state in states.items():
        saver.save(step, state, {"position": step}, None)
    saver.close()
    expected = {step: array_checksums.of(state) for step, state in states.items()}
    for number in range(n):
        run = tmp_path / f"copy-{number}"
        shutil.copytree(tmp_path / "run", run)
        file = damage(run / "checkpoints" / "2", rng, kind)
        saver = checkpoint.Checkpoints(run, checkpoint.CheckpointConfig(keep_last=2))
        state, loader = saver.restore(abstract(states[2]))
        saver.close()
        whole = loader["position"] in expected and array_checksums.of(state) == expected[loader["position"]]
        kept = (run / "checkpoints" / "1").is_dir()
        count(f"{kind} in a checkpoint", 1, whole, not whole, not kept)
        assert whole and kept, f"{file}: number {number}"
        shutil.rmtree(run)
    assert "Task exception" not in caplog.text


@pytest.mark.timeout(3000)
@kinds(1, TRIALS // 5)
def test_the_newest_checkpoint_of_a_run(forker, straight, tmp_path, count, kind, n):
    """The run goes back to the one before and ends in the same bits."""
    if n == 1 and kind != "a flipped bit":
        pytest.skip("one kind is enough for a quick look")
    rng = random.Random(f"run{kind}{n}")
    for number in range(n):
        run_dir = tmp_path / str(number)
        shutil.copytree(straight.run_dir, run_dir)
        at = rng.randrange(10, STEPS, 5)
        for step in checkpoint.steps(run_dir):
            if step > at:
                shutil.rmtree(run_dir / "checkpoints" / str(step))
        (run_dir / "run.json").unlink()
        file = damage(run_dir / "checkpoints" / str(at), rng, kind)
        assert forker.run("train", run_dir=str(run_dir), changes=[RHYTHM]) == 0, forker.said()
        equal = same(arrays(run_dir, STEPS), straight.saved[STEPS]) and losses(run_dir) == straight.losses
        count(f"{kind} in the newest checkpoint, then resumed", 1, equal, not equal, 0)
        assert equal, file
        shutil.rmtree(run_dir)


def content(path) -> list[np.ndarray]:
    """All that can be read of a store."""
    reader = store.Reader(path)
    origins = [np.asarray(reader.trace(row)) for row in range(0, reader.n_rows, 7)]
    return [reader.rows(0, reader.n_rows), reader.index(0, reader.n_rows), *reader.sequences(0, 6), *origins]


@pytest.mark.timeout(3000)
@kinds(10, 4 * TRIALS)
def test_a_store(tmp_path, count, kind, n):
    write(tmp_path / "sound" / "train", 0)
    write(tmp_path / "sound" / "heldout", 100)
    expected, rng = content(tmp_path / "sound" / "train"), random.Random(f"store{kind}{n}")
    for number in range(n):
        path = tmp_path / f"copy-{number}"
        shutil.copytree(tmp_path / "sound", path)
        file = damage(path / "train", rng, kind)
        try:
            found = content(path / "train")
            accepted = not all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
        except UserError:
            accepted = False
        rows = Store(path=str(path), skip_damaged=True).rows("train") if file.name != "manifest.json" else None
        left = set() if rows is None else set(rows[0 : rows.shape[0]][:, 0].astype(int).tolist())
        accepted |= not left <= set(range(48)) or (rows is not None and len(left) < 32)
        count(f"{kind} in a store", 1, not accepted, accepted, 0)
        assert not accepted, file
        shutil.rmtree(path)
