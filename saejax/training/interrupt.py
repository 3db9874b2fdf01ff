"""Ctrl-C, SIGTERM, SIGUSR1 and SIGUSR2: the loop sees them between two steps and saves before it leaves.

In a run of several processes one of them may be the only one that is asked, and all must stop before the same step.
There the asking goes through JAX's preemption service, which listens for SIGTERM: the other signals are passed on to it
as such, and after the last step the processes tell one another which signal it was.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from saejax import processes

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Interrupt:
    """The signal that asked the run to stop, if any.

    Attributes:
      signum: number of the signal, None while none came; of SIGTERM to one of several processes it is not known.
    """

    def __init__(self) -> None:
        self.signum: int | None = None

    def __bool__(self) -> bool:
        return self.signum is not None

    def due(self, step: int) -> bool:
        """Whether the run stops before this step; alike in all processes, each of which asks before every step."""
        return processes.stops_at(step) if processes.several() else bool(self)

    def agreed(self) -> int:
        """The signal that stopped the run, alike in all processes; each asks once, after the last step."""
        noted = processes.gather(str(self.signum or 0))
        return max(map(int, noted)) or signal.SIGTERM


@contextlib.contextmanager
def watch() -> Iterator[Interrupt]:
    """Catch `SIGNALS` (schedulers send USR1, submitit USR2 ahead of a time limit); a second one acts at once.

    Yields:
      An `Interrupt` that turns true on the first signal. Outside the main thread, where Python allows no handler,
      it stays false.
    """
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    several = processes.several()
    watched = [number for number in SIGNALS if not (several and number == signal.SIGTERM)]
    previous = {number: signal.getsignal(number) for number in watched}

    def note(signum: int, frame: FrameType | None) -> None:
        interrupt.signum = signum
        for number, handler in previous.items():
            signal.signal(number, handler)
        if several:
            os.kill(os.getpid(), signal.SIGTERM)  # to JAX, which tells the others

    for number in previous:
        signal.signal(number, note)
    try:
        yield interrupt
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
