"""Atomic file writes: a file is there whole or not at all. Also checks what may be written or read.

saejax writes every file with a predictable name through this module. It never writes through a link: a partial file
gets a new, unpredictable name, a finished one replaces whatever has its name, and a log is not appended to a link.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from saejax.errors import UserError

logger = logging.getLogger(__name__)

PARTIAL = ".partial"
"""Ends the name of a file that is being written, `.NAME.RANDOM.partial`."""
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)
_NO_SYNC = (errno.EINVAL, errno.EACCES, errno.EPERM, errno.EBADF, errno.ENOTSUP, errno.EOPNOTSUPP)


def write(path: str | os.PathLike[str], content: str | bytes, *, keep_existing: bool = False) -> None:
    """Replaces a file at once; on a full disk, or when the process is killed, the old one stays.

    Args:
      path: its directory must be there.
      content: text is written as UTF-8; synced.
      keep_existing: whether a file that is there stays; of several processes the first wins.

    Raises:
      OSError: it cannot be written; `filename` is `path`, and nothing of the attempt is left.
    """
    with opened(path, keep_existing=keep_existing) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def opened(path: str | os.PathLike[str], *, keep_existing: bool = False) -> Iterator[BinaryIO]:
    """Like `write`, but in parts: a file to fill, published when the block succeeds.

    Examples:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     with opened(Path(folder) / "a") as file:
      ...         _ = file.write(b"one")
      ...     (Path(folder) / "a").read_bytes()
      b'one'
    """
    path = Path(path)
    unfinished = None
    try:
        file, unfinished = partial(path)
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        publish(unfinished, path, keep_existing=keep_existing)
        sync_directory(path.parent)
    except BaseException as error:
        if unfinished is not None:
            with contextlib.suppress(OSError):  # on a disk that may not be written
                unfinished.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)
        raise


def partial(path: Path) -> tuple[BinaryIO, Path]:
    """A new, empty file beside `path` to be renamed to it, and its name; the umask sets the permissions."""
    unfinished = path.with_name(f".{path.name[:48]}.{secrets.token_hex(8)}{PARTIAL}")
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.fdopen(os.open(unfinished, flags, 0o666), "w+b"), unfinished


def remove_left(folder: Path, names: Collection[str]) -> None:
    """Removes partial files that killed processes left.

    Args:
      folder: held by this process (`saejax.storage.lock`).
      names: files that are written only by who holds it; others may be at work on the rest.
    """
    for file in folder.glob(f".*{PARTIAL}"):
        found = re.fullmatch(rf"\.(.+)\.[0-9a-f]{{16}}{re.escape(PARTIAL)}", file.name)
        if found and found[1] in names:
            with contextlib.suppress(OSError):
                file.unlink()


def publish(unfinished: Path, path: Path, *, keep_existing: bool = False) -> None:
    """Gives a finished file its name; a link or file of that name is replaced, or stays with `keep_existing`."""
    if not keep_existing:
        unfinished.replace(path)
        return
    try:
        os.link(unfinished, path)
    except FileExistsError:
        pass
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if not os.path.lexists(path):  # a file system without hard links; two at once need a lock there
            unfinished.replace(path)
            return
    unfinished.unlink()


def sync_directory(path: Path) -> None:
    """Makes renames in a directory durable, where its file system can."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


def appended(path: str | os.PathLike[str]) -> io.FileIO:
    """A file to append to, made if missing, unbuffered; never through a link.

    Raises:
      UserError: it is a link, or no plain file.
      OSError: it cannot be opened.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO):
            raise
        raise UserError(f"{path} is a link or a pipe, and is not written through; remove it") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"{path} is not a plain file; remove it")
    return io.FileIO(descriptor, "ab")


class LogFile(logging.FileHandler):
    """A log that is appended to, never through a link, and opened only when there is something to say.

    Reports a failed write once on the terminal: a full disk must not end the logged work.
    """

    def __init__(self, filename: str | os.PathLike[str], *_: Any, **__: Any) -> None:
        super().__init__(filename, encoding="utf-8", delay=True)
        self._failed = False

    def _open(self) -> Any:
        return io.TextIOWrapper(io.BufferedWriter(appended(self.baseFilename)), "utf-8", "backslashreplace")

    def handleError(self, record: logging.LogRecord) -> None:
        """Says the first failure in one line."""
        error, before, self._failed = sys.exc_info()[1], self._failed, True
        if not before and sys.stderr is not None:
            print(f"{self.baseFilename} is not written: {error}", file=sys.stderr)


def check_writable(folder: Path) -> None:
    """Raises the file system's error for a new file in a folder; leaves no file there.

    Raises:
      OSError: it is not writable, or not there.
    """
    with _named(folder):
        tempfile.TemporaryFile(dir=folder).close()


def check_place(path: Path, *, file: bool = False) -> None:
    """Raises the file system's error for a new folder or file, before the work that would fill it.

    Args:
      path: need not be there, nor the folders above it; nothing is made.
      file: whether it will be a file.

    Raises:
      OSError: it cannot be made, or be written to.
    """
    if file and path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    folder = path.parent if file else path
    while not os.path.lexists(folder):
        folder = folder.parent
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    check_writable(folder)


def try_write(folder: Path, n_bytes: int = 2**20) -> None:
    """Writes and syncs a file of the expected size, or a first part of it, and removes it.

    Args:
      folder: made where missing.
      n_bytes: of the largest file to come; its first MiB is written, its length is tried as well.

    Raises:
      OSError: what the file system says to that: read-only, full, a quota, a limit on the size of files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _named(folder), tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(min(n_bytes, 2**20)))
        file.flush()
        os.fsync(file.fileno())
        file.truncate(n_bytes)


def check_room(folder: Path, n_bytes: int) -> None:
    """Refuses a folder on a disk that has no room for one checkpoint; warns where a second one would find none.

    Args:
      folder: of the run.
      n_bytes: of a checkpoint.

    Raises:
      UserError: says what is needed and what there is.
      OSError: see `try_write`.
    """
    try_write(folder, min(n_bytes, _LARGEST_FILE))
    free = shutil.disk_usage(folder).free
    said = f"a checkpoint takes {n_bytes / 2**30:.3g} GiB, and {folder} has room for {free / 2**30:.3g} GiB"
    if free < n_bytes:
        raise UserError(f"{said}: make room, or take another run directory")
    if free < 2 * n_bytes:
        logger.warning("%s: the one before stays until the next is written, which takes both", said)


_LARGEST_FILE = 2**30
"""Bytes of a file of a checkpoint at most, about; larger arrays are cut."""


@contextlib.contextmanager
def _named(folder: Path) -> Iterator[None]:
    """An error of the file system names the folder, not a temporary file in it."""
    try:
        yield
    except OSError as error:
        error.filename = str(folder)
        raise


def check_file(path: Path) -> None:
    """Refuses a name that is not a plain file: reading a pipe would wait for ever.

    Raises:
      UserError: a pipe, a socket or a device.
      OSError: a directory.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a plain file; remove it")


def check_readable(path: Path) -> None:
    """Refuses a folder of which this user may not read a part, which is no damage.

    Raises:
      UserError: names the part.
    """
    for part in (path, *path.rglob("*")):
        if not os.access(part, os.R_OK):
            raise UserError(f"{part}: Permission denied")
