"""The forker of the session, the undisturbed run to compare with, and the table of what was survived."""

import os
import pathlib
import sys
import time

import fault_runs
import pytest
from fault_runs import RHYTHM, Straight, arrays, losses

from saejax.storage import checkpoint

for folder in (".", "activations"):  # for the small states, stores and models of the tests there
    sys.path.append(str(pathlib.Path(__file__).parents[1] / folder))

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "reliability.md"
HEAD = ["| fault | trials | ended as it must | damage accepted | finished checkpoints or shards lost |"]
HEAD += ["|---|---|---|---|---|"]
BEGIN, END = "<!-- counts: written by `make faults` -->\n", "<!-- end of counts -->\n"


@pytest.fixture(scope="session")
def forker(tmp_path_factory):
    made = fault_runs.Forker(tmp_path_factory.mktemp("forker"))
    yield made
    made.close()


@pytest.fixture(scope="session")
def straight(forker, tmp_path_factory) -> Straight:
    for name in ("compiling", "run"):
        run_dir = tmp_path_factory.mktemp("straight") / name
        began = time.monotonic()
        assert forker.run("train", run_dir=str(run_dir), changes=[RHYTHM]) == 0, forker.said()
    saved = {step: arrays(run_dir, step) for step in checkpoint.steps(run_dir)}
    return Straight(run_dir, saved, losses(run_dir), time.monotonic() - began)


def pytest_configure(config):
    config.faults = {}


@pytest.fixture
def count(request):
    """count(fault, trials, equal, wrong=0, lost=0): a row of the table, where the suite runs in full length."""

    def add(fault: str, trials: int, equal: int, wrong: int = 0, lost: int = 0) -> None:
        before = request.config.faults.get(fault, (0, 0, 0, 0))
        request.config.faults[fault] = tuple(a + b for a, b in zip(before, (trials, equal, wrong, lost), strict=True))

    return add


def pytest_sessionfinish(session):
    """Rewrite the table, when the long suite was what ran; rows of faults that were not tried this time stay."""
    found = session.config.faults
    if not found or os.environ.get("SAEJAX_FAULTS_TABLE") != "1":
        return
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    old, after = rest.split(END)
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in old.splitlines()[2:]}
    rows |= {fault: f"| {fault} | {' | '.join(map(str, counts))} |" for fault, counts in found.items()}
    PAGE.write_text(before + BEGIN + "\n".join([*HEAD, *rows.values(), ""]) + END + after, encoding="utf-8")
