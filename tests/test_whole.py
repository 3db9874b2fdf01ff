"""The old file or the new one, and nothing else in the directory."""

import errno
import os

import pytest

from saejax import whole


def test_a_file_is_replaced(tmp_path):
    for text in ("one", "zwei \N{LATIN SMALL LETTER U WITH DIAERESIS}"):
        whole.write(tmp_path / "a.txt", text)
        assert (tmp_path / "a.txt").read_text(encoding="utf-8") == text
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_one(tmp_path, monkeypatch, error):
    whole.write(tmp_path / "a.txt", "old")

    def fail(descriptor):
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(type(error)) as caught:
        whole.write(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "old" and len(list(tmp_path.iterdir())) == 1
    if isinstance(error, OSError):
        assert caught.value.filename == str(tmp_path / "a.txt")
