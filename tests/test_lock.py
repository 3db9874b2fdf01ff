"""One writer for a directory, against real processes: ended, killed, stopped, forked, with and without flock."""

import errno
import fcntl
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from saejax.errors import UserError
from saejax.storage import lock

HEAD = (
    "import errno, fcntl, os, pathlib, subprocess, sys, time\nfrom saejax.storage import lock\nfolder = sys.argv[1]\n"
)
NO_FLOCK = """
def refused(*_):
    raise OSError(errno.ENOLCK, "No locks available")
fcntl.flock = refused
"""
HOLD = "held = lock.hold(folder, 'first')\nprint('held', flush=True)\n"
STAY = "time.sleep(60)\n"
LINE = (
    r"is in use by first of process \d+ on .+ since \d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ; wait for it to end or take another"
)


def start(folder: pathlib.Path, *parts: str) -> subprocess.Popen:
    """A process that runs some lines, and has printed its first."""
    process = subprocess.Popen(
        [sys.executable, "-c", HEAD + "".join(parts), str(folder)],
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    process.first = process.stdout.readline().strip()
    return process


def end(process: subprocess.Popen, signum: int = signal.SIGKILL) -> None:
    process.send_signal(signum)
    process.communicate(timeout=30)


def no_locks(*_):
    raise OSError(errno.ENOLCK, "No locks available")


@pytest.fixture(params=["flock", "claims"])
def way(request, monkeypatch):
    """The lines that a process begins with: as the file system is, or one without flock, here and there."""
    if request.param == "flock":
        return ""
    monkeypatch.setattr(fcntl, "flock", no_locks)
    return NO_FLOCK


def test_the_second_is_refused_in_one_line_at_once_and_the_next_let_in(tmp_path, way):
    first = start(tmp_path / "run", way, HOLD, STAY)
    began = time.monotonic()
    with pytest.raises(UserError, match=LINE) as said:
        lock.hold(tmp_path / "run")
    assert time.monotonic() - began < 1
    assert f"process {first.pid} on {socket.gethostname()}" in str(said.value) and "\n" not in str(said.value)
    end(first)
    lock.hold(tmp_path / "run").release()


def test_a_killed_owner_lets_in_before_it_is_buried(tmp_path, way):
    first = start(tmp_path, way, HOLD, STAY)
    first.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)  # a zombie still
    lock.hold(tmp_path).release()
    first.communicate()


def test_an_owner_that_is_just_ending_is_waited_for(tmp_path):
    """The kernel takes a killed process apart in its own time; until then its lock is there."""
    first = start(tmp_path, HOLD, "time.sleep(0.2)\n", "os._exit(0)\n")
    lock.hold(tmp_path).release()
    first.communicate()


def test_a_stopped_owner_still_owns(tmp_path, way):
    first = start(tmp_path, way, HOLD, STAY)
    first.send_signal(signal.SIGSTOP)
    with pytest.raises(UserError, match=LINE):
        lock.hold(tmp_path)
    end(first)


@pytest.mark.parametrize(
    "child",
    [
        "if os.fork() == 0: time.sleep(60)\n",
        "if os.fork() == 0:\n    held.release()\n    time.sleep(60)\n",
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], stdout=sys.stderr)\n",
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], close_fds=False)\n",
        "import multiprocessing\nmultiprocessing.get_context('fork').Process(target=time.sleep, args=(60,)).start()\n",
    ],
    ids=["fork", "fork-releases", "program", "program-keeps-descriptors", "multiprocessing"],
)
def test_a_child_neither_keeps_nor_gives_away_what_its_parent_holds(tmp_path, way, child):
    first = subprocess.Popen(
        [sys.executable, "-c", HEAD + way + HOLD + child + "print('child', flush=True)\n" + STAY, str(tmp_path)],
        stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, start_new_session=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    try:
        while "child" not in first.stdout.readline():
            pass
        time.sleep(0.2)  # the child's turn
        with pytest.raises(UserError, match=LINE):
            lock.hold(tmp_path)
        first.kill()
        first.wait()
        os.killpg(first.pid, 0)  # the child lives
        lock.hold(tmp_path).release()
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.stdout.close()


def test_another_name_for_a_directory_is_the_same_directory(tmp_path, way, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    with lock.hold(tmp_path / "run"):
        monkeypatch.chdir(tmp_path)
        for name in ("run", "./run/", "link", tmp_path / "link", "run/../run"):
            with pytest.raises(UserError, match="is in use by"):
                lock.hold(name)
    lock.hold("link").release()


def test_one_thread_may_take_it_again_where_it_says_so(tmp_path, way):
    met = []

    def other():
        try:
            lock.hold(tmp_path, again=True).release()
            met.append(None)
        except UserError as error:
            met.append(error)

    def from_another_thread():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        return met.pop()

    outer = lock.hold(tmp_path, "outer")
    with pytest.raises(UserError, match="outer of process"):
        lock.hold(tmp_path)
    with lock.hold(tmp_path, again=True), lock.hold(tmp_path / "member"):
        assert isinstance(from_another_thread(), UserError)
    assert isinstance(from_another_thread(), UserError)
    outer.release()
    assert from_another_thread() is None
    outer.release()
    with lock.hold(tmp_path):
        outer.release()  # is not this one
        assert isinstance(from_another_thread(), UserError)


@pytest.mark.parametrize("rounds", [3])
def test_of_many_that_come_together_one_wins(tmp_path, way, rounds):
    """Eight processes with the same start signal; the winner keeps it until all have said what they met."""
    race = "sys.stdin.readline()\ntry:\n    lock.hold(folder, 'race')\n    print('won', flush=True)\n"
    race += "except Exception as error:\n    print(error, flush=True)\nsys.stdin.readline()\n"
    racers = [start(tmp_path, way, "print('ready', flush=True)\n", race * rounds) for _ in range(8)]
    for _ in range(rounds):
        for racer in racers:
            racer.stdin.write("go\n")
            racer.stdin.flush()
        said = [racer.stdout.readline().strip() for racer in racers]
        assert said.count("won") == 1, said
        assert all(re.search("is in use by race of process", text) for text in said if text != "won"), said
        winner = racers[said.index("won")]
        end(winner)
        racers.remove(winner)
        for racer in racers:
            racer.stdin.write("next\n")
            racer.stdin.flush()
    for racer in racers:
        end(racer)


def test_many_threads_one_at_a_time(tmp_path, way):
    inside, most, turns = [], [], []

    def work():
        for _ in range(20):
            try:
                with lock.hold(tmp_path):
                    inside.append(1)
                    most.append(len(inside))
                    time.sleep(0.001)
                    inside.pop()
                    turns.append(1)
            except UserError:
                pass

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert turns and max(most) == 1


def test_processes_that_take_and_release_at_random_never_meet(tmp_path, way):
    """The file, and the folder that was made for it, come and go under the hands of those who open them."""
    rounds = "held = met = 0\nuntil = time.monotonic() + 3\nmarker = folder + '.inside'\n"
    rounds += "while time.monotonic() < until:\n    try:\n        taken = lock.hold(folder)\n"
    rounds += "    except Exception as error:\n        assert 'is in use by' in str(error), error\n        continue\n"
    rounds += "    os.close(os.open(marker, os.O_CREAT | os.O_EXCL))\n    time.sleep(0.002)\n    os.unlink(marker)\n"
    rounds += "    held += 1\n    taken.release()\nprint(held, flush=True)\n"
    racers = [start(tmp_path / "made", way, "print('ready', flush=True)\n", rounds) for _ in range(5)]
    said = [racer.communicate(timeout=60)[0].strip() for racer in racers]
    assert all(text.isdigit() for text in said), said
    assert sum(map(int, said)) > 20 and not list(tmp_path.glob("*/*"))


def test_it_leaves_nothing_behind_but_what_was_written(tmp_path, way):
    with lock.hold(tmp_path / "a" / "b"), lock.hold(tmp_path / "a" / "b", name=".other.lock"):
        pass
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine").mkdir()
    with lock.hold(tmp_path / "mine"), lock.hold(tmp_path / "made"):
        (tmp_path / "made" / "result").write_text("")
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["made", "made/result", "mine"]


def test_whose_folder_was_replaced_removes_nothing_of_the_new_one(tmp_path):
    first = lock.hold(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    with lock.hold(tmp_path / "run"):
        first.release()
        with pytest.raises(UserError, match="is in use by"):
            lock.hold(tmp_path / "run")


def test_a_claim_of_another_machine_is_refused_and_the_file_to_remove_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setattr(socket, "gethostname", lambda: "far-away")
    lock.hold(tmp_path, "train")
    lock._held.clear()  # that process is gone, but nobody here can know
    monkeypatch.setattr(socket, "gethostname", lambda: "here")
    with pytest.raises(UserError, match=r"train of process \d+ on far-away .*; if it is gone, remove (.+)") as said:
        lock.hold(tmp_path)
    pathlib.Path(re.search("remove (.+)$", str(said.value))[1]).unlink()
    lock.hold(tmp_path).release()


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param({"pid": 2**22 + 1}, id="no-such-process"),
        pytest.param({"started": 1}, id="number-used-again"),
        pytest.param({"boot": "another"}, id="started-anew"),
    ],
)
def test_a_claim_of_a_dead_process_of_this_machine_is_taken_over(tmp_path, monkeypatch, changed):
    monkeypatch.setattr(fcntl, "flock", no_locks)
    lock.hold(tmp_path, "train")
    lock._held.clear()
    (claim,) = tmp_path.glob(".lock.*.claim")
    said = json.loads(claim.read_text())
    machine = ["machine", changed.pop("boot", said["machine"][1]), said["machine"][2]]
    monkeypatch.setattr(lock, "_machine", lambda: ("machine", *said["machine"][1:]))
    claim.write_text(json.dumps(said | {"machine": machine} | changed))
    lock.hold(tmp_path).release()
    assert not list(tmp_path.glob(".lock.*.claim"))


@pytest.mark.parametrize("left", [b"", b"\0" * 40, b"[1]", b'{"host": 1}', b'{"host": "x"}', b"\xff\xfe", b"[" * 9000])
def test_what_lies_in_the_file_does_not_matter(tmp_path, left):
    (tmp_path / lock.NAME).write_bytes(left)
    lock.hold(tmp_path).release()
    first = start(tmp_path, HOLD, f"held._descriptor and os.pwrite(held._descriptor, {left!r}.ljust(400), 0)\n", STAY)
    with pytest.raises(UserError, match="is in use by") as said:
        lock.hold(tmp_path)
    assert str(said.value).isprintable()
    end(first)


@pytest.mark.parametrize("plant", ["link", "dangling", "hard link", "fifo", "folder"])
def test_what_is_planted_under_its_name_is_not_written(tmp_path, plant):
    mine, file = tmp_path / "mine", tmp_path / "run" / lock.NAME
    file.parent.mkdir()
    mine.write_text("precious")
    if plant == "hard link":
        os.link(mine, file)
    elif plant == "fifo":
        os.mkfifo(file)
    elif plant == "folder":
        file.mkdir()
    else:
        file.symlink_to(mine if plant == "link" else tmp_path / "nothing")
    with pytest.raises((UserError, IsADirectoryError), match=re.escape(str(file))):
        lock.hold(file.parent)
    assert mine.read_text() == "precious" and not (tmp_path / "nothing").exists()


def test_the_file_is_as_the_umask_says_and_holds_who(tmp_path):
    before = os.umask(0o027)
    try:
        with lock.hold(tmp_path, "train"):
            said = json.loads((tmp_path / lock.NAME).read_text())
            assert (tmp_path / lock.NAME).stat().st_mode & 0o777 == 0o640
            assert (said["host"], said["pid"], said["command"]) == (socket.gethostname(), os.getpid(), "train")
    finally:
        os.umask(before)


def test_what_the_file_system_says_passes_through(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        lock.hold(tmp_path / "file" / "run")
    with pytest.raises(OSError):
        lock.hold(tmp_path / "file")
    if os.path.isdir("/proc/self"):
        with pytest.raises(OSError):
            lock.hold("/proc/self/run")
