"""Progress display and speed of a run."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from tqdm import tqdm

from saejax.storage import run_log
from saejax.training import flops, memory, trace

NOTE_SECONDS = 60.0
"""Between two lines of progress in train.log."""


class Progress:
    """A bar on a terminal, a line every half minute elsewhere, and the meter behind both.

    Args:
      start_step: step at which this process begins.
      n_steps: steps of the whole run.
      batch: rows per step.
      show: whether to print at all; process 0 does.
      work: what a step costs, for the utilisation; None leaves that out.
      profile: where a profile of ten steps goes; None makes none.
    """

    def __init__(
        self,
        start_step: int,
        n_steps: int,
        batch: int,
        show: bool = True,
        work: flops.Work | None = None,
        profile: Path | None = None,
    ) -> None:
        self._batch, self._work = batch, work
        self._trace = trace.Trace(profile, n_steps - start_step)
        terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=n_steps,
            initial=start_step,
            unit="step",
            disable=not show,
            dynamic_ncols=True,
            mininterval=0.5 if terminal else 30.0,
        )
        self._shown: dict[str, str] = {}
        self._noted = -NOTE_SECONDS  # the first step is a line as well: it says that compilation is over
        self._start = self._mark = time.perf_counter()
        self._steps = self._steps_marked = 0
        self._waited = self._waited_marked = 0.0
        self._paused = self._paused_marked = 0.0

    def step(self, waited_seconds: float) -> None:
        """Count one step, of which `waited_seconds` went by waiting for data."""
        self._steps += 1
        self._waited += waited_seconds
        self._bar.update(1)
        if time.perf_counter() - self._noted > NOTE_SECONDS:
            self._note()
        started = time.perf_counter()
        self._trace.step(self._steps)
        self.pause(time.perf_counter() - started)

    def pause(self, seconds: float) -> None:
        """Leave time spent on evaluation, or on writing a profile, out of the speed."""
        self._paused += seconds

    def lap(self) -> dict[str, float]:
        """Speed since the last lap.

        Returns:
          What `_speed` says, and peak_memory_bytes so far.
        """
        now = time.perf_counter()
        seconds = max(now - self._mark - (self._paused - self._paused_marked), 1e-9)
        lap = self._speed(self._steps - self._steps_marked, self._waited - self._waited_marked, seconds)
        peak = memory.peak_bytes()
        lap |= {} if peak is None else {"peak_memory_bytes": float(peak)}
        self._mark, self._steps_marked = now, self._steps
        self._waited_marked, self._paused_marked = self._waited, self._paused
        return lap

    def total(self) -> dict[str, float]:
        """Steps, seconds and what `_speed` says of this process's share of the run."""
        seconds = max(time.perf_counter() - self._start - self._paused, 1e-9)
        return {"steps": self._steps, "seconds": seconds} | self._speed(self._steps, self._waited, seconds)

    def _speed(self, steps: int, waited: float, seconds: float) -> dict[str, float]:
        """tokens_per_second, data_wait_share (of the time) and, with `work`, model_flops_per_second and mfu."""
        speed = {"tokens_per_second": steps * self._batch / seconds, "data_wait_share": waited / seconds}
        return speed | ({} if self._work is None else self._work.rates(steps / seconds))

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
        if "train/mfu" in values:
            shown["mfu"] = f"{values['train/mfu']:.1%}"
        if "train/peak_memory_bytes" in values:
            shown["mem"] = f"{values['train/peak_memory_bytes'] / 2**30:.2f}GiB"
        self._shown = shown
        self._bar.set_postfix(shown, refresh=False)

    def _note(self) -> None:
        """The bar as a line of the run's log."""
        self._noted = time.perf_counter()
        if not self._bar.disable:
            figures = ", ".join(f"{name} {value}" for name, value in self._shown.items())
            share = self._bar.n / max(self._bar.total, 1)
            run_log.note(f"step {self._bar.n} of {self._bar.total} ({share:.0%})" + f": {figures}" * bool(figures))

    def close(self) -> None:
        """Leave the terminal clean, the last step in the log, and no profile half written."""
        self._note()
        self._bar.close()
        self._trace.close()
