"""Who may write a store beside whom, and whose unfinished files are whose: real processes, with and without flock."""

import errno
import fcntl
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

import pytest
import test_harvest
import test_store

from saejax.activations import store
from saejax.activations.language_model import harvest
from saejax.activations.store import files as store_format
from saejax.activations.store import writer as store_writer
from saejax.errors import UserError

WRITER = """
import errno, fcntl, os, sys
sys.path.insert(0, sys.argv[1])
import test_store as t
from saejax.activations import store
path, process, n_processes, way = sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
def refused(*_):
    raise OSError(errno.ENOLCK, "No locks available")
if way == "claims":
    fcntl.flock = refused
writer = store.Writer(path, t._facts(), process=process, n_processes=n_processes)
number = writer.missing()[0]
sequences = t._sequences()[number * t.SHARD_SEQUENCES : (number + 1) * t.SHARD_SEQUENCES]
with writer.shard(number) as shard:
    first = number * t.SHARD_SEQUENCES
    for place, sequence in enumerate(sequences):
        shard.append(**t._content(first + place, sequence))
        if place == 0:
            print("writing", flush=True)
            sys.stdin.readline()
writer.close()
print("closed", flush=True)
sys.stdin.readline()
"""


@pytest.fixture(params=["flock", "claims"])
def way(request, monkeypatch):
    if request.param == "claims":

        def refused(*_):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "flock", refused)
    return request.param


@pytest.fixture
def begin(way):
    """Starts a writer, which stops in the middle of its first shard; `None` where it was refused."""
    begun = []

    def start(path: pathlib.Path, process: int, n_processes: int) -> subprocess.Popen:
        words = [str(pathlib.Path(__file__).parent), str(path), str(process), str(n_processes), way]
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, *words], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip
        begun.append(writer)
        assert writer.stdout.readline().strip() == "writing"
        return writer

    yield start
    for writer in begun:
        writer.kill()
        writer.communicate()


def unfinished(path: pathlib.Path) -> set[str]:
    return {file.name for file in path.iterdir() if "partial" in file.name}


def test_a_store_is_shared_by_writers_of_one_layout_and_nobody_else(begin, tmp_path):
    first = begin(tmp_path, 0, 2)
    other_layouts = [(process, n) for n in (1, 3, 4) for process in range(n)]
    for process, n_processes in [(0, 2), *other_layouts]:
        with pytest.raises(UserError) as said:
            store.Writer(tmp_path, test_store._facts(), process=process, n_processes=n_processes)
        line = f"{tmp_path} is in use by harvest (writer 0 of 2) of process {first.pid} on {socket.gethostname()} since"
        assert str(said.value).startswith(line) and "\n" not in str(said.value)
    store.Writer(tmp_path, test_store._facts(), process=1, n_processes=2).close()
    first.kill()  # -9
    first.wait()
    for process, n_processes in [(0, 2), (1, 2), *other_layouts]:
        store.Writer(tmp_path, test_store._facts(), process=process, n_processes=n_processes).close()


def test_the_unfinished_files_of_a_living_writer_stay_and_those_of_a_dead_one_go(begin, tmp_path):
    first = begin(tmp_path / "a", 0, 2)
    files = unfinished(tmp_path / "a")
    assert len(files) == 3
    with pytest.raises(UserError):
        store.Writer(tmp_path / "a", test_store._facts())
    assert test_store._write(tmp_path / "a", process=1, n_processes=2) == [1, 3]
    assert unfinished(tmp_path / "a") == files
    first.stdin.write("go on\n")
    first.stdin.flush()
    assert first.stdout.readline().strip() == "closed" and store_format.published(tmp_path / "a") == [0, 1, 3]
    assert not unfinished(tmp_path / "a")

    dead = begin(tmp_path / "a", 0, 2)
    dead.send_signal(signal.SIGKILL)
    dead.wait()
    for left in ("shard-00002.rows.partial", "shard-00002.json.partial-17", "manifest.json.partial-17"):  # of 0.1
        (tmp_path / "a" / left).write_text("")
    (tmp_path / "a" / "notes.partial.txt").write_text("mine")
    assert len(unfinished(tmp_path / "a")) == 7
    assert test_store._write(tmp_path / "a") == [2]
    assert unfinished(tmp_path / "a") == {"notes.partial.txt"}
    test_store._write(tmp_path / "straight")
    (tmp_path / "a" / "notes.partial.txt").unlink()
    assert test_store._bytes(tmp_path / "a") == test_store._bytes(tmp_path / "straight")


def test_a_store_that_0_1_is_writing_is_left_alone(tmp_path):
    with (tmp_path / ".writer-3.lock").open("wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for process, n_processes in ((0, 1), (1, 2)):
            with pytest.raises(UserError, match="is in use by another process"):
                store.Writer(tmp_path, test_store._facts(), process=process, n_processes=n_processes)
    store.Writer(tmp_path, test_store._facts()).close()


def test_admitted_twice_in_one_call_and_no_further(way, tmp_path):
    """A harvest is admitted before it loads the model; its writers are it once more."""
    with store_writer.admitted(tmp_path):
        store.Writer(tmp_path, test_store._facts()).close()
        with pytest.raises(UserError, match="is in use by harvest"):
            store_writer.admitted(tmp_path, process=1, n_processes=2)
    with store_writer.admitted(tmp_path, process=1, n_processes=2):
        pass


def test_a_harvest_that_cannot_begin_leaves_nothing(way, tmp_path):
    config, model = test_harvest._config(tmp_path), test_harvest.TinyModel()
    model.tokenizer = None
    with pytest.raises(UserError, match="has no tokenizer"):
        test_harvest.harvest(config, model)
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_a_second_harvest_is_refused_before_it_loads_a_model(way, tmp_path, monkeypatch):
    monkeypatch.setattr(harvest, "load", None)
    config = test_harvest._config(tmp_path)
    with store_writer.admitted(tmp_path / "out" / "heldout", n_processes=2):
        with pytest.raises(UserError, match=r"out/heldout is in use by harvest \(writer 0 of 2\) of process"):
            harvest.harvest(config)
    with pytest.raises(TypeError):  # it would load one now
        harvest.harvest(config)


def test_another_configuration_beside_a_writer_is_refused_before_the_first_shard(begin, tmp_path):
    begin(tmp_path, 0, 2)
    begun = json.loads((tmp_path / store_format.MANIFEST).read_text())
    with pytest.raises(UserError, match="dtype is 'bfloat16', but .* was begun with 'float32'"):
        store.Writer(tmp_path, test_store._facts(dtype="bfloat16"), process=1, n_processes=2)
    assert json.loads((tmp_path / store_format.MANIFEST).read_text()) == begun
