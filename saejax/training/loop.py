"""Training loop: feeds the compiled step, reads metrics one step late, evaluates, saves and ends cleanly."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

from saejax.activations.source import RowIterator
from saejax.errors import UserError
from saejax.parallel import processes
from saejax.storage.checkpoint import Checkpoints
from saejax.storage.tracking import Tracker
from saejax.training import flops, interrupt, nonfinite
from saejax.training.progress import Progress
from saejax.training.settings import TrainConfig
from saejax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Result of a call of `fit`.

    Attributes:
      state: the last state, on its mesh.
      step: optimiser steps taken in all.
      signum: the signal that stopped the run, None when it reached its end.
      evaluation: the last held-out metrics.
      speed: steps, seconds, tokens_per_second, data_wait_share and, where known, mfu of this call.
    """

    state: TrainState
    step: int
    signum: int | None
    evaluation: dict[str, float]
    speed: dict[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What the loop calls between two steps."""

    put: Callable[[np.ndarray], jax.Array]
    """Host record -> device array sharded over the lanes."""
    evaluate: Callable[[TrainState], dict[str, float]]
    """Held-out metrics of a state."""
    checkpoints: Checkpoints
    """Saved to every so many steps, at the end and on a signal."""
    tracker: Tracker
    """Logged to."""
    inspect: nonfinite.Inspect = lambda *_: ""
    """Saves and describes the rows of a step that is not finite."""


def fit(
    state: TrainState,
    step: Callable[[TrainState, jax.Array], tuple[TrainState, dict[str, jax.Array]]],
    rows: RowIterator,
    around: Surroundings,
    *,
    config: TrainConfig,
    save_every_steps: int | None,
    work: flops.Work | None = None,
    profile: Path | None = None,
) -> Outcome:
    """Train from where `state` and `rows` stand to the end of the run, or to a signal.

    Args:
      state: donated to the step.
      step: compiled.
      rows: this process's lanes, at the position that belongs to `state`.
      around: data, evaluation, checkpoints and logs.
      config: length and rhythm.
      save_every_steps: as in `CheckpointConfig`.
      work: what a step costs, and with `profile` where ten steps are recorded; None leaves them out.

    Returns:
      See `Outcome`. Everything is saved by then.

    Raises:
      UserError: the loss or the parameters are no longer finite, the data cannot be read, or the last checkpoint cannot
        be written. A state that is not finite is never saved.
    """
    put, checkpoints, tracker = around.put, around.checkpoints, around.tracker
    first, last = int(state.step), config.n_steps
    progress = Progress(first, last, config.batch, jax.process_index() == 0, work, profile)
    watch = nonfinite.Watch(config, around.inspect, state.key)
    log = _Log(config, tracker, progress, watch)
    evaluation: dict[str, float] = {}
    number, position, fvu = first, rows.get_state(), None
    previous: jax.Array | None = None
    metrics: dict[str, jax.Array] = {}
    with _closing(progress, checkpoints), interrupt.watch() as stop:
        fresh = put(next(rows)) if first < last else None
        while number < last and not stop.due():
            state, metrics = step(state, fresh)  # pyright: ignore[reportArgumentType]
            number, position = number + 1, rows.get_state()
            watch.note(number, metrics)
            started = time.perf_counter()
            with _saved_on_failure(checkpoints, number, state, position, watch):
                fresh = put(next(rows)) if number < last else None
            progress.step(_waited(started, metrics))
            log.flush()
            if _due(number, config.log_every_steps) or number == last:
                log.hold(number, metrics)
            save_now = _due(number, save_every_steps) or number == last
            # A checkpoint that was not evaluated could not be kept as the best one.
            evaluate_now = _due(number, config.eval_every_steps) or save_now and config.eval_every_steps is not None
            fvu = None
            if evaluate_now or save_now:
                log.flush()
                watch.check(number)
            if evaluate_now or number == last:
                with _saved_on_failure(checkpoints, number, state, position, watch):
                    evaluation = _evaluate(around.evaluate, state, number, progress, tracker)
                fvu = evaluation.get("fvu")
            if save_now:
                checkpoints.save(number, state, position, fvu)
            # One step runs ahead of the host, no more: memory stays bounded and a signal is seen at once.
            jax.block_until_ready(previous)
            previous = metrics["loss"]
            watch.settle(number - 1)
        log.flush()
        if number < last:  # stopped, perhaps before its first step: then what was drawn and estimated is saved
            watch.check(number)
        checkpoints.ensure(number, state, position, fvu)
    return Outcome(state, number, stop.agreed() if number < last else None, evaluation, progress.total())


class _Log:
    """Metrics read one step late, when the device has long computed them."""

    def __init__(self, config: TrainConfig, tracker: Tracker, progress: Progress, watch: nonfinite.Watch) -> None:
        self._config, self._tracker, self._progress, self._watch = config, tracker, progress, watch
        self._held: tuple[int, dict[str, jax.Array]] | None = None

    def hold(self, number: int, metrics: dict[str, jax.Array]) -> None:
        """Keep the metrics of a step until they are flushed."""
        self._held = (number, metrics)

    def flush(self) -> None:
        """Write the held metrics.

        Raises:
          FloatingPointError: the loss or the parameters are not finite.
        """
        if self._held is None:
            return
        (number, metrics), self._held = self._held, None
        values = {f"train/{name}": float(value) for name, value in jax.device_get(metrics).items()}
        values |= {f"train/{name}": value for name, value in self._progress.lap().items()}
        self._tracker.log(number, {"tokens": number * self._config.batch} | values)
        self._progress.show(values)
        self._watch.check(number)


@contextlib.contextmanager
def _closing(progress: Progress, checkpoints: Checkpoints) -> Iterator[None]:
    """Leaves the terminal clean; reports a loss that is not finite with the step to return to."""
    try:
        yield
    except FloatingPointError as error:
        raise UserError(f"{error}; the last checkpoint is of step {checkpoints.latest_step}") from error
    finally:
        progress.close()


@contextlib.contextmanager
def _saved_on_failure(
    checkpoints: Checkpoints, number: int, state: TrainState, position: dict, watch: nonfinite.Watch
) -> Iterator[None]:
    """Whatever goes wrong inside, the training done so far is not lost with it.

    One process that fails cannot save alone; the last checkpoint stays.
    """
    try:
        yield
    except BaseException:
        if processes.several():
            raise
        watch.check(number)
        checkpoints.ensure(number, state, position, None)
        raise


def _evaluate(
    evaluate: Callable[[TrainState], dict[str, float]],
    state: TrainState,
    number: int,
    progress: Progress,
    tracker: Tracker,
) -> dict[str, float]:
    started = time.perf_counter()
    evaluation = dict(evaluate(state))
    progress.pause(time.perf_counter() - started)
    tracker.log(number, {f"eval/{name}": value for name, value in evaluation.items()})
    return evaluation


def _waited(started: float, metrics: dict[str, jax.Array]) -> float:
    """Seconds since then in which the devices may have stood still: none while the step is under way."""
    done = metrics["loss"].is_ready()  # pyright: ignore[reportAttributeAccessIssue]
    return time.perf_counter() - started if done else 0.0


def _due(number: int, every: int | None) -> bool:
    return every is not None and number % every == 0
