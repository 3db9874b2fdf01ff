"""Exit statuses, and the error that users see as one line without a traceback.

docs/reliability.md holds the table, which is the same for every command. A batch script needs one rule: 0 is done, 128
and more means "run the same again", anything else needs a person.
"""

from __future__ import annotations

import signal

DONE = 0
"""The work was done."""
FAILED = 1
"""A requested check did not pass (store verify, experiment), or a part of the work failed (a job of a sweep, a member
of an ensemble). Also any defect, with its traceback."""
MISTAKE = 2
"""A `UserError`, or a refusal of the file system: one line says what to mend."""
LOST = 134
"""Another process of the same run is gone. JAX's own abort gives the same number."""


def stopped_status(signum: int) -> int:
    """Exit status of work that a signal stopped after it was made safe, as shells count: 128 + n.

    >>> stopped_status(signal.SIGINT), stopped_status(signal.SIGUSR1), stopped_status(signal.SIGTERM)
    (130, 138, 143)
    """
    return 128 + signum


class UserError(ValueError):
    """A mistake that the user can mend: one line that names the field, the value and what is allowed.

    The command line prints it without a traceback and exits with status 2.
    """


class Stopped(KeyboardInterrupt):
    """A signal that stops work like Ctrl-C: finished work is safe, and the same command continues.

    Args:
      signum: its number.
    """

    def __init__(self, signum: int = signal.SIGINT) -> None:
        super().__init__(signum)
        self.signum = signum
