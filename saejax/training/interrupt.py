"""Ctrl-C, SIGTERM, SIGUSR1 and SIGUSR2: the loop sees them between two steps and saves before it leaves."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Interrupt:
    """The signal that asked the run to stop, if any.

    Attributes:
      signum: number of the signal, None while none came.
    """

    def __init__(self) -> None:
        self.signum: int | None = None

    def __bool__(self) -> bool:
        return self.signum is not None


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
    previous = {number: signal.getsignal(number) for number in SIGNALS}

    def note(signum: int, frame: FrameType | None) -> None:
        interrupt.signum = signum
        for number, handler in previous.items():
            signal.signal(number, handler)

    for number in previous:
        signal.signal(number, note)
    try:
        yield interrupt
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
