"""Export directory: filled completely or not at all, and never mixed with other files."""

import contextlib
import fcntl
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator

from saejax.errors import UserError
from saejax.fields import paths


@contextlib.contextmanager
def filled(path: str | os.PathLike, own: Collection[str]) -> Iterator[pathlib.Path]:
    """Yields an empty directory; its content moves to `path` at the end, unless an error is raised.

    Args:
      path: Directory; made where missing. Links in it are replaced, not followed.
      own: What may be there from an earlier export and is then replaced: files, relative to `path`, and whole folders
        as `name/`.

    Raises:
      UserError: `path` is a file, holds anything else, or another export fills it now.
    """
    path = paths.local(path, "path")
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: must be a directory to write, and is a file")
    _refuse_strangers(path, own)
    new = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    with _alone(path):
        _refuse_strangers(path, own)  # which may have come from another export just now
        for left in path.iterdir():  # by an export that was killed
            if _PART.fullmatch(left.name):
                shutil.rmtree(left, ignore_errors=True)
        yield from _moved(path, new)


def _moved(path: pathlib.Path, new: bool) -> Iterator[pathlib.Path]:
    """Yields a new folder, private to this user and with an unpredictable name; moves its content at the end."""
    part = pathlib.Path(tempfile.mkdtemp(prefix=".part-", dir=path))
    try:
        yield part
        for name in list(_files(part)):
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(part / name, path / name)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        if new:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise
    shutil.rmtree(part, ignore_errors=True)


_PART = re.compile(r"\.part-[a-z0-9_]{8}")


def _refuse_strangers(path: pathlib.Path, own: Collection[str]) -> None:
    for name in _files(path):
        if not _owned(name, own) and not _PART.fullmatch(name.split("/")[0]):
            raise UserError(
                f"{path}: holds something else ({name}), and stays as it is; give a directory that is new, empty, or "
                "of an earlier export in this format"
            )


@contextlib.contextmanager
def _alone(path: pathlib.Path) -> Iterator[None]:
    """One export at a time. The folder itself is locked: a file for it would become a part of the export."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{path}: another export fills it; wait for that one, or give another directory") from None
        except OSError:
            pass  # a network mount that locks no folders
        yield
    finally:
        os.close(descriptor)


def _files(path: pathlib.Path) -> Iterator[str]:
    """Files and links anywhere below, by their relative names."""
    below = (entry for entry in path.rglob("*") if entry.is_symlink() or not entry.is_dir())
    return (entry.relative_to(path).as_posix() for entry in below)


def _owned(name: str, own: Collection[str]) -> bool:
    return name in own or any(name.startswith(folder) for folder in own if folder.endswith("/"))
