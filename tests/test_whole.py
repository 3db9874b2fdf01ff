"""The old file or the new one, and nothing else in the directory."""

import contextlib
import errno
import logging
import os
import threading

import pytest

from saejax.errors import UserError
from saejax.storage import atomic


def test_a_file_is_replaced(tmp_path):
    for text in ("one", "zwei \N{LATIN SMALL LETTER U WITH DIAERESIS}"):
        atomic.write(tmp_path / "a.txt", text)
        assert (tmp_path / "a.txt").read_text(encoding="utf-8") == text
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_one(tmp_path, monkeypatch, error):
    atomic.write(tmp_path / "a.txt", "old")

    def fail(descriptor):
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(type(error)) as caught:
        atomic.write(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "old" and len(list(tmp_path.iterdir())) == 1
    if isinstance(error, OSError):
        assert caught.value.filename == str(tmp_path / "a.txt")


def test_of_several_that_write_at_once_each_is_whole_and_none_is_left(tmp_path):
    """Threads share a process number; what one fails to write is not taken from another."""
    texts = [f"{number}" * 100_000 for number in range(6)]

    def work(text):
        for _ in range(20):
            atomic.write(tmp_path / "a.txt", text)
            with contextlib.suppress(ZeroDivisionError), atomic.opened(tmp_path / "a.txt") as file:
                file.write(b"half")
                raise ZeroDivisionError

    threads = [threading.Thread(target=work, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert not (tmp_path / "a.txt").exists() or (tmp_path / "a.txt").read_text() in texts
    assert (tmp_path / "a.txt").read_text() in texts and len(list(tmp_path.iterdir())) == 1


def test_what_a_killed_process_left_goes_and_the_work_of_others_stays(tmp_path):
    files = [atomic.partial(tmp_path / name) for name in ("run.json", "eval.json", "config.yaml", "x.run.json")]
    (tmp_path / ".run.json.partial").write_text("mine")
    atomic.remove_left(tmp_path, ("run.json", "config.yaml"))
    (tmp_path / ".run.json.partial").unlink()
    assert sorted(tmp_path.iterdir()) == sorted(path for _, path in files[1::2])
    for file, _ in files:
        file.close()


@pytest.mark.parametrize("links", [True, False])
def test_the_first_wins_where_it_is_to_stay(tmp_path, monkeypatch, links):
    def refuse(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    if not links:  # exFAT, some FUSE
        monkeypatch.setattr(os, "link", refuse)
    for text in ("first", "second"):
        atomic.write(tmp_path / "a.json", text, keep_existing=True)
    assert (tmp_path / "a.json").read_text() == "first" and len(list(tmp_path.iterdir())) == 1


def test_a_long_name_has_room_for_its_partial_file(tmp_path):
    for name in ("a" * 255, "\N{CJK UNIFIED IDEOGRAPH-884C}" * 85):
        atomic.write(tmp_path / name, b"\0\xff")
        assert (tmp_path / name).read_bytes() == b"\0\xff"


@pytest.mark.parametrize("plant", ["fifo", "folder"])
def test_what_is_no_file_is_not_appended_to(tmp_path, plant):
    os.mkfifo(tmp_path / "a") if plant == "fifo" else (tmp_path / "a").mkdir()
    with pytest.raises((UserError, IsADirectoryError), match="a"):
        atomic.appended(tmp_path / "a")


def test_a_log_says_once_that_it_cannot_be_written(tmp_path, capsys):
    """Not a traceback for every line."""
    full = "/dev/full"
    if not os.path.exists(full):
        pytest.skip("no /dev/full on this system")
    handler = atomic.LogFile(tmp_path / "train.log")
    handler.stream = open(full, "w")
    for number in range(5):
        handler.emit(logging.makeLogRecord({"msg": f"line {number} " + "\N{LATIN SMALL LETTER U WITH DIAERESIS}"}))
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "train.log is not written: [Errno 28] No space left" in said
    with contextlib.suppress(OSError):
        handler.stream.close()


def test_a_log_is_not_there_before_there_is_something_to_say(tmp_path):
    handler = atomic.LogFile(tmp_path / "train.log")
    handler.close()
    assert not list(tmp_path.iterdir())
    handler = atomic.LogFile(tmp_path / "train.log")
    for message in ("one", "lone \udc80 surrogate"):
        handler.emit(logging.makeLogRecord({"msg": message}))
    handler.close()
    assert (tmp_path / "train.log").read_bytes() == b"one\nlone \\udc80 surrogate\n"
