"""Clocks that jump, other hosts, dashboards that fail, disks that are full or may not be written."""

import shutil
import subprocess

import pytest
import test_harvest
from fault_runs import RHYTHM, STEPS, arrays, losses, same

from saejax.activations import disk_space, store
from saejax.errors import UserError
from saejax.storage import atomic, checkpoint, tracking

YEAR = 365 * 86400.0


def mounted(path, *options: str) -> None:
    path.mkdir(exist_ok=True)
    command = ["mount", *options, str(path)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no right to mount a file system")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB."""
    mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=2m", "tmpfs")
    yield tmp_path / "disk"
    subprocess.run(["umount", "--lazy", str(tmp_path / "disk")], check=True)


def fill(disk, leave: int):
    """Takes the room of a disk but for some bytes; returns the file that does."""
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(shutil.disk_usage(disk).free - leave))
    return ballast


def gone_on(forker, straight, run_dir, **wrong) -> bool:
    """The second half of a run in a world that is wrong in some way; whether it ended as the undisturbed one."""
    shutil.copytree(straight.run_dir, run_dir)
    for step in checkpoint.steps(run_dir):
        if step > STEPS // 2:
            shutil.rmtree(run_dir / "checkpoints" / str(step))
    (run_dir / "run.json").unlink()
    status = forker.run("train", run_dir=str(run_dir), changes=[RHYTHM], **wrong)
    if status == 77:
        pytest.skip("no right to make a name space")
    assert status == 0, forker.said()
    return same(arrays(run_dir, STEPS), straight.saved[STEPS]) and losses(run_dir) == straight.losses


@pytest.mark.faults
@pytest.mark.parametrize("shift", [YEAR, -YEAR, -30.0])
def test_another_clock(forker, straight, tmp_path, count, shift):
    equal = gone_on(forker, straight, tmp_path / "run", clock=shift)
    count("the clock jumps between start and resume", 1, equal)
    assert equal and checkpoint.steps(tmp_path / "run") == checkpoint.steps(straight.run_dir)


@pytest.mark.faults
def test_another_host(forker, straight, tmp_path, count):
    equal = gone_on(forker, straight, tmp_path / "run", host="another-machine")
    count("the host has another name at resume", 1, equal)
    assert equal


@pytest.mark.parametrize("fails_at", [pytest.param(at, marks=pytest.mark.faults) for at in ("init", "log", "finish")])
def test_a_dashboard_that_fails(forker, straight, tmp_path, count, fails_at):
    changes = [RHYTHM, "tracker.wandb=true"]
    status = forker.run("train", run_dir=str(tmp_path / "run"), changes=changes, dashboard=fails_at)
    assert status == 0 and "W&B" in forker.said()
    equal = same(arrays(tmp_path / "run", STEPS), straight.saved[STEPS]) and losses(tmp_path / "run") == straight.losses
    count(f"W&B fails at {fails_at}", 1, equal)
    assert equal


@pytest.mark.faults
def test_a_disk_that_fills_while_training(forker, straight, small_disk, count):
    """Checkpoints and metrics find no room for most of the run; the end is refused, and with room it goes on."""
    run_dir = small_disk / "run"
    shutil.copytree(straight.run_dir, run_dir, ignore=lambda folder, names: [n for n in names if n.isdigit()])
    for name in ("5", "10"):
        shutil.copytree(straight.run_dir / "checkpoints" / name, run_dir / "checkpoints" / name)
    (run_dir / "run.json").unlink()
    ballast = small_disk / "ballast"
    full = [str(ballast), 20_000, str(run_dir / "config.yaml")]
    assert forker.run("train", run_dir=str(run_dir), changes=[RHYTHM], ballast=full) == 2
    said = forker.said()
    assert "CHECKPOINT NOT WRITTEN" in said and "saejax train: checkpoint of step 60 could not be written" in said
    kept = [same(arrays(run_dir, step), straight.saved[step]) for step in (5, 10)]
    ballast.unlink()
    assert forker.run("train", run_dir=str(run_dir), changes=[RHYTHM]) == 0, forker.said()
    equal = same(arrays(run_dir, STEPS), straight.saved[STEPS]) and losses(run_dir) == straight.losses
    count("the disk is full while training, then has room", 1, equal, 0, 2 - sum(kept))
    assert all(kept) and equal


def test_a_disk_that_is_full_before_training(forker, straight, small_disk, count):
    """One line that says how much is needed, nothing compiled; with room it goes on."""
    run_dir = small_disk / "run"
    half_way(straight, run_dir)
    ballast = fill(small_disk, 20_000)
    status = forker.run("train", run_dir=str(run_dir), changes=[RHYTHM])
    said = forker.said()
    ballast.unlink()
    ended_and_went_on(forker, straight, run_dir, status, said, "No space left", count, "the disk is full at the start")
    assert len(said.strip().splitlines()) <= 3


def test_a_disk_that_fills_during_a_harvest(small_disk, tmp_path, count, monkeypatch):
    """One line; the published shards stay; with room the same call ends in the same bytes."""
    model, config = test_harvest.TinyModel(), test_harvest._config(tmp_path, "straight")
    test_harvest.harvest(config, model)
    config = test_harvest._config(tmp_path, "disk/out")
    (small_disk / "out").mkdir()
    ballast = fill(small_disk, 40_000)
    monkeypatch.setattr(disk_space, "check", lambda *_: None)
    with pytest.raises(UserError, match="No space left on device; the published shards are safe") as caught:
        test_harvest.harvest(config, model)
    assert "\n" not in str(caught.value)
    path = small_disk / "out" / "train"
    left = {file.name: file.read_bytes() for file in path.glob("shard-*")}
    assert left and not [name for name in left if "partial" in name]
    ballast.unlink()
    test_harvest.harvest(config, model)
    equal = test_harvest._bytes(small_disk / "out") == test_harvest._bytes(tmp_path / "straight")
    lost = sum((path / name).read_bytes() != content for name, content in left.items())
    count("the disk is full during a harvest, then has room", 1, equal, 0, lost)
    assert equal and not lost and not store.verify(path)


def test_a_disk_that_fills_under_metrics_and_pages(small_disk, count, caplog):
    tracker = tracking.Tracker(small_disk, tracking.TrackerConfig(), {})
    tracker.log(1, {"train/loss": 0.5})
    atomic.write(small_disk / "report.html", "old")
    ballast = fill(small_disk, 0)
    for step in range(2, 200):
        tracker.log(step, {f"train/{name}": 1 / 3 for name in "abcdefgh"})
    with pytest.raises(OSError, match="No space left on device"):
        atomic.write(small_disk / "report.html", "new" * 100_000)
    lines = (small_disk / "metrics.jsonl").read_text().splitlines(keepends=True)
    halves = sum(not line.endswith("\n") for line in lines)
    ballast.unlink()
    tracker.log(200, {})
    tracker.close()
    steps = [line["step"] for line in tracking.read(small_disk)]
    intact = (small_disk / "report.html").read_text() == "old" and not list(small_disk.glob(".*partial"))
    count("the disk is full under metrics.jsonl and report.html", 1, steps == list(range(1, 201)) and intact, halves)
    assert steps == list(range(1, 201)) and not halves and intact
    assert caplog.text.count("METRICS NOT WRITTEN") == 1


def half_way(straight, run_dir):
    """A run directory as after two checkpoints."""
    shutil.copytree(straight.run_dir, run_dir)
    for step in checkpoint.steps(run_dir)[2:]:
        shutil.rmtree(run_dir / "checkpoints" / str(step))
    (run_dir / "run.json").unlink()


def ended_and_went_on(forker, straight, run_dir, status: int, said: str, reason: str, count, fault: str) -> None:
    """It ended in one line, the two checkpoints are there, and where it may write it goes on to the same end."""
    kept = [same(arrays(run_dir, step), straight.saved[step]) for step in checkpoint.steps(run_dir)]
    assert forker.run("train", run_dir=str(run_dir), changes=[RHYTHM]) == 0, forker.said()
    equal = same(arrays(run_dir, STEPS), straight.saved[STEPS]) and losses(run_dir) == straight.losses
    count(fault, 1, equal, 0, 2 - sum(kept))
    assert status == 2 and reason in said and "Traceback" not in said, said
    assert equal and kept == [True, True]


@pytest.mark.faults
def test_a_read_only_place(forker, straight, tmp_path, count):
    run_dir = tmp_path / "run"
    half_way(straight, run_dir)
    mounted(tmp_path / "bound", "--bind", str(run_dir))
    subprocess.run(["mount", "-o", "remount,ro,bind", str(tmp_path / "bound")], check=True)
    try:
        status = forker.run("train", run_dir=str(tmp_path / "bound"), changes=[RHYTHM])
        said = forker.said()
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path / "bound")], check=True)
    fault = "the run directory is read-only, then is not"
    ended_and_went_on(forker, straight, run_dir, status, said, "Read-only file system", count, fault)


@pytest.mark.faults
@pytest.mark.parametrize("place", [".", "checkpoints", "config.yaml", "checkpoints/10", "checkpoints/10/state/d"])
def test_no_permission(forker, straight, tmp_path, count, place):
    run_dir = tmp_path / "run"
    half_way(straight, run_dir)
    path = run_dir / place
    before = path.stat().st_mode
    path.chmod(0o555 if place in (".", "checkpoints") else 0)
    status = forker.run("train", run_dir=str(run_dir), changes=[RHYTHM], user=True)
    said = forker.said()
    path.chmod(before)
    if status == 77:
        pytest.skip("no way to give up root's rights")
    ended_and_went_on(forker, straight, run_dir, status, said, "Permission denied", count, "permission denied")
