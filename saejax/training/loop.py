"""The loop around the compiled step: data in, metrics out one step late, evaluation, checkpoints, a polite end."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from saejax.activations.source import RowIterator
from saejax.checkpoint import Checkpoints
from saejax.errors import UserError
from saejax.tracking import Tracker
from saejax.training import interrupt
from saejax.training.progress import Progress
from saejax.training.settings import TrainConfig
from saejax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a call of `fit` ended.

    Attributes:
      state: the last state, on its mesh.
      step: optimiser steps taken in all.
      signum: the signal that stopped the run, None when it reached its end.
      evaluation: the last held-out metrics.
      speed: seconds, tokens_per_second, data_wait_share of this call.
    """

    state: TrainState
    step: int
    signum: int | None
    evaluation: dict[str, float]
    speed: dict[str, float]


def fit(
    state: TrainState,
    step: Callable[[TrainState, jax.Array], tuple[TrainState, dict[str, jax.Array]]],
    rows: RowIterator,
    *,
    config: TrainConfig,
    save_every_steps: int | None,
    put: Callable[[np.ndarray], jax.Array],
    evaluate: Callable[[TrainState], dict[str, float]],
    learning_rate: Callable[[int], Any],
    checkpoints: Checkpoints,
    tracker: Tracker,
) -> Outcome:
    """Train from where `state` and `rows` stand to the end of the run, or to a signal.

    Args:
      state: donated to the step.
      step: compiled.
      rows: this process's lanes, at the position that belongs to `state`.
      config: length and rhythm.
      save_every_steps: as in `CheckpointConfig`.
      put: host record -> device array sharded over the lanes.
      evaluate: held-out metrics of a state.
      learning_rate: step -> rate, for the log.
      checkpoints: saved to every so many steps, at the end and on a signal.
      tracker: logged to.

    Returns:
      See `Outcome`. Everything is saved by then.

    Raises:
      UserError: the loss is no longer finite, or a checkpoint cannot be written.
    """
    first, last = int(state.step), config.n_steps
    progress = Progress(first, last, config.batch, show=jax.process_index() == 0)
    evaluation: dict[str, float] = {}
    pending: tuple[int, dict[str, jax.Array]] | None = None
    number = first

    def report(number: int, metrics: dict[str, jax.Array]) -> None:
        values = {f"train/{name}": float(value) for name, value in jax.device_get(metrics).items()}
        values |= {f"train/{name}": value for name, value in progress.lap().items()}
        values["train/lr"] = float(learning_rate(number - 1))
        tracker.log(number, {"tokens": number * config.batch} | values)
        progress.show(values)
        if not math.isfinite(values["train/loss"]):
            raise UserError(
                f"loss is {values['train/loss']} at step {number}; lower optim.lr or check the activations "
                f"(last checkpoint: step {checkpoints.latest_step})"
            )

    try:
        with interrupt.watch() as stop:
            position = rows.get_state()
            fresh = put(next(rows)) if first < last else None
            previous: jax.Array | None = None
            while number < last and not stop:
                state, metrics = step(state, fresh)  # pyright: ignore[reportArgumentType]
                number += 1
                position = rows.get_state()
                started = time.perf_counter()
                fresh = put(next(rows)) if number < last else None
                progress.step(time.perf_counter() - started)
                if pending is not None:
                    report(*pending)
                pending = (number, metrics) if number % config.log_every_steps == 0 or number == last else None
                evaluate_now = _due(number, config.eval_every_steps) or number == last
                save_now = _due(number, save_every_steps) or number == last
                if pending is not None and (evaluate_now or save_now):
                    report(*pending)
                    pending = None
                fvu = None
                if evaluate_now:
                    started = time.perf_counter()
                    evaluation = evaluate(state)
                    progress.pause(time.perf_counter() - started)
                    tracker.log(number, {f"eval/{name}": value for name, value in evaluation.items()})
                    fvu = evaluation.get("fvu")
                if save_now:
                    checkpoints.save(number, state, position, fvu)
                # One step runs ahead of the host, no more: memory stays bounded and a signal is seen at once.
                jax.block_until_ready(previous)
                previous = metrics["loss"]
            if first == last:
                evaluation = evaluate(state)
            if number < last:
                checkpoints.save(number, state, position, None)
            checkpoints.wait()
    finally:
        progress.close()
    return Outcome(state, number, stop.signum if number < last else None, evaluation, progress.total())


def _due(number: int, every: int | None) -> bool:
    return every is not None and number % every == 0
