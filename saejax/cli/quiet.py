"""Library noise, silenced where the program tells the same in one line: logs, and errors in their threads.

A checkpoint that cannot be written, for example on a full disk, fails in a dozen threads and event loops at once. Each
would print its own traceback: thousands of lines around the one that names the disk. `SAEJAX_LOG=DEBUG` shows all of
it.
"""

from __future__ import annotations

import inspect
import logging
import os
import sys
import threading
import warnings
from typing import Any

from saejax.parallel import processes

logger = logging.getLogger(__name__)

LEVEL = "SAEJAX_LOG"
"""Environment variable with the log level: DEBUG, INFO, WARNING or ERROR."""

_LIBRARIES = ("orbax", "tensorstore", "asyncio", "concurrent", "grain")
_BEFORE: dict[str, Any] = {}


def level() -> str:
    """The level that the environment asks for; INFO where it names none."""
    said = os.environ.get(LEVEL, "").upper()
    return said if said in ("DEBUG", "INFO", "WARNING", "ERROR") else "INFO"


def log_to_stderr() -> None:
    """Log to the terminal as a command does, with libraries silenced."""
    logging.basicConfig(level=level(), format="%(message)s", stream=sys.stderr, force=True)
    libraries()


def libraries() -> None:
    """Silence them in this process; safe to repeat."""
    if not processes.first():
        logging.getLogger().setLevel(logging.ERROR)
    for name in ("absl", "jax", "orbax", "httpx", "httpx2"):  # a page per checkpoint at INFO, every call
        logging.getLogger(name).setLevel(logging.WARNING)
    if level() == "DEBUG":
        return
    for name in ("absl", "asyncio"):  # Orbax guesses aloud over a broken file, and tells each thread that fails
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", message="coroutine .* was never awaited", category=RuntimeWarning)
    if not _BEFORE:
        _BEFORE.update(thread=threading.excepthook, unraisable=sys.unraisablehook)
        threading.excepthook, sys.unraisablehook = _in_thread, _unraisable


def _in_thread(failed: threading.ExceptHookArgs) -> None:
    """A thread of a library that fails has told whoever waits for it."""
    if failed.thread is not None and type(failed.thread).__module__.startswith(_LIBRARIES) or _theirs(failed):
        return
    _BEFORE["thread"](failed)


def _theirs(failed: threading.ExceptHookArgs) -> bool:
    """Whether the thread ran a function of a library: the outermost frames of a thread are those of `threading`."""
    frame = failed.exc_traceback
    while frame is not None and frame.tb_frame.f_globals.get("__name__") == "threading":
        frame = frame.tb_next
    return frame is not None and str(frame.tb_frame.f_globals.get("__name__", "")).startswith(_LIBRARIES)


def _unraisable(failed: Any) -> None:
    """Event loops and coroutines of a failed save, which Python closes late."""
    late = isinstance(failed.exc_value, RuntimeError) and "Event loop is closed" in str(failed.exc_value)
    if late or inspect.iscoroutine(failed.object):
        return
    _BEFORE["unraisable"](failed)
