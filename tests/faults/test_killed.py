"""Killed or stopped at random moments, a run ends in the bits of the run that nothing disturbed."""

import random
import shutil
import signal

import pytest
from fault_runs import STEPS, TRIALS, Straight, arrays, losses, same, strike

from saejax.activations import store
from saejax.storage import checkpoint

AGAIN = 4
"""Times that a stroke is tried anew because the run was over before it."""


def trials(quick: int, full: int):
    """How often: a few times always, many times in the long suite."""
    return pytest.mark.parametrize("n", [quick, pytest.param(full, marks=pytest.mark.faults)])


def disturbed(
    forker, straight: Straight, run_dir, rng: random.Random, signum: int, every: int
) -> tuple[int, bool, int]:
    """One run, struck once and then started again in the same way until it is done.

    Returns:
      The status that the stroke ended it with, whether its end is that of the undisturbed run, and how many of the
      checkpoints that were finished when it was struck are no longer there or no longer the same.
    """
    work = {"run_dir": str(run_dir), "changes": [f"checkpoint.save_every_steps={every}"]}
    for _ in range(AGAIN):
        shutil.rmtree(run_dir, ignore_errors=True)
        status = strike(forker, forker.start("train", **work), signum, rng.uniform(0, straight.seconds))
        if status:
            break
    there = checkpoint.steps(run_dir)
    newest = arrays(run_dir, there[-1]) if there else None
    assert forker.run("train", **work) == 0, forker.said()
    lost = len(set(there) - set(checkpoint.steps(run_dir)))
    lost += newest is not None and not same(arrays(run_dir, there[-1]), newest)
    if newest is not None and there[-1] in straight.saved:
        assert same(newest, straight.saved[there[-1]])
    equal = same(arrays(run_dir, STEPS), straight.saved[STEPS]) and losses(run_dir) == straight.losses
    shutil.rmtree(run_dir)
    return status, equal, lost


@pytest.mark.timeout(6000)
@trials(1, TRIALS)
@pytest.mark.parametrize(("name", "every"), [("train", 5), ("save", 2)])
def test_sigkill(forker, straight, tmp_path, count, n, name, every):
    if n == 1 and name == "train":
        pytest.skip("the other one is enough for a quick look")
    rng, struck = random.Random(f"{name}{n}"), 0
    for number in range(n):
        status, equal, lost = disturbed(forker, straight, tmp_path / str(number), rng, signal.SIGKILL, every)
        assert status in (0, -signal.SIGKILL)
        count(f"SIGKILL of training, a checkpoint every {every} steps", 1, equal, 0, lost)
        struck += status != 0
        assert equal and not lost, f"{name}, number {number}"
    assert struck >= n / 2


@pytest.mark.timeout(6000)
@trials(1, TRIALS)
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_polite_signal(forker, straight, tmp_path, count, n, signum):
    if n == 1 and signum is not signal.SIGTERM:
        pytest.skip("one is enough for a quick look")
    n = -(-n * (2 if signum is signal.SIGTERM else 1) // 5)
    rng, saved = random.Random(f"{signum}"), 0
    for number in range(n):
        status, equal, lost = disturbed(forker, straight, tmp_path / str(number), rng, signum, 5)
        # Before the first step there is nothing to save, and the system or Python ends the process.
        assert status in (0, 128 + signum, -signum), forker.said()
        saved += status == 128 + signum
        count(f"{signal.Signals(signum).name} to training", 1, equal, 0, lost)
        assert equal and not lost
    assert n < 5 or saved >= n / 5


@pytest.fixture(scope="session")
def whole_harvest(forker, tmp_path_factory):
    root = tmp_path_factory.mktemp("harvest")
    assert forker.run("harvest", root=str(root), name="straight") == 0, forker.said()
    return root


def files(path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file() and f.name[0] != "."}


@pytest.mark.timeout(6000)
@trials(1, TRIALS)
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_a_harvest(forker, whole_harvest, count, n, signum):
    if n == 1 and signum is signal.SIGTERM:
        pytest.skip("one is enough for a quick look")
    rng, expected = random.Random(f"harvest{signum}"), files(whole_harvest / "straight")
    for number in range(n if signum is signal.SIGKILL else -(-2 * n // 5)):
        path, work = whole_harvest / f"{signum}-{number}", {"root": str(whole_harvest), "name": f"{signum}-{number}"}
        for _ in range(AGAIN):
            shutil.rmtree(path, ignore_errors=True)
            status = strike(forker, forker.start("harvest", **work), signum, rng.uniform(0, 3))
            if status:
                break
        assert status in (0, 128 + signum, -signum)
        before = {name: content for name, content in files(path).items() if "partial" not in name}
        finished = {name for name in before if name.endswith(".json") and "manifest" not in name}
        assert forker.run("harvest", **work) == 0, forker.said()
        after = files(path)
        lost = sum(after.get(name) != before[name] for name in finished)
        count(f"{signal.Signals(signum).name} of a harvest", 1, after == expected, 0, lost)
        assert after == expected and not lost and not store.verify(path)
        shutil.rmtree(path)
