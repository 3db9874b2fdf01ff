"""The directory that an export fills: with all of it or nothing, and never with something else already there."""

import contextlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Collection, Iterator

from saejax.errors import UserError


@contextlib.contextmanager
def filled(path: str | os.PathLike, own: Collection[str]) -> Iterator[pathlib.Path]:
    """Yields an empty directory; what is put there moves to `path` at the end, unless something is raised.

    Args:
      path: Directory; made where missing. Links in it are replaced, not followed.
      own: What may be there from an earlier export and is then replaced: files, relative to `path`, and whole folders
        as `name/`.

    Raises:
      UserError: `path` is a file, or holds anything else.
    """
    path = pathlib.Path(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: must be a directory to write, and is a file")
    stranger = next((name for name in _files(path) if not _owned(name, own)), None)
    if stranger is not None:
        raise UserError(
            f"{path}: holds something else ({stranger}), and stays as it is; give a directory that is new, empty, or "
            "of an earlier export in this format"
        )
    new = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
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


def _files(path: pathlib.Path) -> Iterator[str]:
    """Files and links anywhere below, by their relative names."""
    below = (entry for entry in path.rglob("*") if entry.is_symlink() or not entry.is_dir())
    return (entry.relative_to(path).as_posix() for entry in below)


def _owned(name: str, own: Collection[str]) -> bool:
    return name in own or any(name.startswith(folder) for folder in own if folder.endswith("/"))
