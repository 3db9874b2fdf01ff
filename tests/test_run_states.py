"""Every state of a run directory, every request, through every door: one table says what happens.

The doors are real up to the first checkpoint that they would open or write; nothing is trained but the run of `saved`.
"""

import itertools
import json
import re
import shutil

import pytest

from saejax import cli, config
from saejax.errors import UserError
from saejax.runs import directory, ensembles, run
from saejax.runs.directory import Action, Request
from saejax.storage import checkpoint

SMALL = [
    "source.d_in=16", "source.n_features=64", "source.heldout_rows=64", "sae.d_sae=64", "sae.k=4", "train.batch=32",
    "train.n_tokens=256", "train.eval_rows=64", "buffer.rows=64", "checkpoint.save_every_steps=4",
    "checkpoint.keep_last=2", "mesh=single", "data_seed=0",
]  # fmt: skip
SILENT = ["hydra/job_logging=none", "hydra/hydra_logging=none"]  # Hydra would close the handlers of pytest
MEMBERS = ["ensemble.seed=[0,1]"]
CHANGED = {"changed": "optim.lr=0.5", "foreign": "sae.k=2"}
"""States in which the request is what differs: a key that may change on resume, and one that may not."""

TABLE = """
state       new     same    resume  member     member_resume
missing     start   start   refuse  start      start
empty       start   start   refuse  start      start
begun       refuse  go_on   go_on   go_on      go_on
finished    refuse  skip    go_on   skip       skip
failed      refuse  go_on   go_on   leave_out  leave_out
changed     refuse  refuse  go_on   refuse     go_on
foreign     refuse  refuse  refuse  refuse     refuse
no_config   refuse  refuse  refuse  refuse     refuse
ensemble    refuse  refuse  refuse  refuse     refuse
"""
(_, *REQUESTS), *ROWS = (line.split() for line in TABLE.split("\n") if line)
EXPECTED = {(state, request): said for state, *row in ROWS for request, said in zip(REQUESTS, row, strict=True)}
REFUSALS = {
    ("missing", "resume"): "is not a run directory: it holds no config.yaml",
    ("empty", "resume"): "no checkpoint in .*: start the run anew",
    ("foreign", "resume"): "sae.k cannot change on resume: the run has 4, got 2",
    ("foreign", "member_resume"): "sae.k cannot change on resume",
    ("changed", "same"): "already holds checkpoints of another run: optim.lr is 0.001 there, got 0.5; .*resume=",
    ("foreign", "member"): "already holds checkpoints of another run: sae.k is 4 there, got 2",
    ("begun", "new"): "already holds checkpoints: continue with resume=.*, or take another directory",
    ("no_config", "same"): "is not a run directory: it holds no config.yaml",
    ("no_config", "new"): "already holds checkpoints",
    ("ensemble", "same"): "holds an ensemble: continue it with resume=.*, or take another directory",
}


def composed(*overrides):
    return config.load("train", config.Config, [*SMALL, *overrides])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A finished run with checkpoints of steps 4 and 8."""
    run_dir = tmp_path_factory.mktemp("saved") / "run"
    assert run.train(composed(), run_dir).step == 8 and checkpoint.steps(run_dir) == [4, 8]
    return run_dir


def put(state, saved, path):
    """A directory in a state, as a real run leaves it."""
    if state == "missing":
        return
    if state == "ensemble":
        (path / "members" / "seed0").mkdir(parents=True)
        return
    shutil.copytree(saved, path)
    if state == "empty":
        shutil.rmtree(path / "checkpoints")
    if state != "finished":  # it died, or was left, before its end
        (path / "run.json").unlink()
        shutil.rmtree(path / "checkpoints" / "8", ignore_errors=True)
    if state == "failed":
        (path / "run.json").write_text(json.dumps({"finished": False, "failed": "not finite at step 5"}))
    if state == "no_config":
        (path / "config.yaml").unlink()


@pytest.mark.parametrize(("state", "request_name"), EXPECTED)
def test_the_policy(state, request_name, saved, tmp_path):
    put(state, saved, tmp_path / "run")
    cfg = composed(*filter(None, [CHANGED.get(state)]))
    try:
        found = directory.decide(cfg, tmp_path / "run", Request[request_name]).action.name
    except UserError as error:
        found = "refuse"
        assert re.search(REFUSALS.get((state, request_name), ""), str(error))
    assert found == EXPECTED[state, request_name]


# Door -> (where it has its run, what it asks of it, how it is opened).
DOORS = {
    "python": ("run", "new", lambda root, given: run.train(composed(*given), root / "run")),
    "python resume": ("run", "resume", lambda root, given: run.train(composed(*given), root / "run", resume=True)),
    "command": (
        "run",
        "same",
        lambda root, given: cli.main(["train", *SMALL, *SILENT, *given, f"hydra.run.dir={root}/run"]),
    ),
    "resume": ("run", "resume", lambda root, given: cli.main(["train", f"resume={root}/run", *given])),
    "sweep": (
        "0",
        "same",
        lambda root, given: cli.main(["train", "-m", *SMALL, *SILENT, *given, f"hydra.sweep.dir={root}"]),
    ),
    "folded": (
        "0",
        "member",
        lambda root, given: cli.main(
            ["train", "-m", *SMALL, *given, "seed=0,1", "sweep.fold=true", f"hydra.sweep.dir={root}"]
        ),
    ),
    "ensemble": ("members/seed0", "member", lambda root, given: ensembles.train(composed(*MEMBERS, *given), root)),
    "ensemble resume": (
        "members/seed0",
        "member_resume",
        lambda root, given: ensembles.train(composed(*MEMBERS, *given), root, resume=True),
    ),
}


class Opened(BaseException):
    """A run has come to its checkpoints."""


@pytest.fixture
def begins(monkeypatch):
    """What runs begin as: directory -> whether it goes on. Nothing comes further."""
    found, plain = {}, directory.take

    def take(cfg, run_dir, resume, stack):
        owner = plain(cfg, run_dir, resume, stack)
        found[run_dir] = resume
        return owner

    def opened(*_, **__):
        raise Opened

    monkeypatch.setattr(directory, "take", take)
    monkeypatch.setattr(checkpoint, "Checkpoints", opened)
    return found


def every_door():
    """(door, state); of the two that compose every job of a sweep, which takes a second, the rarer states are slow."""
    for door, state in itertools.product(DOORS, [state for state, *_ in ROWS]):
        often = door not in ("sweep", "folded") or state in ("begun", "finished", "foreign")
        yield pytest.param(door, state, marks=() if often else pytest.mark.nightly)


@pytest.mark.parametrize(("door", "state"), every_door())
def test_every_door_follows_the_policy(door, state, saved, tmp_path, begins, caplog, capsys):
    place, request_name, opened = DOORS[door]
    put(state, saved, tmp_path / place)
    status, line = None, ""
    with caplog.at_level("INFO"):
        try:
            status = opened(tmp_path, [CHANGED[state]] if state in CHANGED else [])
        except UserError as error:
            status, line = 2, str(error)
        except SystemExit as error:
            status = error.code
        except Opened:
            pass
    said = caplog.text + line + capsys.readouterr().err
    if tmp_path / place in begins:
        found = "go_on" if begins[tmp_path / place] else "start"
    elif f"{tmp_path / place} is left out" in said:
        found = "leave_out"
    else:
        found = "refuse" if status in (1, 2) else "skip"
    assert found == EXPECTED[state, request_name], said
    if found == "refuse":
        assert re.search(REFUSALS.get((state, request_name), str(tmp_path)), said)


@pytest.mark.parametrize(
    ("there", "wanted", "resume", "expected"),
    [
        (None, "ensemble.seed=[0,1]", False, "start"),
        ("ensemble.seed=[0,1]", "ensemble.seed=[0,1]", False, "start"),
        ("ensemble.seed=[0,1]", "ensemble.seed=[1,0,2]", False, "start"),
        ("ensemble.seed=[0,1]", "ensemble.seed=[0,2]", False, "holds another ensemble, with seed1; take another"),
        ("ensemble.seed=[0,1]", "ensemble.seed=[0,1]", True, "start"),
        ("ensemble.seed=[0,1]", "ensemble.seed=[0,2]", True, "ensemble.seed cannot change on resume"),
        ("run", "ensemble.seed=[0,1]", False, "already holds checkpoints of one run"),
    ],
)
def test_an_ensemble_as_a_whole(there, wanted, resume, expected, saved, tmp_path):
    if there == "run":
        put("finished", saved, tmp_path / "whole")
    elif there is not None:
        (tmp_path / "whole").mkdir()
        (tmp_path / "whole" / "config.yaml").write_text(config.to_yaml(composed(there)))
    request = Request.resume if resume else Request.same
    if expected == "start":
        assert directory.decide(composed(wanted), tmp_path / "whole", request).action is Action.start
        return
    with pytest.raises(UserError, match=expected):
        ensembles.train(composed(wanted), tmp_path / "whole", resume=resume)
