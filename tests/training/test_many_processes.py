"""A run of several real processes is the run of one: the same curve, the same checkpoints, and it survives as well."""

import json
import os
import re
import shutil
import signal
import time

import jax
import numpy as np
import process_groups
import pytest
import small_runs as runs
from process_groups import QUICK_DEATH, running

from saejax import config
from saejax.errors import LOST, MISTAKE
from saejax.runs import run

MANY = "mesh.distributed=manual"

COMMON = [
    "sae=topk", "sae.d_sae=128", "sae.k=4", "train.batch=128", "buffer.rows=1024", "train.log_every_steps=1",
    "train.eval_rows=500", "train.dead_after_tokens=1024", "checkpoint.keep_last=9", "mesh=single",
]  # fmt: skip


def command(n_steps: int, *overrides: str) -> list[str]:
    return [*COMMON, f"train.n_tokens={128 * n_steps}", *overrides]


def alone(run_dir, n_steps: int, *overrides: str) -> config.Config:
    """The same run by this process, on one device."""
    cfg = config.load("train", config.Config, command(n_steps, *overrides))
    runs.train(run_dir, cfg)
    return cfg


def lines(run_dir) -> list[dict]:
    """metrics.jsonl without what a clock says, or the machine."""
    clocks = re.compile("per_second|wait|memory|utilisation|mfu")
    found = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if not clocks.search(name)} for line in found]


def assert_same_curve(one, many) -> None:
    """Every metric, global ones and held-out ones, to 1e-5."""
    expected, found = lines(one), lines(many)
    assert [line.keys() for line in expected] == [line.keys() for line in found]
    for before, after in zip(expected, found, strict=True):
        for name in before:
            np.testing.assert_allclose(after[name], before[name], rtol=1e-5, atol=1e-6, err_msg=name)


def assert_equal_bits(one, many, step: int) -> None:
    a, b = runs.saved(one, step), runs.saved(many, step)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def odd_rows(folder) -> list[str]:
    """Rows on disk of which no number of lanes takes an equal part: 37 blocks of 16, a tail, and some held out."""
    rows = np.random.default_rng(0).standard_normal((37 * 16 + 5 + 500, 24)).astype(np.float32)
    np.save(folder / "rows.npy", rows)
    share = 500 / len(rows)
    return ["source=arrays", f"source.path={folder}/rows.npy", f"source.heldout_share={share}", "train.n_lanes=8"]


def test_two_processes_are_one_run(tmp_path):
    """Rows over the processes; the buffer and six steps take three epochs of 37 blocks."""
    data = [*odd_rows(tmp_path), "checkpoint.save_every_steps=3", "train.eval_every_steps=null"]
    there = tmp_path / "two"
    with running(2, tmp_path, "train", *command(6, *data, MANY, "mesh.data=2", f"hydra.run.dir={there}")) as group:
        alone(tmp_path / "one", 6, *data)
        assert group.statuses(120) == [0, 0], group.said(0)[-2000:] + group.said(1)[-2000:]
        # The first process alone speaks.
        assert "done: 6 steps" in group.said(0) and "done" not in group.said(1)
    assert_same_curve(tmp_path / "one", there)
    record = json.loads((there / "run.json").read_text())
    assert (record["n_processes"], record["mesh"]["data"]) == (2, 2)
    assert json.loads((tmp_path / "one" / "run.json").read_text())["epoch_rows"] == record["epoch_rows"] == 37 * 16
    # A checkpoint of it is gone on with by one process, on one device: no row is skipped or repeated.
    shutil.rmtree(there / "checkpoints" / "6")
    assert runs.train(there, config.from_run(there, ["mesh.distributed=none", "mesh.data=1"]), resume=True).step == 6
    assert_same_curve(tmp_path / "one", there)


@pytest.mark.nightly
def test_four_processes_with_latents_over_them_and_their_checkpoint_elsewhere(tmp_path):
    there = tmp_path / "four"
    arguments = command(10, MANY, "mesh.data=2", "mesh.latent=2", f"hydra.run.dir={there}")
    with running(4, tmp_path, "train", *arguments) as group:
        cfg = alone(tmp_path / "one", 10)
        assert group.statuses() == [0] * 4, group.said(0)[-2000:]
    assert_same_curve(tmp_path / "one", there)
    saved, name = runs.saved(there), "['liveness']['tokens_since_fired']"
    np.testing.assert_array_equal(saved[name], runs.saved(tmp_path / "one")[name])  # over all rows, in any process
    for n_data, n_latent in ((1, 1), (2, 1), (1, 2), (4, 2)):
        copy = tmp_path / f"on{n_data}x{n_latent}"
        shutil.copytree(there, copy)
        meshed = ["mesh.distributed=none", f"mesh.data={n_data}", f"mesh.latent={n_latent}"]
        state = runs.train(copy, config.from_run(copy, meshed), resume=True).state
        assert len(state.params.W_enc.sharding.device_set) == n_data * n_latent
        for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
            np.testing.assert_array_equal(getattr(state.params, name), saved[f"['params']['{name}']"])
        np.testing.assert_array_equal(state.buffer.rows, saved["['buffer']['rows']"])
    rows = next(iter(cfg.source.heldout(64, 64)))
    np.testing.assert_allclose(run.load(there)(rows), run.load(tmp_path / "one")(rows), rtol=1e-4, atol=1e-4)


@pytest.mark.nightly
def test_latents_over_all_processes(tmp_path):
    """Every process then reads every lane."""
    there = tmp_path / "wide"
    with running(
        2, tmp_path, "train", *command(5, MANY, "mesh.latent=4", f"hydra.run.dir={there}"), devices=2
    ) as group:
        alone(tmp_path / "one", 5)
        assert group.statuses() == [0, 0], group.said(0)[-2000:]
    assert_same_curve(tmp_path / "one", there)


@pytest.mark.nightly
def test_a_process_without_a_device_in_the_mesh_is_refused(tmp_path):
    arguments = command(5, MANY, "mesh.data=2", f"hydra.run.dir={tmp_path}/run")
    with running(3, tmp_path, "train", *arguments) as group:
        assert group.statuses(120) == [MISTAKE] * 3
        assert "leaves process 2 without a device" in group.said(0)


LONG = 120
"""Steps; the news that one process was signalled takes a second or two to reach the other."""


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run of two processes that nothing disturbs, with a checkpoint at 20."""
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    with running(2, run_dir.parent, "train", *long(run_dir)) as group:
        assert group.statuses() == [0, 0], group.said(0)[-2000:]
    return run_dir


def long(run_dir) -> list[str]:
    saves = ["checkpoint.save_every_steps=20", "train.eval_every_steps=null"]
    return command(LONG, *saves, MANY, "mesh.data=2", QUICK_DEATH, f"hydra.run.dir={run_dir}")


def goes_on_to_the_end(straight, run_dir) -> None:
    """The same command line once more, and the end is that of the run that nothing disturbed."""
    with running(2, run_dir.parent, "train", *long(run_dir)) as group:
        assert group.statuses() == [0, 0], group.said(0)[-2000:]
    assert_equal_bits(straight, run_dir, LONG)
    assert runs.logged(run_dir, "step") == runs.logged(straight, "step")
    assert runs.logged(run_dir, "train/loss") == runs.logged(straight, "train/loss")


@pytest.mark.nightly
@pytest.mark.parametrize("killed", [0, 1])
def test_one_killed_process_ends_the_other_and_both_go_on(straight, tmp_path, killed):
    run_dir = tmp_path / "run"
    with running(2, tmp_path, "train", *long(run_dir)) as group:
        group.wait_for(run_dir / "checkpoints" / "20")
        group.members[killed].send_signal(signal.SIGKILL)
        started = time.monotonic()
        statuses = group.statuses(60)
        assert time.monotonic() - started < 45  # 10 s of silence, and what a busy machine adds
    assert statuses[killed] == -signal.SIGKILL
    assert statuses[1 - killed] in (LOST, -signal.SIGABRT)
    assert not (run_dir / "checkpoints" / f"{LONG}").exists()
    goes_on_to_the_end(straight, run_dir)


@pytest.mark.nightly
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_to_one_process_stops_all_at_one_step(straight, tmp_path, signum):
    run_dir = tmp_path / "run"
    with running(2, tmp_path, "train", *long(run_dir)) as group:
        group.wait_for(run_dir / "checkpoints" / "20")
        group.members[1].send_signal(signum)
        assert group.statuses(120) == [128 + signum] * 2
        stopped_at = runs.checkpoint.steps(run_dir)[-1]
        assert f"stopped at step {stopped_at}, saved" in group.said(0)
    assert 20 < stopped_at < LONG and runs.logged(run_dir, "step")[-1] == stopped_at
    goes_on_to_the_end(straight, run_dir)


ANEW = {"JAX_LOG_COMPILES": "1", "JAX_ENABLE_COMPILATION_CACHE": "false"}


@pytest.mark.nightly
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_signal_to_one_process_that_has_not_joined_the_others_ends_all(tmp_path, stopped):
    with running(2, tmp_path, "train", *long(tmp_path / "run")) as group:
        group.wait_until_watched(stopped)
        group.members[stopped].send_signal(signal.SIGUSR1)
        assert group.statuses(60) == [128 + signal.SIGUSR1] * 2, group.said(0) + group.said(1)
        assert "stopped by SIGUSR1" in group.said(0).splitlines()[-1]


@pytest.mark.nightly
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_process_that_compiles_stops_all_before_the_first_step(straight, tmp_path, signum):
    run_dir = tmp_path / "run"
    with running(2, tmp_path, "train", *long(run_dir), **ANEW) as group:
        group.wait_until_said(1, "Compiling jit(step)")
        group.members[1].send_signal(signum)
        assert group.statuses(120) == [128 + signum] * 2, group.said(0)[-2000:] + group.said(1)[-2000:]
        stopped_at = runs.checkpoint.steps(run_dir)[-1]
        assert stopped_at < 20 and f"stopped at step {stopped_at}, saved" in group.said(0)
    goes_on_to_the_end(straight, run_dir)


@pytest.mark.nightly
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_process_stops_an_evaluation_by_two(straight, tmp_path, signum):
    run_dir = tmp_path / "run"
    shutil.copytree(straight, run_dir)
    arguments = [f"run={run_dir}", "rows=4000000", "batch=16", MANY]
    with running(2, tmp_path, "evaluate", *arguments, **ANEW) as group:
        group.wait_until_said(1, "Compiling jit(update)")
        group.members[1].send_signal(signum)
        assert group.statuses(120) == [128 + signum] * 2, group.said(0)[-2000:] + group.said(1)[-2000:]
        name = signal.Signals(signum).name
        assert f"saejax evaluate: stopped by {name}" in group.said(0) and "stopped" not in group.said(1)


@pytest.mark.nightly
def test_damage_that_one_process_meets_is_damage_for_all(straight, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(straight, run_dir)
    newest = run_dir / "checkpoints" / f"{LONG}" / "state"
    part = max((file for file in newest.rglob("*/d/*") if file.is_file()), key=lambda file: file.stat().st_size)
    part.write_bytes(part.read_bytes()[: part.stat().st_size // 2])
    with running(2, tmp_path, "train", f"resume={run_dir}", MANY) as group:
        assert group.statuses() == [0, 0], group.said(0)[-2000:]
        assert f"checkpoint {LONG} cannot be restored" in group.said(0)
    assert (run_dir / "checkpoints_broken" / f"{LONG}").exists()
    assert_equal_bits(straight, run_dir, LONG)


@pytest.mark.nightly
def test_one_process_that_fails_says_why_and_the_other_does_not_wait_for_ever(tmp_path):
    """A row that is not a number, in one block, and so in a lane of one of them."""
    data = odd_rows(tmp_path)
    rows = np.lib.format.open_memmap(tmp_path / "rows.npy", mode="r+")
    rows[5 * 16] = np.nan
    arguments = command(20, *data, MANY, "mesh.data=2", QUICK_DEATH, f"hydra.run.dir={tmp_path}/run")
    started = time.monotonic()
    with running(2, tmp_path, "train", *arguments) as group:
        statuses = group.statuses(120)
        assert MISTAKE in statuses and all(s in (MISTAKE, LOST, -signal.SIGABRT) for s in statuses)
        assert "holds NaN or an infinity" in group.said(statuses.index(MISTAKE))
    assert time.monotonic() - started < 100


@pytest.mark.nightly
def test_evaluation_by_two_processes_gives_the_same_numbers(straight, tmp_path):
    results = []
    for n in (1, 2):
        run_dir = tmp_path / f"by{n}"
        shutil.copytree(straight, run_dir)
        many = [MANY] if n > 1 else ["mesh.distributed=none"]
        with running(n, tmp_path, "evaluate", f"run={run_dir}", "rows=1000", *many) as group:
            assert group.statuses() == [0] * n, group.said(0)[-2000:]
            assert "fvu" in group.said(0) and (n == 1 or "fvu" not in group.said(1))
        results.append(json.loads((run_dir / "eval.json").read_text())["metrics"])
    assert results[0].keys() == results[1].keys()
    for name, value in results[0].items():
        np.testing.assert_allclose(results[1][name], value, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.nightly
def test_an_ensemble_over_two_processes_is_that_of_one(tmp_path):
    members = ["ensemble.seed=[0,1]", "ensemble.form=vmap", "data_seed=0"]
    meshed = ["mesh.data=2", "mesh.ensemble=2"]
    with running(
        2, tmp_path, "train", *command(6, *members, *meshed, MANY, f"hydra.run.dir={tmp_path}/two"), devices=2
    ) as group:
        assert group.statuses() == [0, 0], group.said(0)[-2000:]
    with running(1, tmp_path, "train", *command(6, *members, f"hydra.run.dir={tmp_path}/one")) as group:
        assert group.statuses() == [0], group.said(0)[-2000:]
    names = [path.name for path in sorted((tmp_path / "one" / "members").iterdir())]
    assert len(names) == 2
    for name in names:
        assert_same_curve(tmp_path / "one" / "members" / name, tmp_path / "two" / "members" / name)


@pytest.mark.nightly
def test_two_processes_harvest_what_one_does(small_model, tmp_path):
    settings = [
        f"model={small_model}", "text=pydoc", "hook=blocks.1.hook_resid_post", "n_tokens=8192", "heldout_tokens=2048",
        "context_length=64", "shard_sequences=16",
    ]  # fmt: skip
    for n in (1, 2):
        many = [MANY] if n > 1 else []
        with running(n, tmp_path, "harvest", f"path={tmp_path}/by{n}", *settings, *many) as group:
            assert group.statuses() == [0] * n, group.said(0)[-2000:]
    one, two = (
        {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}
        for root in (tmp_path / "by1", tmp_path / "by2")
    )
    assert {name for name in one if "lock" not in name} == {name for name in two if "lock" not in name}
    assert all(two[name] == one[name] for name in one if "lock" not in name)


def test_nothing_of_this_is_touched_by_one_process():
    assert "JAX_COORDINATOR_ADDRESS" not in os.environ and process_groups.free_port()
    assert not jax.distributed.is_initialized()
