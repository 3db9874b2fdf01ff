"""A signal at any moment of a command ends it with 128 + n and one line, and the same command goes on to its end.

Most moments are found inside this process: the function that runs then is wrapped, so that the signal comes as it
begins, and runs as it is. Those before and around JAX's start are found in processes of their own.
"""

import gc
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import process_groups
import pytest

from saejax import cli, config
from saejax.activations import packing
from saejax.activations.language_model import harvest
from saejax.activations.store import writer as store_writer
from saejax.evals import evaluate
from saejax.interop import saelens
from saejax.parallel import signals
from saejax.report import page
from saejax.runs import directory, run
from saejax.storage import checkpoint
from saejax.training import memory

SMALL = [
    "train.batch=128", "buffer.rows=512", "train.eval_rows=128", "mesh=single", "sae.d_sae=48", "sae.k=3",
    "checkpoint.save_every_steps=4", "train.log_every_steps=1",
]  # fmt: skip
N_STEPS = 10


def training(run_dir: Path) -> list[str]:
    return ["train", *SMALL, f"train.n_tokens={128 * N_STEPS}", f"hydra.run.dir={run_dir}"]


def main(arguments: list[str]) -> int:
    """A command line here; its exit status, also where Hydra ends a job by leaving the program."""
    try:
        return cli.main(arguments)
    except SystemExit as ended:
        return int(ended.code or 0)


def strike(monkeypatch, owner: object, name: str, signum: int, at_call: int = 1) -> None:
    """A signal as a function begins for the n-th time."""
    function, calls = getattr(owner, name), []

    def struck(*args, **kwargs):
        calls.append(None)
        if len(calls) == at_call:
            os.kill(os.getpid(), signum)
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, struck)


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    assert main(training(run_dir)) == 0
    return run_dir


def same_end(run_dir: Path, straight: Path) -> bool:
    """Whether two finished runs hold the same parameters, to the bit."""
    (step, found), (wanted_step, wanted) = (checkpoint.load_arrays(path, ("params",)) for path in (run_dir, straight))
    equal = (np.array_equal(found["params"][k], wanted["params"][k]) for k in wanted["params"])
    return step == wanted_step == N_STEPS and all(equal)


PHASES: dict[str, tuple[object, str]] = {
    "composition": (config, "to_object"),
    "looking at the directory": (directory, "look"),
    "opening the data": (run, "open_stream"),
    "before compilation": (memory, "compile_step"),
    "first fill": (run, "fill"),
    "first step": (run, "evaluation"),
    "an evaluation": (evaluate.Evaluator, "evaluate"),
    "a save": (checkpoint.Checkpoints, "save"),
    "the record": (run, "write_record"),
}


QUICK = ("composition", "before compilation", "a save")


@pytest.mark.parametrize(
    "phase", [name if name in QUICK else pytest.param(name, marks=pytest.mark.nightly) for name in PHASES]
)
def test_training_stops_in_every_phase_and_goes_on(straight, tmp_path, monkeypatch, capfd, phase):
    signum = signals.SIGNALS[list(PHASES).index(phase) % len(signals.SIGNALS)]
    owner, name = PHASES[phase]
    with monkeypatch.context() as patched:
        strike(patched, owner, name, signum)
        assert main(training(tmp_path / "run")) == 128 + signum
    said = capfd.readouterr().err
    line = said.strip().splitlines()[-1]
    assert f"stopped by {signum.name}" in line or re.search(r"stopped at step \d+, saved", line)
    assert "Traceback" not in said and "Exception ignored" not in said
    assert main(training(tmp_path / "run")) == 0
    assert same_end(tmp_path / "run", straight)


def test_ctrl_c_in_the_hook_of_the_garbage_collector_while_the_step_is_compiled(tmp_path, monkeypatch, capfd):
    """Where JAX hooks in as well: what is raised there is printed as ignored, and the run went on to its end."""
    compile_step, calls = memory.compile_step, []

    def hooked(phase: str, info: dict) -> None:
        if not calls:
            calls.append(phase)
            os.kill(os.getpid(), signal.SIGINT)
            signals.noted()  # a line of Python: here the handler runs

    def compiled(*args, **kwargs):
        gc.callbacks.append(hooked)
        gc.collect(0)
        return compile_step(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(memory, "compile_step", compiled)
        try:
            assert main(training(tmp_path / "run")) == 128 + signal.SIGINT
        finally:
            gc.callbacks.remove(hooked)
    said = capfd.readouterr().err
    assert calls and said.strip().splitlines()[-1].startswith("saejax train: stopped by SIGINT")
    assert "Exception ignored" not in said


@pytest.mark.parametrize("name", ["restore", pytest.param("save", marks=pytest.mark.nightly)])
def test_a_resumed_run_stops_too(straight, tmp_path, monkeypatch, name):
    with monkeypatch.context() as patched:
        strike(patched, checkpoint.Checkpoints, "save", signal.SIGTERM)
        assert main(training(tmp_path / "run")) == 128 + signal.SIGTERM
    with monkeypatch.context() as patched:
        strike(patched, checkpoint.Checkpoints, name, signal.SIGUSR1)
        assert main(["train", f"resume={tmp_path}/run"]) == 128 + signal.SIGUSR1
    assert main(training(tmp_path / "run")) == 0
    assert same_end(tmp_path / "run", straight)


def test_the_last_step_is_the_end_and_no_other_job_of_a_sweep_begins(tmp_path, monkeypatch, capfd):
    sweep = ["train", "-m", *SMALL, "train.n_tokens=512", "seed=0,1", f"hydra.sweep.dir={tmp_path}"]
    with monkeypatch.context() as patched:
        strike(patched, checkpoint.Checkpoints, "ensure", signal.SIGUSR2)  # all steps are taken by then
        assert main(sweep) == 128 + signal.SIGUSR2
    assert "done: 4 steps" in capfd.readouterr().out
    assert (tmp_path / "0" / "run.json").exists() and not (tmp_path / "1" / "config.yaml").exists()
    assert main(sweep) == 0
    assert all((tmp_path / number / "run.json").exists() for number in "01")


@pytest.mark.parametrize(
    ("command", "owner", "name"),
    [
        ("evaluate", evaluate.Evaluator, "evaluate"),
        pytest.param("evaluate", run, "load", marks=pytest.mark.nightly),
        ("report", page, "build"),
        pytest.param("export", saelens, "export", marks=pytest.mark.nightly),
    ],
)
def test_what_reads_a_run_stops_and_goes_on(straight, monkeypatch, capfd, command, owner, name):
    with monkeypatch.context() as patched:
        strike(patched, owner, name, signal.SIGTERM)
        assert main([command, f"run={straight}"]) == 128 + signal.SIGTERM
    assert capfd.readouterr().err.strip().endswith(f"saejax {command}: stopped by SIGTERM; the same command continues")
    assert main([command, f"run={straight}"]) == 0


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [(harvest, "load", 1), (packing, "survey", 1), (harvest.Run, "_content", 3), (store_writer.Writer, "finish", 1)],
)
def test_a_harvest_stops_and_goes_on(small_model, small_store, tmp_path, monkeypatch, capfd, owner, name, call):
    command = [
        "harvest", f"path={tmp_path}/store", f"model={small_model}", "text=pydoc", "hook=blocks.1.hook_resid_post",
        "n_tokens=8192", "heldout_tokens=2048", "context_length=64", "shard_sequences=32",
    ]  # fmt: skip
    with monkeypatch.context() as patched:
        strike(patched, owner, name, signal.SIGUSR1, call)
        assert main(command) == 128 + signal.SIGUSR1
    assert "stopped by SIGUSR1" in capfd.readouterr().err.strip().splitlines()[-1]
    assert main(command) == 0
    files = [
        {f.name: f.read_bytes() for f in (root / "train").glob("shard*")} for root in (tmp_path / "store", small_store)
    ]
    assert files[0] == files[1]


CODE = "import sys; from saejax import cli; sys.exit(cli.main(sys.argv[1:]))"


class Process:
    """A command in a process of its own, on one device."""

    def __init__(self, folder: Path, *arguments: str, **variables: str):
        self.log = folder / f"{os.urandom(4).hex()}.log"
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"} | variables
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-c", CODE, *arguments], env=environment, stdout=out, stderr=subprocess.STDOUT
            )

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_until(self, condition, seconds: float = 200) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end and self.process.poll() is None, self.said()[-2000:]
            time.sleep(0.005)

    def watches(self) -> bool:
        return process_groups.watches(self.process.pid)

    def ends(self, *statuses: int, seconds: float = 60) -> None:
        try:
            assert self.process.wait(seconds) in statuses, self.said()[-3000:]
        finally:
            self.process.kill()
            self.process.wait()
        assert "Traceback" not in self.said() and "Exception ignored" not in self.said(), self.said()[-3000:]


linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc tells when handlers are in place")


@linux
def test_a_signal_while_everything_is_imported(tmp_path):
    started = Process(tmp_path, *training(tmp_path / "run"))
    started.wait_until(started.watches)
    started.process.send_signal(signal.SIGTERM)
    started.ends(128 + signal.SIGTERM)
    assert started.said() == "saejax train: stopped by SIGTERM; the same command continues\n"


@pytest.mark.nightly
def test_ctrl_c_while_the_step_is_compiled(tmp_path):
    nothing_kept = {"JAX_LOG_COMPILES": "1", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    started = Process(tmp_path, *training(tmp_path / "run"), **nothing_kept)
    started.wait_until(lambda: "Compiling jit(step)" in started.said())
    started.process.send_signal(signal.SIGINT)
    started.ends(128 + signal.SIGINT)
    assert "stopped by SIGINT" in started.said().splitlines()[-1] and "done" not in started.said()


@pytest.mark.nightly
@linux
@pytest.mark.parametrize("signum", signals.SIGNALS)
def test_a_signal_at_any_moment(straight, tmp_path, signum):
    """Over the whole life of a command that compiles anew; the same command goes on to the same end, bit for bit."""
    fresh = {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    began = time.monotonic()
    Process(tmp_path, *training(tmp_path / "whole"), **fresh).ends(0)
    seconds, n = time.monotonic() - began, 8
    statuses = []
    for number in range(n):
        run_dir = tmp_path / str(number)
        started = Process(tmp_path, *training(run_dir), **fresh)
        started.wait_until(started.watches)
        time.sleep(seconds * number / n)
        started.process.send_signal(signum)
        started.ends(0, 128 + signum, seconds=max(60, seconds))
        statuses.append(started.process.returncode)
        Process(tmp_path, *training(run_dir)).ends(0)
        assert same_end(run_dir, straight)
    assert statuses.count(128 + signum) >= n // 2
