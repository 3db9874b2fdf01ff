"""Profile of ten steps with JAX's profiler, when `train.profile` asks for it."""

from __future__ import annotations

import logging
from pathlib import Path

import jax

logger = logging.getLogger(__name__)

WARM_UP, STEPS = 10, 10


class Trace:
    """Records steps after a warm-up; a run that ends or is interrupted earlier leaves what there is.

    Args:
      folder: where the trace is written; None records nothing.
      n_steps: steps that this call of the loop will take: a short run warms up less.
    """

    def __init__(self, folder: Path | None, n_steps: int) -> None:
        self._folder = folder
        # The loop runs one step ahead of the device: one more than STEPS holds all of STEPS.
        self._first = max(1, min(WARM_UP, n_steps - STEPS - 1))
        self._running = False

    def step(self, done: int) -> None:
        """Start or stop, after `done` steps of this call."""
        if self._folder is None:
            return
        if done == self._first:
            self._folder.mkdir(parents=True, exist_ok=True)
            jax.profiler.start_trace(str(self._folder))
            self._running = True
        elif done == self._first + STEPS + 1:
            self.close()

    def close(self) -> None:
        """Write the recording, if there is one, and say how to open it."""
        if not self._running:
            return
        self._running, folder = False, self._folder
        jax.profiler.stop_trace()
        logger.info("profile of %d steps in %s: look at it with", STEPS, folder)
        logger.info("  tensorboard --logdir %s    (pip install tensorboard xprof)", folder)
        logger.info("  or open the *.trace.json.gz in it at https://ui.perfetto.dev")
