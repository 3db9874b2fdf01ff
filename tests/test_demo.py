"""What the demo decides to run: no job is started here, directories are put into the states that jobs leave behind."""

import importlib
import json
import os
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))
demo = importlib.import_module("demo")
sys.path.remove(str(SCRIPTS))


@pytest.fixture
def plan(tmp_path):
    return demo.Plan(
        root=tmp_path, harvest=("h=1",), train=("t=1",), sweep=("k=16,32", "seed=0,1"), evaluate=("e=1",)
    )  # fmt: skip


def write(path, text, time):
    """A file with a modification time of its own, in seconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    os.utime(path, (time, time))


def train(run, time=1, *, finished=True, saved=True):
    write(run / "run.json", json.dumps({"finished": finished}), time)
    if saved:
        (run / "checkpoints" / "100").mkdir(parents=True, exist_ok=True)


def finish(plan):
    """Everything as after an undisturbed pass."""
    run, sweep = plan.root / "topk", plan.root / "sweep"
    train(run)
    for n in range(4):
        train(sweep / str(n))
    write(sweep / "sweep.html", "<html></html>", 2)
    write(run / "eval.json", '{"metrics": {"fvu": 0.2}}', 2)
    write(run / "export_saelens" / "sae_weights.safetensors", "weights", 2)
    write(run / "export_saelens" / "cfg.json", '{"d_sae": 1}', 2)
    write(run / "report.html", "<html></html>", 3)


def later(plan):
    """What is pending after the harvest, which is always run."""
    first, *others = plan.pending()
    assert first == ["harvest", f"path={plan.root / 'store'}", "h=1"]
    return others


def commands(plan):
    run, sweep = plan.root / "topk", plan.root / "sweep"
    store = f"source.path={plan.root / 'store'}"
    return {
        "train": ["train", "t=1", store, f"hydra.run.dir={run}"],
        "resume": ["train", f"resume={run}"],
        "sweep": ["train", "-m", "t=1", store, "k=16,32", "seed=0,1", f"hydra.sweep.dir={sweep}"],
        "sweep page": ["report", f"sweep={sweep}"],
        "evaluate": ["evaluate", f"run={run}", "e=1"],
        "export": ["export", f"run={run}"],
        "report": ["report", f"run={run}"],
        "point 2": ["train", "t=1", store, "k=32", "seed=0", f"hydra.run.dir={sweep / '2'}"],
        "resume 1": ["train", f"resume={sweep / '1'}"],
    }


def names(plan):
    known = commands(plan)
    return [next(name for name, command in known.items() if command == pending) for pending in later(plan)]


def test_everything_from_nothing(plan):
    assert names(plan) == ["train", "sweep", "sweep page", "evaluate", "export", "report"]


def test_nothing_after_everything(plan):
    finish(plan)
    assert later(plan) == []


def test_a_stopped_run_is_resumed_and_what_was_made_of_it_is_made_anew(plan):
    finish(plan)
    train(plan.root / "topk", 1, finished=False)
    pending = plan.pending()
    next(pending)
    assert next(pending) == commands(plan)["resume"]
    train(plan.root / "topk", 9)  # what the resumed run leaves
    assert list(pending) == [commands(plan)[name] for name in ("evaluate", "export", "report")]


@pytest.mark.parametrize("left", ["nothing", "empty", "half a checkpoint"])
def test_a_run_without_a_whole_checkpoint_starts_anew_in_its_directory(plan, left):
    finish(plan)
    run = plan.root / "topk"
    (run / "run.json").unlink()
    (run / "checkpoints" / "100").rmdir()
    if left == "nothing":
        (run / "checkpoints").rmdir()
    if left == "half a checkpoint":
        (run / "checkpoints" / "100.orbax-checkpoint-tmp").mkdir()
    assert names(plan)[0] == "train"


def test_a_killed_run_is_resumed(plan):
    (plan.root / "topk" / "checkpoints" / "100").mkdir(parents=True)
    (plan.root / "topk" / "checkpoints" / "200.orbax-checkpoint-tmp").mkdir()
    assert names(plan)[0] == "resume"


def test_an_interrupted_sweep_runs_what_is_missing(plan):
    finish(plan)
    sweep = plan.root / "sweep"
    train(sweep / "1", finished=False)
    (sweep / "2" / "run.json").unlink()
    (sweep / "2" / "checkpoints" / "100").rmdir()
    assert names(plan) == ["resume 1", "point 2"]
    train(sweep / "1", 9)
    train(sweep / "2", 9)
    assert names(plan) == ["sweep page"]


def test_points_are_numbered_as_hydra_numbers_them(plan):
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    (plan.root / "sweep" / "0").mkdir(parents=True)
    parsed = OverridesParser.create().parse_overrides(list(plan.sweep))
    jobs = [tuple(job) for batch in BasicSweeper.split_arguments(parsed, None) for job in batch]
    trainings = [command for command in later(plan) if command[0] == "train"][1:]
    points = [(tuple(c[3:5]), Path(c[5].split("=")[1]).name) for c in trainings]
    assert points == [(job, str(n)) for n, job in enumerate(jobs)]


@pytest.mark.parametrize(
    "path, text, pending",
    [
        ("topk/eval.json", '{"metrics": ', ["evaluate", "report"]),
        ("topk/eval.json", "", ["evaluate", "report"]),
        ("topk/run.json", "", ["resume", "evaluate", "export", "report"]),
        ("topk/export_saelens/cfg.json", "{", ["export"]),
        ("topk/report.html", "<html>", ["report"]),
        ("sweep/sweep.html", "", ["sweep page"]),
    ],
)
def test_half_a_file_is_no_result(plan, path, text, pending):
    finish(plan)
    write(plan.root / path, text, 9)
    assert names(plan) == pending
