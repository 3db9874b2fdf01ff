"""Two writers of one directory at random moments: one wins, one ends in a line, the winner is not disturbed by it."""

import json
import os
import pathlib
import random
import re
import shutil
import signal
import time

import fault_runs
import pytest
import test_harvest
from fault_runs import ARGUMENTS, RHYTHM, arrays, losses

from saejax.activations import store
from saejax.errors import MISTAKE
from saejax.storage import checkpoint

TRIALS = min(fault_runs.TRIALS, 20)
FOLD, LISTS = "sweep.fold=true", ["optim.lr=1e-3,2e-3", "data_seed=0"]
IN_USE = (
    r"is in use by [\w -]+(\(writer 0 of 1\) )?of process (\d+) on \S+ since \d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ; wait for"
)
NEEDLESS = (
    r"is finished already|is complete: nothing to do|done: |of another run|already holds checkpoints|harvest done"
    r"|is finished, at step|is not a run directory|holds another ensemble"
)
"""The second came when the first had ended, or not begun, and says what it found."""


LENGTHS = pytest.mark.parametrize("full", [False, pytest.param(True, marks=pytest.mark.faults)], ids=["quick", "full"])


@pytest.fixture(scope="module")
def pair(forker, tmp_path_factory):
    rival = fault_runs.Forker(tmp_path_factory.mktemp("rival"))
    yield [forker, rival]
    rival.close()


def one(root: pathlib.Path, name: str, seed: int, *changes: str) -> tuple[str, dict]:
    return "train", {"run_dir": str(root / name), "changes": [RHYTHM, f"seed={seed}", *changes]}


def typed(root: pathlib.Path, *arguments: str) -> tuple[str, dict]:
    return "command", {"argv": ["train", *arguments, *ARGUMENTS, RHYTHM], "folder": str(root)}


DOORS = {
    "train": lambda root, name, seed: one(root, name, seed),
    "ensemble": lambda root, name, seed: one(root, name, 0, "data_seed=0", f"ensemble.seed=[{seed},7]"),
    "command": lambda root, name, seed: typed(root, f"hydra.run.dir={name}", f"seed={seed}"),
    "sweep": lambda root, name, seed: typed(root, "-m", f"hydra.sweep.dir={name}", f"seed={seed}", *LISTS),
    "folded": lambda root, name, seed: typed(root, "-m", f"hydra.sweep.dir={name}", f"seed={seed}", *LISTS, FOLD),
    "harvest": lambda root, name, seed: ("harvest", {"root": str(root), "name": name}),
}
"""Door -> (root, name of the directory, seed) -> work of a forker."""


@pytest.fixture(autouse=True)
def text(tmp_path):
    """There before two begin: who makes it is not the question."""
    test_harvest._corpus(tmp_path / "text")


def content(path: pathlib.Path) -> dict[str, object]:
    """All that a door leaves, without what says when: arrays of every checkpoint, losses, config, files of stores."""
    found: dict[str, object] = {}
    for file in sorted(path.rglob("config.yaml")):
        run_dir, name = file.parent, str(file.parent.relative_to(path))
        found[f"{name} config"] = re.sub(r"^run_id: .*\n", "", file.read_text(), flags=re.MULTILINE)
        if checkpoint.steps(run_dir):
            found[f"{name} losses"] = losses(run_dir)
            found[f"{name} seed"] = json.loads((run_dir / "run.json").read_text())["seed"]
        for step in checkpoint.steps(run_dir):
            found |= {f"{name} {step} {key}": value.tobytes() for key, value in arrays(run_dir, step).items()}
    for file in sorted(path.glob("*/shard-*")):
        found[str(file.relative_to(path))] = file.read_bytes()
    return found


def differences(found: dict[str, object], expected: dict[str, object]) -> list[str]:
    return [name for name in sorted(found.keys() | expected.keys()) if found.get(name) != expected.get(name)]


@pytest.fixture(scope="module")
def undisturbed(pair, tmp_path_factory):
    """(door, seed) -> what it leaves alone, and its seconds; measured when it is first asked for."""
    known: dict[tuple[str, int], tuple[dict, float]] = {}
    root = tmp_path_factory.mktemp("undisturbed")

    def ask(door: str, seed: int) -> tuple[dict, float]:
        if (door, seed) not in known:
            for name in ("compiling", f"{door}{seed}"):
                work, arguments = DOORS[door](root, name, seed)
                began = time.monotonic()
                assert pair[0].run(work, **arguments) == 0, pair[0].said()
            known[door, seed] = content(root / name), time.monotonic() - began
            shutil.rmtree(root / "compiling")
        return known[door, seed]

    return ask


@pytest.mark.timeout(6000)
@LENGTHS
@pytest.mark.parametrize("door", [*DOORS, "resume"])
def test_two_at_once(pair, undisturbed, tmp_path, count, door, full):
    if not full and door not in ("train", "harvest"):
        pytest.skip("two doors are enough for a quick look")
    n = TRIALS if full else 2
    rng, met, seconds = random.Random(door), 0, []
    for number in range(n):
        seeds = (0, number % 2 if door != "resume" else 0)  # the same command, or another run
        first = DOORS.get(door, DOORS["train"])
        alone = [undisturbed(door if door in DOORS else "train", seed) for seed in seeds]
        works = [first(tmp_path, f"{door}{number}", seed) for seed in seeds]
        if door == "resume":
            works[1] = "command", {"argv": ["train", f"resume={door}{number}"], "folder": str(tmp_path)}
        pair[0].start(works[0][0], **works[0][1])
        while door == "resume" and not checkpoint.steps(tmp_path / f"{door}{number}"):
            time.sleep(0.02)  # before that there is nothing to go on with
        # Most of a run is spent in it; many come together, too.
        time.sleep(rng.choice((rng.uniform(0, 0.2), rng.uniform(0, alone[0][1] / (4 if door == "resume" else 1)))))
        pair[1].start(works[1][0], **works[1][1])
        began, second = time.monotonic(), pair[1].wait()
        took = time.monotonic() - began
        statuses = [pair[0].wait(), second]
        said = [forker.said() for forker in pair]
        refused = [re.search(IN_USE, text) is not None for text in said]
        assert sum(refused) <= 1 and 0 in statuses, said
        met += sum(refused)
        seconds += [took] * refused[1]
        winner = refused.index(False) if any(refused) else 0
        loser = 1 - winner
        assert statuses[winner] == 0 and (any(refused) or re.search(NEEDLESS, said[loser])), said[loser]
        assert statuses[loser] == MISTAKE if any(refused) else statuses[loser] in (0, 1, MISTAKE), said[loser]
        assert "Traceback" not in said[0] + said[1], said
        wrong = differences(content(tmp_path / f"{door}{number}"), alone[winner][0])
        count(f"two writers at once: {door}", 1, not wrong)
        assert not wrong, (wrong, statuses, said)
        shutil.rmtree(tmp_path / f"{door}{number}")
    print(f"{door}: {met} of {n} refused; the second one after {max(seconds, default=0):.1f} s at most")  # with -s
    assert n < 5 or met >= n / 3


@pytest.mark.timeout(6000)
@LENGTHS
@pytest.mark.parametrize("door", DOORS)
def test_the_owner_is_killed_and_the_next_one_works_at_once(pair, undisturbed, tmp_path, count, door, full):
    """The other is refused while the first lives, and goes on as soon as it is dead, before anybody has buried it."""
    if not full and door not in ("train", "harvest"):
        pytest.skip("two doors are enough for a quick look")
    n = TRIALS if full else 1
    rng, struck = random.Random(door), 0
    for number in range(n):
        expected, seconds = undisturbed(door, 0)
        work, arguments = DOORS[door](tmp_path, f"{door}{number}", 0)
        pid = pair[0].start(work, **arguments)
        time.sleep(rng.uniform(0, seconds))
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # it was quicker
        assert pair[1].run(work, **arguments) == 0, pair[1].said()
        struck += pair[0].wait() == -signal.SIGKILL
        wrong = differences(content(tmp_path / f"{door}{number}"), expected)
        count(f"SIGKILL, and another at once: {door}", 1, not wrong)
        assert not wrong, (wrong, number)
        if door == "harvest":
            assert not [
                file for split in ("train", "heldout") for file in store.verify(tmp_path / f"{door}{number}" / split)
            ]
        shutil.rmtree(tmp_path / f"{door}{number}")
    assert n < 5 or struck >= n / 2
