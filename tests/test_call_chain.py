"""From the command line to the compiled step in five calls, those that docs/architecture.md names."""

import re
import sys
from pathlib import Path

import pytest

import saejax
from saejax import cli, config
from saejax.runs import run
from saejax.training import memory

ROOT = Path(saejax.__file__).parent
SECTION = "## From the command line to the step"
SMALL = [
    "source.d_in=16", "source.n_features=64", "source.heldout_rows=64", "sae.d_sae=64", "sae.k=4", "train.batch=32",
    "train.n_tokens=64", "train.eval_rows=64", "buffer.rows=64", "mesh=single",
]  # fmt: skip
SILENT = ["hydra/job_logging=none", "hydra/hydra_logging=none"]  # Hydra would close the handlers of pytest


@pytest.fixture
def stack(monkeypatch):
    """The functions of saejax on the stack when the step is called, outermost first."""
    found, plain = [], memory.compile_step

    def compile_step(*args, **kwargs):
        step = plain(*args, **kwargs)

        def called(state, fresh):
            found[:] = functions()
            return step(state, fresh)

        return called

    monkeypatch.setattr(memory, "compile_step", compile_step)
    return found


def functions():
    """Those of saejax on the stack, as package.module.function."""
    frame, found = sys._getframe(1), []
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found.append(f"{module}.{frame.f_code.co_qualname}")
        frame = frame.f_back
    return found[::-1]


def documented():
    """The numbered list in docs/architecture.md."""
    text = (ROOT.parent / "docs" / "architecture.md").read_text().split(SECTION)[1].split("\n## ")[0]
    return re.findall(r"^\d\. `([\w.]+)`", text, flags=re.M)


def test_a_run_comes_to_its_step_in_the_five_calls_that_the_docs_name(stack, tmp_path):
    assert cli.main(["train", *SMALL, *SILENT, f"hydra.run.dir={tmp_path}"]) == 0
    assert stack == documented() and len(stack) == 5


def test_a_run_that_goes_on_takes_one_call_less(stack, tmp_path):
    run.train(config.load("train", config.Config, SMALL), tmp_path)
    assert cli.main(["train", f"resume={tmp_path}", "train.n_tokens=128"]) == 0
    assert stack == [name for name in documented() if name != "cli.jobs.job"]
