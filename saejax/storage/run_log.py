"""train.log: a copy of the terminal's lines in the run directory, however the run was started."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path

from saejax.errors import UserError
from saejax.storage import atomic
from saejax.storage.version import VERSION

NAME = "train.log"


class _File(atomic.LogFile):
    """Begun only when there is something to say, and without a say in how the run ends."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S"))

    def emit(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)
        except (OSError, UserError):  # of opening it
            self.handleError(record)


@contextlib.contextmanager
def kept(run_dirs: Iterable[Path]) -> Iterator[None]:
    """Copies log lines inside this context, and calls of `note`, to the train.log of some runs.

    Args:
      run_dirs: of runs; no log is begun where there is no directory.
    """
    handlers = [_File(path / NAME) for path in run_dirs]
    root = logging.getLogger()
    level = root.level
    for handler in handlers:
        root.addHandler(handler)
    if handlers and not root.isEnabledFor(logging.INFO):
        root.setLevel(logging.INFO)
    note(f"saejax {VERSION} on {platform.node()}, process {os.getpid()}")
    try:
        yield
    except (UserError, OSError) as error:
        note(f"ended: {error}")
        raise
    except KeyboardInterrupt:
        note("interrupted")
        raise
    except Exception:
        note(traceback.format_exc())
        raise
    finally:
        root.setLevel(level)
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()


def note(text: str) -> None:
    """Write into the logs that are open a line that the terminal shows in another way."""
    record = logging.LogRecord(__name__, logging.INFO, __file__, 0, text, None, None)
    for handler in logging.getLogger().handlers:
        if isinstance(handler, _File):
            handler.handle(record)
