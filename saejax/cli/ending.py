"""Ends of a command: the line that a person reads and the exit status, for mistakes, signals and defects."""

from __future__ import annotations

import contextlib
import importlib
import signal
import sys
from collections.abc import Iterator

from saejax.errors import MISTAKE, UserError, stopped_status
from saejax.parallel import processes, signals


@contextlib.contextmanager
def answering(name: str, arguments: list[str], end: processes.Ending) -> Iterator[None]:
    """One command: what ends it becomes a line and a status, and the other processes of its run hear of it.

    Args:
      name: of the command.
      arguments: as typed.
      end: its status is set where the command fails.
    """
    processes.introduce(lambda: importlib.import_module("saejax.runs.agreement").command(name, arguments))
    try:
        yield
    except BaseException as error:
        status = of(name, error)
        joins = any("mesh.distributed=" in a or a.startswith("resume=") for a in arguments)
        if joins and name in ("train", "evaluate"):
            with contextlib.suppress(Exception):  # it may have been stopped while modules were imported
                importlib.import_module("saejax.runs.agreement").tell_others(arguments, error)
        if status is None:
            raise
        end.status = status


def of(name: str, error: BaseException) -> int | None:
    """A line about what ended a command, and its exit status; None for a defect, whose traceback is wanted."""
    match error:
        case UserError():
            print(f"saejax {name}: {error}", file=sys.stderr)
        case OSError():
            where = f" ({error.filename})" if error.filename else ""
            print(f"saejax {name}: {error.strerror or error}{where}", file=sys.stderr)
        case KeyboardInterrupt():
            return stopped(name, error)
        case _:
            return None
    return MISTAKE


def stopped(name: str, stop: KeyboardInterrupt) -> int:
    """A line about a command that a signal stopped, and its exit status."""
    signum = getattr(stop, "signum", signal.SIGINT)
    if processes.first():
        print(f"saejax {name}: stopped by {signals.name(signum)}; the same command continues", file=sys.stderr)
    return stopped_status(signum)
