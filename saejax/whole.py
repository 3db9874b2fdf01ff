"""A text file that is there whole or not at all, whatever happens while it is written; what may be written or read."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from saejax.errors import UserError


def write(path: str | os.PathLike[str], text: str) -> None:
    """Replaces a file at once; on a full disk, or when the process is killed, the old one stays.

    Args:
      path: its directory must be there.
      text: written as UTF-8 and synced.

    Raises:
      OSError: it cannot be written; `filename` is `path`, and nothing of the attempt is left.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):  # on a disk that may not be written
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)
        raise


def check_writable(folder: Path) -> None:
    """Raises what the file system says to a new file in a folder; none is seen there.

    Raises:
      OSError: it is not writable, or not there.
    """
    tempfile.TemporaryFile(dir=folder).close()


def check_readable(path: Path) -> None:
    """Refuses a folder of which this user may not read a part, which is no damage.

    Raises:
      UserError: names the part.
    """
    for part in (path, *path.rglob("*")):
        if not os.access(part, os.R_OK):
            raise UserError(f"{part}: Permission denied")
