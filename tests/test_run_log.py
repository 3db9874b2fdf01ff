"""train.log: what the terminal showed, in every way of running; places that cannot be written to, told in one line."""

import json
import logging
import os
import shlex
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from forked import run as saejax_command
from test_cli import CODE, QUICK

from saejax import cli
from saejax.cli import quiet
from saejax.storage import atomic, run_log
from saejax.training import progress

WAYS = {
    "single": (["hydra.run.dir=r"], {"r": "done: 40 steps"}),
    "ensemble": (["hydra.run.dir=r", "ensemble.seed=[0,1]"], {"r": "tokens/s, each seen by every member"}),
    "sweep": (["-m", "hydra.sweep.dir=r", "seed=0,1"], {"r/0": "done: 40 steps", "r/1": "done: 40 steps"}),
    "folded": (
        ["-m", "sweep.fold=true", "hydra.sweep.dir=r", "seed=0,1", "data_seed=0"],
        {"r/0": "folded into one step: 0, 1", "r/1": "tokens/s, each seen by every member"},
    ),
}


SLOW = [pytest.param(way, marks=pytest.mark.nightly) for way in WAYS if way != "single"]


@pytest.mark.parametrize("way", ["single", *SLOW])
def test_the_log_holds_what_the_terminal_showed(way, tmp_path):
    arguments, said = WAYS[way]
    done = saejax_command("train", *QUICK, *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for place, words in said.items():
        text = (tmp_path / place / run_log.NAME).read_text()
        lines = [line.split(" ", 2)[2] for line in text.splitlines()]  # after date and time
        assert lines[0].startswith("saejax ") and words in text and "step 40 of 40 (100%)" in text
        shown = [line for line in done.stdout.splitlines() if "next:" in line or "done:" in line]
        assert way == "sweep" or not [line for line in shown if line not in lines]
    if way != "single":
        return
    more = saejax_command("train", "resume=r", "train.n_tokens=12800", cwd=tmp_path)
    assert more.returncode == 0, more.stderr
    text = (tmp_path / "r" / run_log.NAME).read_text()
    assert "done: 50 steps" in text and text.count("done:") == 2
    wrong = saejax_command("train", "resume=r", "train.n_tokens=15360", "seed=4", cwd=tmp_path)
    assert wrong.returncode == 2
    (line,) = wrong.stderr.strip().splitlines()
    assert line.removeprefix("saejax train: ") in (tmp_path / "r" / run_log.NAME).read_text()


ODD = "模型 k=2,(x)#{a'b\"c;$HOME"


def test_what_is_printed_can_be_pasted(tmp_path):
    """Typed into a real shell elsewhere: the commands that a run in a folder with every odd character prints."""
    run_dir = tmp_path / "my runs" / ODD
    done = saejax_command("train", *QUICK, f"hydra.run.dir=my runs/{ODD}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("next: ")]
    commands = line.removeprefix("next: ").split("   ")
    assert [command.split()[1] for command in commands] == ["evaluate", "report"]
    for command, written in zip(commands, ("eval.json", "report.html"), strict=True):
        program = shlex.join([sys.executable, "-c", "import json, sys; print(json.dumps(sys.argv[1:]))"])
        pasted = command.replace("saejax", program, 1)
        words = json.loads(subprocess.run(pasted, shell=True, capture_output=True, check=True, cwd="/").stdout)
        ran = saejax_command(*words, cwd=Path("/"))
        assert ran.returncode == 0, ran.stderr
        assert (run_dir / written).is_file()


# --- Places that cannot be written to


@pytest.fixture
def file_in_the_way(tmp_path):
    (tmp_path / "file").write_text("")
    return tmp_path / "file" / "x"


OUTPUTS = {
    "train": lambda place: ["train", f"hydra.run.dir={place}"],
    "sweep": lambda place: ["train", "-m", f"hydra.sweep.dir={place}", "seed=0,1"],
    "folded": lambda place: ["train", "-m", "sweep.fold=true", f"hydra.sweep.dir={place}", "seed=0,1", "data_seed=0"],
    "harvest": lambda place: ["harvest", f"path={place}"],
    "export": lambda place: ["export", "run=r", f"path={place}"],
    "report": lambda place: ["report", "run=r", f"out={place}/page.html"],
    "sweep's report": lambda place: ["report", "sweep=r", f"out={place}/page.html"],
    "experiment": lambda place: ["experiment", "synth/sb_iid", "quick=true", f"out={place}"],
    "all_quick": lambda place: ["experiment", "all_quick", f"out={place}"],
}


@pytest.mark.parametrize("output", OUTPUTS)
def test_a_place_that_cannot_be_is_refused_before_the_work(output, file_in_the_way, tmp_path, monkeypatch, capsys):
    """Before the run is even read, so the line is about the place, although there is no run r."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r").mkdir()
    assert cli.main(OUTPUTS[output](file_in_the_way)) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(tmp_path / "file") in said and ("directory" in said or "exists" in said)


def test_a_place_is_tried_without_a_trace(tmp_path):
    atomic.check_place(tmp_path / "a" / "b" / "c")
    atomic.check_place(tmp_path / "a" / "page.html", file=True)
    atomic.try_write(tmp_path, 10_000)
    assert not list(tmp_path.iterdir())
    with pytest.raises(IsADirectoryError):
        atomic.check_place(tmp_path, file=True)


def test_room_for_a_checkpoint(tmp_path, monkeypatch, caplog):
    import shutil

    free = shutil.disk_usage(tmp_path).free
    atomic.check_room(tmp_path, 1000)
    assert not caplog.text
    with pytest.raises(
        atomic.UserError, match="a checkpoint takes .* GiB, and .* has room for .* GiB: make room"
    ) as caught:
        atomic.check_room(tmp_path, free + 2**40)
    assert "\n" not in str(caught.value)
    atomic.check_room(tmp_path, int(free / 1.5))
    assert "takes both" in caplog.text


@pytest.mark.nightly
def test_a_limit_on_the_size_of_files_is_one_line(tmp_path):
    """It was the right line among 10,123 of threads that died."""
    command = shlex.join([sys.executable, "-c", CODE, "train", *QUICK, "hydra.run.dir=r"])
    done = subprocess.run(
        f"ulimit -f 16; {command}", shell=True, capture_output=True, text=True, cwd=tmp_path, timeout=250
    )
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert "File too large" in line and str(tmp_path / "r") in line


@pytest.mark.parametrize("where", [pytest.param("argument", marks=pytest.mark.nightly), "folder"])
def test_a_locale_without_the_letters_of_a_path_is_one_line(where, tmp_path):
    """The run was trained and could not be saved, in 9,103 lines."""
    (tmp_path / "模型").mkdir()
    arguments = ["hydra.run.dir=模型/r"] if where == "argument" else []
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0"}
    done = subprocess.run(
        [sys.executable, "-c", CODE, "train", *QUICK, *arguments],
        capture_output=True, cwd=tmp_path / ("." if where == "argument" else "模型"), env=environment, timeout=250,
    )  # fmt: skip
    assert done.returncode == 2
    (line,) = done.stderr.decode("ascii").strip().splitlines()
    assert "set PYTHONUTF8=1" in line


def test_a_log_that_cannot_be_written_stops_nothing(tmp_path, capsys):
    (tmp_path / run_log.NAME).mkdir()
    with run_log.kept([tmp_path]):
        run_log.note("one")
        logging.getLogger("saejax").warning("two")
    assert capsys.readouterr().err.count("is not written") == 1


def test_an_error_and_a_signal_end_the_log(tmp_path):
    for number, error in enumerate((atomic.UserError("one line"), OSError(28, "No space left"), KeyboardInterrupt())):
        (tmp_path / str(number)).mkdir()
        with pytest.raises(type(error)), run_log.kept([tmp_path / str(number)]):
            raise error
    last = [(tmp_path / name / run_log.NAME).read_text().splitlines()[-1].split(" ", 2)[2] for name in "012"]
    assert last == ["ended: one line", "ended: [Errno 28] No space left", "interrupted"]


def test_progress_is_noted_once_a_minute(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    with run_log.kept([tmp_path]):
        bar = progress.Progress(0, 600, 1)
        for _ in range(600):
            now[0] += 1.0
            bar.step(0.0)
        bar.close()
    notes = [line.split(" ", 2)[2] for line in (tmp_path / run_log.NAME).read_text().splitlines()[1:]]
    steps = [int(note.split()[1]) for note in notes]
    # One for the first step, one after more than 60 s each, one at the end.
    assert steps == [1, *range(62, 601, 61), 600]
    assert notes[-1] == "step 600 of 600 (100%)"


# --- Noise


def test_threads_of_libraries_die_silently_and_ours_do_not(monkeypatch, capsys):
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    monkeypatch.setattr(quiet, "_BEFORE", {})
    monkeypatch.delenv(quiet.LEVEL, raising=False)
    quiet.libraries()

    theirs = {"__name__": "orbax.checkpoint.something"}
    exec("def fail():\n    raise ValueError('theirs')", theirs)

    def ours():
        raise ValueError("ours")

    for target in (theirs["fail"], ours):
        thread = threading.Thread(target=target)
        thread.start()
        thread.join()
    said = capsys.readouterr().err
    assert "ValueError: ours" in said and "theirs" not in said
    monkeypatch.setattr(quiet, "_BEFORE", {})
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)
    monkeypatch.setenv(quiet.LEVEL, "DEBUG")
    quiet.libraries()
    assert threading.excepthook is threading.__excepthook__
