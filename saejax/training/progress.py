"""What a person sees while a run goes on, and how fast it went."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm


class Progress:
    """A bar on a terminal, a line every half minute elsewhere, and the meter behind both.

    Args:
      start_step: step at which this process begins.
      n_steps: steps of the whole run.
      batch: rows per step.
      show: whether to print at all; process 0 does.
    """

    def __init__(self, start_step: int, n_steps: int, batch: int, show: bool = True) -> None:
        self._batch = batch
        terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=n_steps,
            initial=start_step,
            unit="step",
            disable=not show,
            dynamic_ncols=True,
            mininterval=0.5 if terminal else 30.0,
        )
        self._start = self._mark = time.perf_counter()
        self._steps = self._steps_marked = 0
        self._waited = self._waited_marked = 0.0
        self._paused = self._paused_marked = 0.0

    def step(self, waited_seconds: float) -> None:
        """Count one step, of which `waited_seconds` went by waiting for data."""
        self._steps += 1
        self._waited += waited_seconds
        self._bar.update(1)

    def pause(self, seconds: float) -> None:
        """Leave time spent on evaluation out of the speed."""
        self._paused += seconds

    def lap(self) -> dict[str, float]:
        """Speed since the last lap.

        Returns:
          tokens_per_second and data_wait_share, the share of the time that went by waiting for data.
        """
        now = time.perf_counter()
        seconds = max(now - self._mark - (self._paused - self._paused_marked), 1e-9)
        lap = {
            "tokens_per_second": (self._steps - self._steps_marked) * self._batch / seconds,
            "data_wait_share": (self._waited - self._waited_marked) / seconds,
        }
        self._mark, self._steps_marked = now, self._steps
        self._waited_marked, self._paused_marked = self._waited, self._paused
        return lap

    def total(self) -> dict[str, float]:
        """Steps, seconds, tokens per second and data wait over this process's share of the run."""
        seconds = max(time.perf_counter() - self._start - self._paused, 1e-9)
        return {
            "steps": self._steps,
            "seconds": seconds,
            "tokens_per_second": self._steps * self._batch / seconds,
            "data_wait_share": self._waited / seconds,
        }

    def show(self, values: dict[str, float]) -> None:
        """Set the figures behind the bar."""
        shown = {
            "loss": f"{values['train/loss']:.4g}",
            "l0": f"{values['train/l0']:.1f}",
            "fvu": f"{values['train/fvu']:.4f}",
            "dead": f"{values['train/dead_share']:.2%}",
            "tok/s": f"{values['train/tokens_per_second']:.3g}",
            "wait": f"{values['train/data_wait_share']:.0%}",
        }
        self._bar.set_postfix(shown, refresh=False)

    def close(self) -> None:
        """Leave the terminal clean."""
        self._bar.close()
