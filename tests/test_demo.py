"""What the demo decides to run: no job is started here, files are put where jobs leave them."""

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


def train(run, time=1):
    write(run / "run.json", json.dumps({"finished": True}), time)


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


def commands(plan):
    run, sweep = plan.root / "topk", plan.root / "sweep"
    store = f"source.path={plan.root / 'store'}"
    return {
        "harvest": ["harvest", f"path={plan.root / 'store'}", "h=1"],
        "train": ["train", "t=1", store, f"hydra.run.dir={run}"],
        "sweep": ["train", "-m", "t=1", store, "k=16,32", "seed=0,1", f"hydra.sweep.dir={sweep}"],
        "sweep page": ["report", f"sweep={sweep}"],
        "evaluate": ["evaluate", f"run={run}", "e=1"],
        "export": ["export", f"run={run}"],
        "report": ["report", f"run={run}"],
    }


def later(plan):
    """What is pending beside the commands that find out by themselves what is left to do."""
    known = commands(plan)
    pending = [next(name for name, command in known.items() if command == found) for found in plan.pending()]
    assert pending[:3] == ["harvest", "train", "sweep"]
    return pending[3:]


def test_everything_from_nothing(plan):
    assert later(plan) == ["sweep page", "evaluate", "export", "report"]


def test_nothing_is_made_again_after_everything(plan):
    finish(plan)
    assert later(plan) == []


def test_what_was_made_of_an_older_run_is_made_anew(plan):
    finish(plan)
    pending = plan.pending()
    assert [next(pending) for _ in range(3)] == [commands(plan)[name] for name in ("harvest", "train", "sweep")]
    train(plan.root / "topk", 9)  # what a run leaves that went on
    assert list(pending) == [commands(plan)[name] for name in ("evaluate", "export", "report")]


def test_a_point_that_was_missing_makes_the_page_of_the_sweep_anew(plan):
    finish(plan)
    train(plan.root / "sweep" / "2", 9)
    assert later(plan) == ["sweep page"]


@pytest.mark.parametrize(
    "path, text, pending",
    [
        ("topk/eval.json", '{"metrics": ', ["evaluate", "report"]),
        ("topk/eval.json", "", ["evaluate", "report"]),
        ("topk/run.json", "", ["evaluate", "export", "report"]),
        ("topk/export_saelens/cfg.json", "{", ["export"]),
        ("topk/report.html", "<html>", ["report"]),
        ("sweep/sweep.html", "", ["sweep page"]),
    ],
)
def test_half_a_file_is_no_result(plan, path, text, pending):
    finish(plan)
    write(plan.root / path, text, 9)
    assert later(plan) == pending
