"""Signals in the loop (Ctrl-C, SIGTERM, SIGUSR1, SIGUSR2): checked between two steps; the loop saves and leaves.

`saejax.parallel.signals` covers the time before and after the loop, and has the table of signals.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from saejax.parallel import processes, signals


class Interrupt:
    """The signal that asked the run to stop, if any."""

    @property
    def signum(self) -> int | None:
        """Its number, None while none came; of SIGTERM to one of several processes it is not known."""
        return signals.noted()

    def __bool__(self) -> bool:
        return self.signum is not None

    def due(self) -> bool:
        """Whether the run stops before its next step; alike in all processes, each of which asks before every step."""
        return processes.stop_here() if processes.several() else bool(self)

    def agreed(self) -> int:
        """The signal that stopped the run, alike in all processes; each asks once, after the last step."""
        return processes.stopped_by()


@contextlib.contextmanager
def watch() -> Iterator[Interrupt]:
    """Signals are noted (schedulers send USR1, submitit USR2 ahead of a time limit); a second one acts at once.

    Yields:
      An `Interrupt` that is true from the first signal on, also of one that came while the step was compiled. Outside
      the main thread, where Python allows no handler, it may stay false.
    """
    with signals.hold():
        yield Interrupt()
