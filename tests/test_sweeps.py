"""The same command line again: finished runs are left alone, broken ones go on, other runs are refused."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import numpy as np
import pytest

from saejax import cli, config
from saejax.cli import preflight
from saejax.errors import UserError
from saejax.runs import directory
from saejax.runs.directory import Request, Stage
from saejax.storage import checkpoint, lock

CODE = "import sys; from saejax import cli; sys.exit(cli.main(sys.argv[1:]))"
SMALL = [
    "train.batch=256", "buffer.rows=1024", "train.eval_rows=256", "mesh=single", "sae.d_sae=64",
    "checkpoint.save_every_steps=5", "checkpoint.keep_last=9", "train.log_every_steps=1",
]  # fmt: skip


def sweep(directory: Path, *arguments: str, n_steps: int = 10) -> list[str]:
    """Arguments of a sweep of short runs."""
    return ["train", "-m", *SMALL, f"train.n_tokens={n_steps * 256}", f"hydra.sweep.dir={directory}", *arguments]


def start(arguments: list[str]) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    command = [sys.executable, "-c", CODE, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def said(arguments: list[str], status: int = 0) -> str:
    """What the command prints, once it ended with `status`."""
    done = forked.run(*arguments)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_sweep_that_broke_goes_on_where_it_was(tmp_path):
    arguments = sweep(tmp_path, "sae.k=2,4")
    text = said(arguments)
    assert f"{tmp_path}/0 starts" in text and f"{tmp_path}/1 starts" in text
    _, before = checkpoint.load_arrays(tmp_path / "1", ("params",))
    record = (tmp_path / "0" / "run.json").read_bytes()
    # What a machine that died between two checkpoints leaves behind.
    (tmp_path / "1" / "run.json").unlink()
    (tmp_path / "1" / "checkpoints" / "10").rename(tmp_path / "elsewhere")
    text = said(arguments)
    assert f"{tmp_path}/0 is finished already at step 10" in text and f"{tmp_path}/1 goes on at step 5" in text
    step, after = checkpoint.load_arrays(tmp_path / "1", ("params",))
    assert step == 10
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        np.testing.assert_array_equal(after["params"][name], before["params"][name])
    steps = [json.loads(line)["step"] for line in (tmp_path / "1" / "metrics.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == list(range(1, 11)) and max(map(steps.count, steps)) <= 2  # training and evaluation
    assert (tmp_path / "0" / "run.json").read_bytes() == record


@pytest.mark.parametrize("fold", [[], ["sweep.fold=true"]], ids=["sweep", "folded"])
@pytest.mark.parametrize("name", ["swept", "a/../swept", "swe${train.seed_of_name}", "link"])
def test_a_second_sweep_is_refused_before_anything_is_written(fold, name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("swept")
    name = name.replace("${train.seed_of_name}", "p${checkpoint.keep_last}ed")
    place = tmp_path / ("swept" if "keep_last" not in name else "swep9ed")
    (tmp_path / "a").mkdir()
    with lock.hold(place, "first"):
        assert cli.main(sweep(Path(name), "sae.k=2,4", *fold)) == 2
        assert [file.name for file in place.iterdir()] == [".lock"]
    line = rf"saejax train: {tmp_path}/\S+ is in use by first of process {os.getpid()} on .*\n"
    assert re.fullmatch(line, capsys.readouterr().err)


def test_a_sweep_writes_through_no_link(tmp_path, capsys):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "swept").mkdir()
    (tmp_path / "swept" / "multirun.yaml").symlink_to(tmp_path / "precious")
    assert cli.main(sweep(tmp_path / "swept", "sae.k=2,4")) == 2
    assert "multirun.yaml is a link" in capsys.readouterr().err and (tmp_path / "precious").read_text() == "mine"


@pytest.mark.parametrize(("place", "held"), [("0", True), ("1", False)])
def test_of_several_processes_the_first_holds_the_sweep(place, held, tmp_path):
    mesh = [
        "mesh.distributed=manual",
        "mesh.num_processes=2",
        "mesh.coordinator=localhost:1",
        f"mesh.process_id={place}",
    ]
    arguments = sweep(tmp_path, "sae.k=2,4", *mesh, f"mesh.process_id={place}")[1:]
    with preflight.alone(arguments, preflight.check(arguments)) as settled:
        assert (tmp_path / ".lock").exists() == held and settled[: len(arguments)] == arguments
        assert settled[len(arguments) :] == ([f"hydra.sweep.dir={tmp_path}"] if held else [])


def test_a_sweep_named_by_the_time_holds_the_directory_that_hydra_takes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["-m", *SMALL, "sae.k=2,4"]
    with preflight.alone(arguments, preflight.check(arguments)) as settled:
        (place,) = (tmp_path / "runs").iterdir()
        assert settled == [*arguments, f"hydra.sweep.dir={place}"] and (place / ".lock").exists()
        assert {path.parent for path in preflight.directories(settled)} == {place}


def test_what_a_directory_holds(tmp_path):
    cfg = config.load("train", config.Config, ["train.n_tokens=5120"])
    assert directory.look(cfg, tmp_path).stage is Stage.empty
    (tmp_path / "config.yaml").write_text(config.to_yaml(cfg))
    assert directory.look(cfg, tmp_path).stage is Stage.empty  # nothing was saved yet
    (tmp_path / "checkpoints" / "10").mkdir(parents=True)
    (tmp_path / "checkpoints" / "12.orbax-checkpoint-tmp").mkdir()
    record = {"finished": True, "step": 5, "evaluation": {"l0": 3.0, "fvu": 0.1}}
    for step, finished in ((5, True), (10, False)):
        (tmp_path / "run.json").write_text(json.dumps(record | {"step": step, "finished": finished}))
        assert str(directory.decide(cfg, tmp_path, Request.same)) == "goes on at step 10"
    (tmp_path / "run.json").write_text(json.dumps(record | {"step": 10}))
    assert directory.look(cfg, tmp_path).stage is Stage.finished
    elsewhere = config.load("train", config.Config, ["train.n_tokens=5120", "mesh=latent2", "tracker=wandb"])
    assert str(directory.decide(elsewhere, tmp_path, Request.same)) == "is finished already at step 10"
    for override, said_of in (("optim.lr=0.5", "got 0.5"), ("train.n_tokens=10240", "got 10240"), ("seed=1", "got 1")):
        other = config.from_run(tmp_path, [override])
        key = override.split("=")[0]
        with pytest.raises(UserError, match=f"of another run: {key} is .* there, {said_of}; .*resume={tmp_path}"):
            directory.decide(other, tmp_path, Request.same)
    for broken in ("", "[]", "{"):
        (tmp_path / "run.json").write_text(broken)
        assert directory.look(cfg, tmp_path).stage is Stage.begun


def test_what_a_search_is_told(tmp_path):
    assert directory.objective(tmp_path, "minimize") is None
    (tmp_path / "run.json").write_text(json.dumps({"evaluation": {"l0": 3.0, "fvu": 0.125}}))
    assert directory.objective(tmp_path, None) is None
    assert directory.objective(tmp_path, "minimize") == 0.125
    assert directory.objective(tmp_path, ["minimize", "minimize"]) == (3.0, 0.125)


@pytest.mark.parametrize("name", ["launcher=submitit_slurm", "hydra/launcher=submitit_local", "sweeper=optuna"])
def test_a_launcher_that_is_not_installed_is_one_line(name, monkeypatch):
    with pytest.raises(UserError, match=f"{name} is for sweeps: add -m"):
        preflight.check([name])
    extra = "optuna" if "optuna" in name else "submitit"
    for module, _ in preflight.PLUGINS.values():
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"{name} needs a plugin of Hydra: pip install 'saejax\[{extra}\]'"):
        preflight.check(["-m", name, "sae.k=2,4"])


@pytest.mark.nightly
def test_a_job_that_is_preempted_is_queued_again_and_loses_nothing(tmp_path):
    straight, swept = tmp_path / "straight", tmp_path / "swept"
    point = ["sae.k=4", "checkpoint.save_every_steps=200"]
    said(sweep(straight, *point, n_steps=3000))
    process = start(sweep(swept, *point, "launcher=submitit_local", "hydra.launcher.timeout_min=5", n_steps=3000))
    task = _wait_for(lambda: checkpoint.steps(swept / "0") and _task_below(swept))
    os.kill(task, signal.SIGUSR2)
    text, _ = process.communicate(timeout=280)
    assert process.returncode == 0, text
    log = "".join(file.read_text() for file in (swept / ".submitit").rglob("*_log.*"))
    assert "Requeued job" in log and "goes on at step" in log and "saved; continue" in log
    found = [checkpoint.load_arrays(path / "0", ("params",)) for path in (straight, swept)]
    assert [step for step, _ in found] == [3000, 3000]
    np.testing.assert_array_equal(*(arrays["params"]["W_dec"] for _, arrays in found))


@pytest.mark.nightly
def test_a_search_goes_on_from_what_it_found(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    search = ["sweeper=optuna", "hydra.sweeper.n_trials=3", "optim.lr=interval(1e-4,1e-2)", "sae.k=4"]
    text = said(sweep(tmp_path, *search))
    assert text.count(" starts") == 3 and "Best value" in text
    for file in ("run.json", "metrics.jsonl"):
        (tmp_path / "2" / file).unlink()
    again = said(sweep(tmp_path, *search))
    assert again.count("is finished already") == 2 and again.count("goes on at step 10") == 1
    best = [line for line in (text + again).splitlines() if "Best" in line]
    assert len(best) == 4 and {line.split("] ")[-1] for line in best[:2]} == {line.split("] ")[-1] for line in best[2:]}


def _task_below(folder: Path) -> int | None:
    """The process that submitit's local executor runs a job in."""
    for status in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = status.read_bytes().decode().split("\0")
        except OSError:
            continue
        if "submitit.core._submit" in words and str(folder) in " ".join(words):
            return int(status.parent.name)
    return None


def _wait_for(condition, seconds: float = 200):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError("waited in vain")
