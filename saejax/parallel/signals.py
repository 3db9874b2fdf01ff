"""Signal handling (Ctrl-C, SIGTERM, SIGUSR1, SIGUSR2) from the first line of a command to its last.

The first signal is recorded and raises `errors.Stopped` in the main thread, as Ctrl-C does in Python. Within `hold` it
is only recorded, because that work stops in its own way. A recorded signal is never lost. If the exception falls into
a callback that cannot raise (JAX hooks the garbage collector and compiles for minutes), or into the loading of a
compiled module, it is raised a moment later. `check` also raises it at the next boundary between two pieces of work. A
second signal acts at once: the command ends, even while the main thread is inside a library. Inside another program it
keeps its earlier meaning.

In a run of several joined processes one of them may be the only one to get a signal, and all must stop at the same
place. There saejax never raises it: it passes the signal on, and `check` asks whether all stop here (`share`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.machinery
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from saejax.errors import Stopped, stopped_status

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""What stops work: a person, a scheduler, a scheduler ahead of a time limit, submitit ahead of one."""

SAME_SECONDS = 0.5
"""Signals so close to the first are that one again: `timeout` and `srun` send each to a process and to its group."""

_AGAIN_SECONDS = 0.05
"""When an exception that was lost in a callback is raised again."""

_LOADS = importlib.machinery.ExtensionFileLoader.exec_module.__code__.co_filename
"""Where Python has the frames in which it loads modules."""

_SILENT_SECONDS = 2.0
"""How long a signal may find the main thread out of Python before a line says that it was noted."""


@dataclasses.dataclass
class _Watch:
    """State of a command's signals; only one exists at a time."""

    before: dict[int, Any]
    """Handlers that were there."""
    ends_process: bool
    """Default action of a second signal without another handler."""
    noted: int | None = None
    noted_at: float = 0.0
    holds: int = 0
    """How many `hold` are open."""
    again: bool = False
    """Whether the handler is called because its exception was lost."""
    echoes: int = 0
    """Signals that the listening thread hears for the same reason."""


_watch: _Watch | None = None
_shared: Callable[[], int | None] | None = None


@contextlib.contextmanager
def watch(*, ends_process: bool = False) -> Iterator[None]:
    """Signals stop the work inside; nothing new within another `watch`, or outside of the main thread.

    Args:
      ends_process: a second signal ends this process, which is no more than a command.
    """
    global _watch
    if _watch is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    now = _Watch({number: signal.getsignal(number) for number in _ours()}, ends_process)
    raised_elsewhere = sys.unraisablehook
    sys.unraisablehook = lambda lost: _lost(now) if isinstance(lost.exc_value, Stopped) else raised_elsewhere(lost)
    _watch = now
    with _listening(now):
        for number in now.before:
            signal.signal(number, _note)
        try:
            yield
        finally:
            _give_back(now)
            _watch, sys.unraisablehook = None, raised_elsewhere


@contextlib.contextmanager
def hold() -> Iterator[None]:
    """Signals are only noted inside: `noted` tells, and the work inside stops by itself where it is safe."""
    with watch():
        now = _watch if threading.current_thread() is threading.main_thread() else None
        if now is not None:
            now.holds += 1
        try:
            yield
        finally:
            if now is not None:
                now.holds -= 1


def noted() -> int | None:
    """The first signal since the outermost `watch` began, None while none came."""
    return None if _watch is None else _watch.noted


def check() -> None:
    """A boundary between two pieces of work: stop here if a signal asked for it. Does nothing within `hold`.

    All processes of a run that have joined call it alike.

    Raises:
      Stopped: a signal came, to this process or to another one of the run.
    """
    if _watch is not None and _watch.holds:
        return
    signum = noted() if _shared is None else _shared()
    if signum is not None:
        raise Stopped(signum)


def share(asks: Callable[[], int | None] | None) -> None:
    """Makes signals a matter of several processes from now on.

    Args:
      asks: says which signal stops all of them here, None where they go on; all call it alike. None ends it.
    """
    global _shared
    _shared = asks
    if asks is None and _watch is not None and threading.current_thread() is threading.main_thread():
        for number in _watch.before:  # those that were others' meanwhile
            signal.signal(number, _note)


def outer(signum: int) -> Any:
    """The handler that this process had for a signal before it was watched, as from `signal.getsignal`."""
    return signal.getsignal(signum) if _watch is None else _watch.before.get(signum)


def pass_on(signum: int) -> None:
    """Pass a signal that stopped work to a waiting launcher, now that all is safe, so that it can queue the run again.

    Args:
      signum: its number; what is none is passed on to nobody.
    """
    handler = outer(signum) if signum in SIGNALS else None
    if handler is not None and _of_others(handler):
        handler(signum, None)


def name(signum: int) -> str:
    """Name of a signal.

    >>> name(2), name(15)
    ('SIGINT', 'SIGTERM')
    """
    return signal.Signals(signum).name


def _ours() -> list[int]:
    """The signals that are handled here: of several processes JAX's preemption service takes SIGTERM."""
    return [number for number in SIGNALS if _shared is None or number != signal.SIGTERM]


def _note(signum: int, frame: FrameType | None) -> None:
    now = _watch
    if now is None:
        return
    if now.noted is None:
        now.noted, now.noted_at = signum, time.monotonic()
        if _shared is not None:
            os.kill(os.getpid(), signal.SIGTERM)  # to JAX, which tells the others
            return
    elif now.again:
        now.again, signum = False, now.noted
    elif time.monotonic() - now.noted_at < SAME_SECONDS:
        return
    else:
        _second(now, signum)
        return
    if not now.holds:
        if _within_extension(frame):
            _lost(now)
            return
        raise Stopped(signum)


def _within_extension(frame: FrameType | None) -> bool:
    """Whether a compiled module is being loaded, which makes an ImportError or a crash of what is raised in it."""
    while frame is not None:
        code = frame.f_code
        if code.co_filename == _LOADS and code.co_name in ("create_module", "exec_module"):
            if isinstance(frame.f_locals.get("self"), importlib.machinery.ExtensionFileLoader):
                return True
        frame = frame.f_back
    return False


def _second(now: _Watch, signum: int) -> None:
    """Ends a command; where somebody else has a handler, say a launcher, or this is no command, that one acts."""
    if now.ends_process and not _of_others(now.before.get(signum)):
        _leave(signum)
    _give_back(now)
    signal.raise_signal(signum)


def _give_back(now: _Watch) -> None:
    for number in set(now.before) & set(_ours()):
        # None stands for a handler that was not set from Python and cannot be set again by it.
        signal.signal(number, signal.SIG_DFL if now.before[number] is None else now.before[number])


def _of_others(handler: Any) -> bool:
    return callable(handler) and handler is not signal.default_int_handler


def _leave(signum: int) -> None:
    """End this process at once, as SIGKILL would, but with a status and a line."""
    os.write(2, f"\nsaejax: a second signal ({name(signum)}): ended at once; what was finished is kept\n".encode())
    os._exit(stopped_status(signum))


def _lost(now: _Watch) -> None:
    """The exception of a signal fell into a callback: soon, somewhere else, again."""

    def again() -> None:
        if _watch is now and now.noted is not None:
            now.again, now.echoes = True, now.echoes + 1
            signal.pthread_kill(threading.main_thread().ident or 0, now.noted)  # wakes it, too, where it waits

    timer = threading.Timer(_AGAIN_SECONDS, again)
    timer.daemon = True
    timer.start()


@contextlib.contextmanager
def _listening(now: _Watch) -> Iterator[None]:
    """A thread that hears of every signal at once, while the main thread may be where no handler of Python runs."""
    heard, told = os.pipe()
    os.set_blocking(told, False)
    before = signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    thread = threading.Thread(target=_listen, args=(now, heard), daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(told)  # which ends the thread


def _listen(now: _Watch, heard: int) -> None:
    first: float | None = None
    with open(heard, "rb", buffering=0) as numbers:
        while number := numbers.read(1):
            signum = number[0]
            if signum not in now.before:
                continue
            if first is None:
                first = time.monotonic()
                _say_soon(now, signum)
            elif now.echoes:
                now.echoes -= 1
            elif now.ends_process and time.monotonic() - first >= SAME_SECONDS and not _of_others(now.before[signum]):
                _leave(signum)


def _say_soon(now: _Watch, signum: int) -> None:
    """A line for a person who waits, if the main thread takes long to notice."""

    def say() -> None:
        if _watch is now and now.noted is None:
            os.write(2, f"\nsaejax: {name(signum)} noted; it stops what runs now as soon as that ends\n".encode())

    timer = threading.Timer(_SILENT_SECONDS, say)
    timer.daemon = True
    timer.start()


def _forked() -> None:
    """A forked child is not part of the run: a signal to it must not reach this process's thread."""
    global _watch
    if _watch is not None:
        signal.set_wakeup_fd(-1)
        for number, handler in _watch.before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        _watch = None


os.register_at_fork(after_in_child=_forked)
