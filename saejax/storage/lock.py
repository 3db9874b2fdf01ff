"""Directory lock: one writer at a time. The lock dies with its owner, and the second writer learns who holds it.

The lock is `flock` on the open file `.lock` of the directory. The kernel releases it when its owner ends for any
reason, so a restart after `kill -9` works at once; a stopped owner (SIGSTOP) keeps it. The owner removes the file when
it ends. Whoever locks a file checks that it still has that name, so two writers never hold two locks. Programs that
the owner starts do not keep the lock (close-on-exec). Forked Python children do not either: they close their copy.

Some network mounts know no `flock`. There each writer puts a claim, a file with a name of its own, and owns the
directory if it then sees no other claim. It removes a claim of a dead process of this machine. It cannot judge a claim
of another machine, so it refuses and names the file to remove.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
import fcntl
import json
import os
import random
import socket
import stat
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from saejax.errors import UserError

NAME = ".lock"
"""The file of a directory that is locked."""
_NO_FLOCK = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS)
_ATTEMPTS = 20
_ENDING_SECONDS = 0.5  # a killed owner keeps its lock until the kernel has taken it apart: a moment, longer under load
_LOOK_SECONDS = 0.5  # how long a second taker waits for the first to have written who it is
_held: list[Lock] = []  # of this process
_made: set[Path] = set()  # folders that were made to be held, and go where nothing comes into them
_mutex = threading.RLock()  # around what a fork must not see half done


class Lock:
    """A directory that is held by this process until `release`, or until the process ends. A context manager."""

    def __init__(self, key: tuple[int, int, str], file: Path, descriptor: int | None) -> None:
        self._key, self._file, self._descriptor = key, file, descriptor
        self._thread, self._times = threading.get_ident(), 1

    def release(self) -> None:
        """Lets others in; held twice by one thread, it takes two. Once released, or in a forked child: nothing."""
        with _mutex:
            if self not in _held:
                return
            self._times -= 1
            if self._times:
                return
            _held.remove(self)
            if self._descriptor is None or _is_named(self._descriptor, self._file):
                with contextlib.suppress(OSError):  # a directory that may not be written any more
                    self._file.unlink()
            for made in (self._file.parent, *self._file.parent.parents):
                if made not in _made:
                    break
                with contextlib.suppress(OSError):  # in use
                    made.rmdir()
                    _made.discard(made)
            if self._descriptor is not None:
                with contextlib.suppress(OSError):  # also for a child that some library forked and that lives on
                    fcntl.flock(self._descriptor, fcntl.LOCK_UN)
                os.close(self._descriptor)

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


@dataclasses.dataclass(frozen=True)
class Owner:
    """Owner of a directory, as the lock file names it.

    Attributes:
      host: name of the machine.
      pid: number of the process.
      since: when it took the lock, UTC, ISO 8601.
      command: what it does there.
      started: when the process started, in ticks of this boot; None where the system does not say.
      machine: identity of the machine, boot and process namespace, so that a pid means something.
    """

    host: str
    pid: int
    since: str
    command: str
    started: int | None = None
    machine: tuple[str, str, str] = ("", "", "")

    def __str__(self) -> str:
        return f"{self.command} of process {self.pid} on {self.host} since {self.since}"

    def is_gone(self) -> bool:
        """Whether the process is known to have ended; False where that cannot be known from here."""
        machine, boot, namespace = _machine()
        if self.host != socket.gethostname() or self.machine[0] != machine:
            return False
        if self.machine[1] != boot:
            return bool(machine)  # the same machine, started anew
        if self.machine[2] != namespace:
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:
            pass  # it is another user's
        return _started(self.pid) not in (self.started, None)


def hold(folder: str | os.PathLike[str], what: str = "run", *, again: bool = False, name: str = NAME) -> Lock:
    """Takes a directory for this process alone; waits half a second for an owner that is just ending, not longer.

    Args:
      folder: made if missing, and removed again by who made it if nothing is in it at the end. A link or a relative
        path to it is the same directory.
      what: what is done there, for the line that others get.
      again: whether a thread that holds it already may take it once more, as one call inside another does.
      name: the file that is locked, of those that a directory may have.

    Returns:
      The lock; hold it while anything is written there.

    Raises:
      UserError: another holds it; names its work, process, host and since when.
      OSError: the directory cannot be made or written.
    """
    folder, me = Path(folder).absolute(), _me(what)
    for attempt in range(_ATTEMPTS):
        try:
            key = _made_key(folder, name)
            with _mutex:
                for lock in _held:
                    if again and lock._key == key and lock._thread == threading.get_ident():
                        lock._times += 1
                        return lock
            return _flocked(folder / name, key, me) or _claimed(folder, key, me)
        except OSError as error:  # the owner before removes its file, and the folder if it was for nothing
            if error.errno not in (errno.ENOENT, errno.EEXIST, errno.ESTALE) or attempt == _ATTEMPTS - 1:
                raise
    raise AssertionError


def _made_key(folder: Path, name: str) -> tuple[int, int, str]:
    """Makes a missing folder; returns its identity, which is the same for all its names."""
    missing = [part for part in (folder, *folder.parents) if not part.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    _made.update(missing)
    at = folder.stat()
    return at.st_dev, at.st_ino, name


def _taken(folder: Path, owner: Owner | None, more: str = "") -> UserError:
    who = owner or "another process"
    return UserError(f"{folder} is in use by {who}; wait for it to end or take another directory{more}")


def _flocked(file: Path, key: tuple[int, int, str], me: Owner) -> Lock | None:
    """The lock by `flock`; None where there is no such thing."""
    until = time.monotonic() + _ENDING_SECONDS
    while True:
        try:
            return _flocked_now(file, key, me)
        except BlockingIOError:
            if time.monotonic() > until:
                raise _taken(file.parent, _owner(file)) from None
        time.sleep(0.02)


def _flocked_now(file: Path, key: tuple[int, int, str], me: Owner) -> Lock | None:
    """As `_flocked`; BlockingIOError where another has it now."""
    with _mutex:
        descriptor, lock = _opened(file), None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, _text(me), 0)
            if not _is_named(descriptor, file):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(file))
            lock = Lock(key, file, descriptor)
            _held.append(lock)
            return lock
        except BlockingIOError:
            raise
        except OSError as error:
            if error.errno in _NO_FLOCK:
                if not os.fstat(descriptor).st_size:
                    file.unlink(missing_ok=True)
                return None
            error.filename = str(file)
            raise
        finally:
            if lock is None:
                os.close(descriptor)


def _is_named(descriptor: int, file: Path) -> bool:
    """Whether an open file is the one of that name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(file))
    except OSError:
        return False


def _opened(file: Path) -> int:
    """Opens saejax's own file to lock; never writes through a file or link that others planted."""
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise UserError(f"{file} is a link, not a lock of saejax; remove it") from None
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(descriptor)
        raise UserError(f"{file} is not a plain file or has other names (hard links); remove it")
    return descriptor


def _claimed(folder: Path, key: tuple[int, int, str], me: Owner) -> Lock:
    """The lock by a claim.

    Claim first, look afterwards: of two, at least one sees the other. Two that see each other both step back and
    try again after different times.
    """
    other, where = None, folder
    for attempt in range(5):
        with _mutex:
            claim = folder / f"{key[2]}.{uuid.uuid4().hex}.claim"
            partial = claim.with_suffix(".tmp")
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
            try:
                os.write(descriptor, _text(me))
            finally:
                os.close(descriptor)
            partial.rename(claim)
            others = [(owner, file) for owner, file in _claims(folder, key[2]) if file.name != claim.name]
            if not others:
                lock = Lock(key, claim, None)
                _held.append(lock)
                return lock
            claim.unlink()
        other, where = others[0]
        time.sleep(random.uniform(0.01, 0.03) * 2**attempt)
    known = other is not None and (other.host, other.machine) == (me.host, me.machine)
    gone = "" if known else f"; if it is gone, remove {where}"
    raise _taken(folder, other, gone)


def _claims(folder: Path, name: str) -> Iterator[tuple[Owner | None, Path]]:
    """The claims on a directory of owners that may live; those of dead ones are removed."""
    for file in sorted(folder.glob(f"{name}.*.claim")):
        owner = _read(file)
        if owner is not None and owner.is_gone():
            with contextlib.suppress(OSError):
                file.unlink()
        elif file.exists():
            yield owner, file


def _owner(file: Path) -> Owner | None:
    """Owner of a locked file. A new holder may be about to write it, so a dead one's entry is not believed at once."""
    until = time.monotonic() + _LOOK_SECONDS
    while True:
        owner = _read(file)
        if owner is not None and not owner.is_gone():
            return owner
        if time.monotonic() > until:
            return None
        time.sleep(0.02)


def _read(file: Path) -> Owner | None:
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            said: dict[str, Any] = json.loads(os.read(descriptor, 4096))
        finally:
            os.close(descriptor)
        owner = Owner(**{**said, "machine": tuple(said["machine"])})
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    texts = (owner.host, owner.since, owner.command, *owner.machine)
    sound = all(isinstance(text, str) and text.isprintable() for text in texts) and len(owner.machine) == 3
    sound = sound and type(owner.pid) is int and 0 < owner.pid < 2**31 and type(owner.started) in (int, type(None))
    return owner if sound else None


def _text(owner: Owner) -> bytes:
    return (json.dumps(dataclasses.asdict(owner)) + "\n").encode()


def _me(what: str) -> Owner:
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    pid = os.getpid()
    return Owner(socket.gethostname(), pid, now, what, _started(pid), _machine())


def _started(pid: int) -> int | None:
    """Start time of a process, in ticks; -1 if it has ended and only waits for its parent, None if unknown."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return -1 if fields[0] in (b"Z", b"X") else int(fields[19])
    except (OSError, IndexError, ValueError):
        return None


def _machine() -> tuple[str, str, str]:
    """Identity of this machine, of its boot, and of the namespace in which process numbers are counted."""

    def said(read: Any) -> str:
        with contextlib.suppress(OSError, ValueError):
            return read().strip()
        return ""

    return (
        said(Path("/etc/machine-id").read_text),
        said(Path("/proc/sys/kernel/random/boot_id").read_text),
        said(lambda: os.readlink("/proc/self/ns/pid")),
    )


def _forget() -> None:
    """Runs in a forked child: closes the parent's locks, which must not outlive the parent."""
    for lock in _held:
        if lock._descriptor is not None:
            with contextlib.suppress(OSError):
                os.close(lock._descriptor)  # without LOCK_UN, which would release the parent's
    _held.clear()
    _mutex.release()


os.register_at_fork(before=_mutex.acquire, after_in_parent=_mutex.release, after_in_child=_forget)
