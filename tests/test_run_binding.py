"""A checkpoint is of one step of one run with one config: nothing else is loaded, nothing that is whole is refused."""

import errno
import json
import os
import random
import re
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import yaml
from orbax.checkpoint import v1 as ocp

import saejax
from saejax import config
from saejax.errors import UserError
from saejax.runs import directory, run
from saejax.storage import checkpoint, checkpoint_read, json_yaml

SIZES = [
    "mesh=single", "sae.d_sae=32", "sae.k=2", "train.batch=64", "buffer.rows=512", "train.log_every_steps=1",
    "train.eval_rows=128",
    "checkpoint.save_every_steps=4", "checkpoint.keep_last=9", "optim.warmup_share=0",
]  # fmt: skip


def compose(n_steps: int, *overrides: str) -> config.Config:
    return config.load("train", config.Config, [*SIZES, f"train.n_tokens={64 * n_steps}", *overrides])


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """A .npy file of rows."""
    path = tmp_path_factory.mktemp("rows") / "rows.npy"
    np.save(path, np.random.default_rng(0).normal(size=(4096, 16)).astype(np.float32))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory, rows) -> Path:
    """Two runs that differ in `optim.lr` only, checkpoints of steps 4, 8 and 12 each."""
    root = tmp_path_factory.mktemp("runs")
    for name, lr in (("a", 0.001), ("b", 0.002)):
        run.train(compose(12, "source=arrays", f"source.path={rows}", f"optim.lr={lr}"), root / name)
    return root


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    """Copies of both, which a test may spoil."""
    return Path(shutil.copytree(finished, tmp_path / "runs"))


def load(run_dir: Path) -> None:
    saejax.load(run_dir)


def resume(run_dir: Path) -> None:
    longer = config.from_run(run_dir, [f"train.n_tokens={64 * 14}"])
    run.train(longer, run_dir, resume=True)


DOORS = {"load": load, "resume": resume}


def move(run_dir: Path, step: str, to: str) -> None:
    (run_dir / "checkpoints" / step).rename(run_dir / "checkpoints" / to)


def part_of_other(run_dir: Path, part: str) -> None:
    """The newest checkpoint, one part of it from the same step of the other run."""
    here = run_dir / "checkpoints" / "12" / part
    shutil.rmtree(here)
    shutil.copytree(run_dir.parent / "b" / "checkpoints" / "12" / part, here)


FOREIGN = {
    "renamed to a later step": lambda d: move(d, "12", "99"),
    "renamed to an earlier step": lambda d: (shutil.rmtree(d / "checkpoints" / "12"), move(d, "4", "9")),
    "a link to an earlier one": lambda d: (d / "checkpoints" / "40").symlink_to(d / "checkpoints" / "8"),
    "a copy of an earlier one": lambda d: shutil.copytree(d / "checkpoints" / "8", d / "checkpoints" / "16"),
    "of another run": lambda d: (
        shutil.rmtree(d / "checkpoints"), shutil.copytree(d.parent / "b" / "checkpoints", d / "checkpoints")
    ),
    "of another run, later": lambda d: shutil.copytree(
        d.parent / "b" / "checkpoints" / "12", d / "checkpoints" / "13"
    ),
    "config.yaml of another run": lambda d: shutil.copy(d.parent / "b" / "config.yaml", d / "config.yaml"),
    "a name with a leading zero": lambda d: move(d, "8", "08"),
    "a name in other digits": lambda d: move(d, "8", "²"),
    "a file": lambda d: (d / "checkpoints" / "40").write_text(""),
}  # fmt: skip


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("case", FOREIGN)
def test_what_is_not_what_its_place_says_is_refused_in_a_line(copy, case, door):
    run_dir = copy / "a"
    FOREIGN[case](run_dir)
    before = sorted(p.name for p in (run_dir / "checkpoints").iterdir())
    with pytest.raises(UserError) as refused:
        DOORS[door](run_dir)
    assert "\n" not in str(refused.value) and re.search(
        "holds step|another run|not a saejax checkpoint", str(refused.value)
    )
    # It is no damage: nothing is moved away.
    assert sorted(p.name for p in (run_dir / "checkpoints").iterdir()) == before


DAMAGED = {
    "no record": lambda d: shutil.rmtree(d / "checkpoints" / "12" / "record"),
    "record of another run": lambda d: part_of_other(d, "record"),
    "state of another run": lambda d: part_of_other(d, "state"),
    "empty": lambda d: (shutil.rmtree(d / "checkpoints" / "12"), (d / "checkpoints" / "12").mkdir()),
    "other parts noted": lambda d: edit_noted(d, lambda noted: noted["item_handlers"].pop("record")),
    "no time noted": lambda d: edit_noted(d, lambda noted: noted.pop("commit_timestamp_nsecs")),
    "another handler": lambda d: edit_noted(
        d, lambda noted: noted["item_handlers"].update(record=noted["item_handlers"]["record"].replace("l", "m"))
    ),
    "another fvu": lambda d: (d / "checkpoints" / "12" / "metrics" / "metrics").write_text('{"fvu": 0.0001}'),
    "no fvu": lambda d: shutil.rmtree(d / "checkpoints" / "12" / "metrics"),
    "record of format 2": lambda d: shutil.copytree(
        Path(__file__).parent / "fixtures" / "run_format_2" / "checkpoints" / "6" / "record",
        d / "checkpoints" / "12" / "record", dirs_exist_ok=True,
    ),
}  # fmt: skip


def edit_noted(run_dir: Path, change) -> None:
    file = run_dir / "checkpoints" / "12" / "_CHECKPOINT_METADATA"
    noted = json.loads(file.read_text())
    change(noted)
    file.write_text(json.dumps(noted))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax leaves tasks behind
@pytest.mark.parametrize("case", DAMAGED)
def test_what_lacks_what_its_format_promises_is_refused_and_set_aside(copy, case):
    run_dir = copy / "a"
    DAMAGED[case](run_dir)
    with pytest.raises(UserError, match="is broken|another run"):
        load(run_dir)
    if case == "record of another run":
        with pytest.raises(UserError, match="of another run"):
            resume(run_dir)
        return
    resume(run_dir)
    assert (run_dir / "checkpoints_broken" / "12").is_dir()
    assert checkpoint.steps(run_dir)[-1] == 14


NO_DAMAGE = [
    PermissionError(errno.EACCES, "Permission denied"), OSError(errno.EIO, "Input/output error"),
    OSError(errno.EMFILE, "Too many open files"), OSError(errno.ESTALE, "Stale file handle"), MemoryError("no memory"),
    ValueError("RESOURCE_EXHAUSTED: out of memory"),
]  # fmt: skip
"""What a sound checkpoint may meet on its way: the next try may read it."""


@pytest.mark.parametrize(
    ("door", "reader"), [("load", ocp), ("resume", ocp), ("resume", ocp.training.Checkpointer)],
    ids=["load", "record on resume", "state on resume"],
)  # fmt: skip
def test_an_error_that_is_no_damage_says_what_it_is(copy, monkeypatch, door, reader):
    """It was called a broken checkpoint, and an older one was taken."""
    run_dir = copy / "a"
    for error in NO_DAMAGE:
        with monkeypatch.context() as patched, pytest.raises(type(error)) as caught:
            patched.setattr(reader, "load_checkpointables", mock.Mock(side_effect=error))
            DOORS[door](run_dir)
        assert caught.value is error
        assert checkpoint.steps(run_dir) == [4, 8, 12] and not (run_dir / "checkpoints_broken").exists()
    DOORS[door](run_dir)


def other(value):
    """A value of the same kind that is not the given one."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value * 2 + 1
    return {"null": None}.get(value, 1) if value is None else [*value, 1] if isinstance(value, list) else f"{value}x"


CONFIG = compose(12)
FIXED = sorted(directory.fixed(CONFIG))


@pytest.mark.parametrize("key", FIXED)
def test_a_config_that_was_edited_is_no_longer_that_of_the_run(copy, key):
    """Every key that defines the function, one at a time; also to values that would be valid."""
    if key.startswith("source."):
        key = "source.heldout_share"
    file = copy / "a" / "config.yaml"
    tree = yaml.safe_load(file.read_text())
    *groups, name = key.split(".")
    part = tree
    for group in groups:
        part = part[group]
    part[name] = other(part[name])
    file.write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError) as refused:
        load(copy / "a")
    assert "\n" not in str(refused.value)


VALID_EDITS = {
    "sae.k": 4, "sae.matmul_dtype": "bfloat16", "sae.subtract_b_dec": False, "sae.encoder": "tied",
    "normalize.mode": "none", "normalize.center": True, "sae.unit_decoder": False, "train.ema_decay": 0.9, "seed": 7,
}  # fmt: skip


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("key", VALID_EDITS)
def test_a_valid_edit_names_the_key_and_both_values(copy, key, door):
    file = copy / "a" / "config.yaml"
    tree = yaml.safe_load(file.read_text())
    *groups, name = key.split(".")
    part = tree[groups[0]] if groups else tree
    part[name] = VALID_EDITS[key]
    file.write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match=f"^{key} is {VALID_EDITS[key]}, but .* was trained with"):
        DOORS[door](copy / "a")


@pytest.mark.parametrize(
    "text", ["seed: 7\n", "normalize: {mode: none}\n", "format_version: 1\n", "run_id: 0\n"], ids=lambda t: t.strip()
)
def test_a_key_that_stands_twice_is_refused(copy, text):
    with (copy / "a" / "config.yaml").open("a") as file:
        file.write(text)
    with pytest.raises(UserError, match=f"the key {text.split(':')[0]} stands twice"):
        load(copy / "a")


def test_a_config_without_its_stamp_does_not_open_checkpoints_that_have_one(copy):
    file = copy / "a" / "config.yaml"
    lines = [line for line in file.read_text().splitlines() if not line.startswith(("format_", "saejax_", "run_id"))]
    file.write_text("\n".join(lines))
    with pytest.raises(UserError, match="is of another run"):
        load(copy / "a")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_flipped_bits_in_what_lies_around_the_arrays(copy):
    """Either refused, or what is loaded is what it was."""
    expected = saejax.load(copy / "a")
    rng = random.Random(0)
    files = [copy / "a" / "config.yaml", copy / "a" / "checkpoints" / "12" / "_CHECKPOINT_METADATA"]
    refused = 0
    for _ in range(60):
        file = rng.choice(files)
        content = file.read_bytes()
        spoilt = bytearray(content)
        spoilt[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(spoilt)
        try:
            found = saejax.load(copy / "a")
        except UserError:
            refused += 1
        else:
            assert found.sparsifier == expected.sparsifier
            np.testing.assert_array_equal(found.params.W_dec, expected.params.W_dec)
        file.write_bytes(content)
    assert refused > 30


def test_no_flipped_bit_beside_the_arrays_is_taken_but_one_of_a_time(finished):
    """Of all bits of Orbax's own file; when a save was written counts for nothing."""
    path = finished / "a" / "checkpoints" / "12"
    file, record = path / "_CHECKPOINT_METADATA", checkpoint.read_record(finished / "a", 12)
    content = file.read_bytes()
    whole, times = json.loads(content), ("init_timestamp_nsecs", "commit_timestamp_nsecs")
    try:
        for place in range(8 * len(content)):
            spoilt = bytearray(content)
            spoilt[place // 8] ^= 1 << place % 8
            file.write_bytes(spoilt)
            try:
                checkpoint_read._check_metadata(path, record)
            except Exception as error:
                assert checkpoint_read.is_damage(error)
            else:
                found = json.loads(spoilt)
                assert {**found, **dict.fromkeys(times)} == {**whole, **dict.fromkeys(times)}, bytes(spoilt)
    finally:
        file.write_bytes(content)


# What may change, and what is said of it.


def test_a_free_key_is_said_recorded_and_used(copy, caplog):
    run_dir = copy / "a"
    with caplog.at_level("INFO"):
        run.train(config.from_run(run_dir, ["optim.lr=0.01", f"train.n_tokens={64 * 16}"]), run_dir, resume=True)
    assert "from step 12 on optim.lr is 0.01, it was 0.001" in caplog.text
    (line,) = [json.loads(text) for text in (run_dir / "changes.jsonl").read_text().splitlines()]
    assert line["step"] == 12
    assert line["changed"] == {"optim.lr": [0.001, 0.01], "train.n_tokens": [768, 1024]}
    saved = [checkpoint.read_record(run_dir, step)["run"]["config"]["optim.lr"] for step in (12, 16)]
    assert saved == [0.001, 0.01]
    assert config.from_run(run_dir).optim.lr == 0.01
    load(run_dir)


@pytest.mark.parametrize("override", ["sae.k=4", "sae.matmul_dtype=bfloat16", "normalize.center=true", "seed=5"])
def test_a_fixed_key_is_refused_and_nothing_is_written(copy, override):
    run_dir = copy / "a"
    before = {path: path.read_bytes() for path in run_dir.glob("[!.]*.*")}
    with pytest.raises(UserError, match=f"{override.split('=')[0]} cannot change on resume"):
        run.train(config.from_run(run_dir, [override]), run_dir, resume=True)
    assert {path: path.read_bytes() for path in run_dir.glob("[!.]*.*")} == before


def test_nothing_left_to_do_writes_nothing(copy, rows):
    run_dir = copy / "a"
    before = (run_dir / "config.yaml").read_bytes()
    assert run.train(config.from_run(run_dir, ["train.n_tokens=128"]), run_dir, resume=True).step == 12
    assert (run_dir / "config.yaml").read_bytes() == before
    same = compose(12, "source=arrays", f"source.path={rows}", "optim.lr=0.001")
    assert directory.look(same, run_dir).stage is directory.Stage.finished


def test_an_older_run_gets_an_id_when_it_goes_on_and_keeps_its_older_checkpoints(tmp_path):
    run_dir = Path(shutil.copytree(Path(__file__).parent / "fixtures" / "run_format_2", tmp_path / "run"))
    cfg = config.from_run(run_dir, ["checkpoint.keep_last=5"])
    longer = config.from_run(run_dir, ["checkpoint.keep_last=5", f"train.n_tokens={cfg.train.n_tokens * 2}"])
    run.train(longer, run_dir, resume=True)
    stamp = json_yaml.read_run(run_dir)[1]
    older, newest = checkpoint.steps(run_dir)
    assert stamp.run_id and stamp.older_up_to_step == older
    for step in (older, newest):
        assert saejax.load(run_dir, step).provenance["step"] == step
    shutil.rmtree(run_dir / "checkpoints" / str(newest) / "record")
    with pytest.raises(UserError, match="its record is missing"):
        saejax.load(run_dir)


# Every path may be relative; see test_run_places.py, too.

PATHS = ["r", "./r", "../here/r", "with a space", "k=2,x=1", "模型"]


@pytest.mark.parametrize("name", PATHS)
def test_relative_paths_work_at_every_door(copy, rows, monkeypatch, name):
    here = copy / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    (copy / "a").rename(Path(name).absolute())
    assert saejax.load(name).provenance["step"] == 12
    resume(Path(name))
    assert checkpoint.steps(Path(name))[-1] == 14
    os.chdir("/")
    assert saejax.load(here / name).provenance["step"] == 14
