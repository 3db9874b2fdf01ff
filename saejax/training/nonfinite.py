"""Steps that are not finite (loss, gradients or parameters): stop the run, or skip the step.

Either way the rows of the step are recovered and saved. This costs nothing in a healthy run: a row stays in the buffer
until its slot is drawn again, one key gives the slots of every step, and a record's number gives the record.
"""

from __future__ import annotations

import functools
import json
import logging
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Key

from saejax.activations import buffer, normalize
from saejax.activations.loader import Stream
from saejax.activations.source import RowIterator
from saejax.errors import UserError
from saejax.storage import atomic
from saejax.training.settings import OnNonfinite, TrainConfig

logger = logging.getLogger(__name__)

LISTED = 100
"""Rows named one by one in the description of a step at most."""

_FATAL = ("loss", "param_norm")
_REMEMBERED = 4096

Inspect = Callable[[int, dict[str, float], Key[jax.Array, ""]], str]
"""(step, its loss and norms, key of the draws) -> what there is to say about its rows."""


class Watch:
    """Checks the steps' reports, long after the device has computed them.

    Args:
      config: what is to be done.
      inspect: called for a step that is not finite.
      key: that of the state, which every step folds its number into.
    """

    def __init__(self, config: TrainConfig, inspect: Inspect, key: Key[jax.Array, ""]) -> None:
        self._skips = config.on_nonfinite is OnNonfinite.skip
        self._config, self._inspect = config, inspect
        self._key = np.asarray(jax.random.key_data(key))  # the state it is part of will be donated
        self._steps: deque[tuple[int, dict[str, jax.Array]]] = deque(maxlen=_REMEMBERED)
        self._in_a_row = 0

    def note(self, number: int, metrics: dict[str, jax.Array]) -> None:
        """Remember a step that was started; costs nothing but a few references."""
        self._steps.append(
            (number, {name: metrics[name] for name in (*_FATAL, "grad_norm", "skipped") if name in metrics})
        )

    def settle(self, number: int) -> None:
        """Count the steps up to `number` that were left out; waits for them where steps may be.

        Raises:
          FloatingPointError: too many of them in a row.
        """
        while self._skips and self._steps and self._steps[0][0] <= number:
            step, values = self._steps.popleft()
            if not np.any(jax.device_get(values["skipped"])):
                self._in_a_row = 0
                continue
            self._in_a_row += 1
            said = self._said(step, values)
            logger.warning("skipped step %d (%d in a row): %s", step, self._in_a_row, said)
            if self._in_a_row >= self._config.max_skipped_steps:
                raise FloatingPointError(f"{said}; train.max_skipped_steps={self._in_a_row} were left out in a row")

    def check(self, number: int) -> None:
        """Refuse to continue, and so to save, if a step up to `number` was not finite and was not skipped.

        Raises:
          FloatingPointError: it was; names the first such step that is remembered.
        """
        self.settle(number)
        passed = [self._steps.popleft() for _ in range(len(self._steps)) if self._steps[0][0] <= number]
        if not passed or _wrong(passed[-1][1]) is None:  # what is not finite stays so
            return
        step, values = next(item for item in passed if _wrong(item[1]) is not None)
        raise FloatingPointError(self._said(step, values))

    def _said(self, step: int, values: dict[str, jax.Array]) -> str:
        found = {name: float(np.sum(value)) for name, value in jax.device_get(values).items()}
        name = _wrong(values, (*_FATAL, "grad_norm")) or "loss"
        rows = self._inspect(step, found, jax.random.wrap_key_data(jnp.asarray(self._key)))
        return f"train/{name} is {found[name]} at step {step}: {rows or 'lower optim.lr, or look at the activations'}"


def _wrong(values: dict[str, jax.Array], names: tuple[str, ...] = _FATAL) -> str | None:
    """The first of some values of a step that is not finite."""
    found = jax.device_get(values)
    return next((name for name in names if name in found and not np.all(np.isfinite(found[name]))), None)


class Inspector:
    """Finds the rows of a step again and writes them down.

    Args:
      run_dir: `nonfinite/step_N.npz` (rows as drawn, float32, with the record, lane and row of the source of each) and
        `step_N.json` (what to read first) are written there.
      rows: the stream; only its `record` is used.
      lanes: of this process.
      shape: of the buffer, [n_lanes, n_batches, block_rows, d_row].
    """

    def __init__(self, run_dir: Path, rows: RowIterator, lanes: range, shape: tuple[int, ...]) -> None:
        self._folder, self._rows, self._lanes, self._shape = run_dir / "nonfinite", rows, lanes, shape

    def __call__(self, step: int, values: dict[str, float], key: Key[jax.Array, ""]) -> str:
        """Save the batch of a step (1 is the first); says which rows are not finite, or "" where all are."""
        if not isinstance(self._rows, Stream):
            return ""
        came = records_of(key, step - 1, self._shape)[self._lanes.start : self._lanes.stop]
        drawn, source_row = self._read(came)
        bad = np.argwhere(~np.isfinite(drawn).all(axis=-1))
        named = [
            {"record": int(came[lane, row]), "lane": self._lanes[lane], "row": int(row), "source_row": int(at)}
            for lane, row in bad[:LISTED]
            for at in [source_row[lane, row]]
        ]
        part = f"_process_{jax.process_index()}" if jax.process_count() > 1 else ""
        file = self._folder / f"step_{step}{part}.npz"
        plain = {name: value if np.isfinite(value) else str(value) for name, value in values.items()}
        said = {"step": step, **plain, "n_rows": came.size, "not_finite": len(bad), "rows": named}
        try:
            self._folder.mkdir(exist_ok=True)
            lane = np.broadcast_to(np.asarray(self._lanes)[:, None], came.shape)
            with atomic.opened(file) as out:
                np.savez(out, rows=drawn, record=came, lane=lane, source_row=source_row)
            atomic.write(file.with_suffix(".json"), json.dumps(said, indent=1))
        except OSError as error:
            logger.error("the rows of step %d could not be saved: %s", step, error)
        if not named:
            return ""
        first = named[0]
        where = f"row {first['source_row']} of the source, " if first["source_row"] >= 0 else ""
        return (
            f"{len(bad)} of its {came.size} rows not finite, the first {where}record {first['record']}, lane "
            f"{first['lane']} ({file}); mend the data, or train.on_nonfinite=skip"
        )

    def _read(self, came: Int[np.ndarray, "lanes rows"]) -> tuple[Float[np.ndarray, "lanes rows d"], np.ndarray]:
        """The rows that came with some records, and where they lie in the source, -1 where it cannot say."""
        assert isinstance(self._rows, Stream)
        drawn = np.empty((*came.shape, self._shape[-1]), np.float32)
        source_row = np.full(came.shape, -1, np.int64)
        for number in np.unique(came):
            mine = came == number
            drawn[mine] = self._rows.record(int(number))[mine]
            if (starts := self._rows.starts(int(number))) is not None:
                source_row[mine] = (starts[self._lanes.start : self._lanes.stop, None] + np.arange(came.shape[1]))[mine]
        return drawn, source_row


def records_of(key: Key[jax.Array, ""], step: int, shape: tuple[int, ...]) -> Int[np.ndarray, "lanes rows"]:
    """Number of the record that each row of a batch came in with.

    Args:
      key: of the state.
      step: steps taken before this one.
      shape: of the buffer, [n_lanes, n_batches, block_rows, ...]; its first filling are the first n_batches records.
    """
    n_lanes, n_batches, block_rows = shape[:3]
    sizes = {"n_lanes": n_lanes, "n_batches": n_batches, "block_rows": block_rows}
    slots = functools.partial(_slots, **sizes)
    wanted = np.asarray(slots(key, np.asarray([step])))[0]
    found = np.full(wanted.shape, -1)
    for stop in range(step, 0, -_CHUNK):
        before = np.arange(stop - _CHUNK, stop)
        drawn = np.asarray(slots(key, np.maximum(before, 0)))
        for number in before[before >= 0][::-1]:
            found[(found < 0) & (drawn[number - before[0]] == wanted)] = n_batches + number
        if (found >= 0).all():
            break
    return np.where(found < 0, wanted, found)


_CHUNK = 64


@functools.partial(jax.jit, static_argnames=("n_lanes", "n_batches", "block_rows"))
def _slots(
    key: Key[jax.Array, ""], steps: Int[jax.Array, " steps"], **sizes: int
) -> Int[jax.Array, "steps lanes rows"]:
    return jax.vmap(lambda step: buffer.draw_slots(jax.random.fold_in(key, step), **sizes))(steps)


def check_first(records: list[np.ndarray], rows: RowIterator, n_rows: int, place: str) -> None:
    """Refuses the rows that a run would begin with where nothing can be learned from them; asks no device for long.

    Args:
      records: [lanes, block_rows, d_row] each, the first ones of `rows`.
      rows: the stream.
      n_rows: of which the scale is found; those must be finite.
      place: where the data lie, for messages.

    Raises:
      UserError: naming the first row that is not finite; or what all of them are.
    """
    lanes, block_rows, d_row = records[0].shape
    for number, record in enumerate(records[: -(-n_rows // (lanes * block_rows))]):
        bad = _not_finite(record)
        if bad is not None:
            lane, row = bad
            starts = rows.starts(number) if isinstance(rows, Stream) else None
            where = "" if starts is None else f"row {int(starts[lane]) + row} of the source, "
            said = f"{where}record {number}, lane {lane}, row {row} of it"
            raise UserError(f"{place}: the data are not finite: {said}; clean them first")
    all_equal = all((record == records[0][0, 0]).all() for record in records)  # ends at the first that are not
    step = -(-len(records) * lanes * block_rows // _LOOKED_AT)
    some = np.concatenate([record.reshape(-1, d_row)[::step] for record in records])
    looked_at = records[0].reshape(-1, d_row)[:2] if all_equal else some
    why = normalize.trouble(looked_at)
    if why is not None and (all_equal or not (some == some[0]).all()):
        raise UserError(f"{place}: {why}")


_LOOKED_AT = 8192
"""Rows, spread over the first filling, whose extent is looked at."""


def check_heldout(blocks: Iterable[np.ndarray], place: str) -> None:
    """Refuses held-out rows that no figure can be made of, before anything slow.

    Args:
      blocks: [b, d_row] each; what will be evaluated.
      place: where the data lie, for messages.

    Raises:
      UserError: there is none, or one of them is not finite.
    """
    n_rows, first, equal = 0, None, True
    for block in blocks:
        first = block[:1] if first is None else first
        if (bad := _not_finite(block[None])) is not None:
            raise UserError(f"{place}: held-out row {n_rows + bad[1]} is not finite; clean the data first")
        equal = equal and bool((block == first).all())
        n_rows += len(block)
    if not n_rows:
        raise UserError(f"{place}: the source has no held-out row: raise its heldout share, or its number of rows")
    if equal and n_rows > 1:
        logger.warning("%s: the %d held-out rows are all equal, so their fvu means nothing", place, n_rows)


def _not_finite(record: np.ndarray) -> tuple[int, int] | None:
    """Lane and row of the first row [lanes, rows, d] that is not finite."""
    for lane, block in enumerate(record):
        finite = np.isfinite(block if block.dtype.itemsize > 2 else block.astype(np.float32)).all(axis=-1)
        if not finite.all():
            return lane, int(finite.argmin())
    return None
