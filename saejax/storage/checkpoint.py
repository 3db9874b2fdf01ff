"""Checkpoints: save, resume and read runs with Orbax.

A checkpoint holds the whole `TrainState` and the loader's position, so a resumed run equals the uninterrupted one bit
for bit. It can be restored onto any mesh, and one CPU can read its parameters without a mesh. A record beside them
holds the format's version and a checksum of every array; every read compares them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import tensorstore
from orbax.checkpoint import v1 as ocp

from saejax.errors import UserError
from saejax.fields import numeric, paths
from saejax.fields.resume_policy import Place
from saejax.parallel import processes
from saejax.storage import array_checksums, atomic, checkpoint_read, checkpoint_record
from saejax.storage.checkpoint_read import LOADER, RECORD, STATE
from saejax.storage.checkpoint_read import check_newest as check_newest
from saejax.storage.checkpoint_read import load_arrays as load_arrays
from saejax.storage.checkpoint_read import read_record as read_record
from saejax.storage.checkpoint_read import steps as steps
from saejax.storage.checkpoint_record import FORMAT_VERSION as FORMAT_VERSION
from saejax.storage.checkpoint_record import Damaged, Owner

logger = logging.getLogger(__name__)


TRIES, PAUSE_SECONDS = 3, 10.0
"""Tries to write the last checkpoint of a run, and the time between them, in which a user may make room."""


class _NotOrbax(logging.Filter):
    """Filter that drops asyncio's page of text about each read that Orbax gave up; saejax says it in a line."""

    def filter(self, record: logging.LogRecord) -> bool:
        said = record.getMessage()
        return not any(word in said for word in ("orbax", "tensorstore", "zarr", "OCDBT"))


_NOT_ORBAX = _NotOrbax()


def _mend_libraries() -> None:
    """Work around two faults of libraries, in processes that write checkpoints; safe to repeat.

    TensorStore's binding (0.1.86) never frees the metrics that it returns. Orbax asks for them twice in every save, for
    throughput that it logs.
    """
    logging.getLogger("asyncio").addFilter(_NOT_ORBAX)
    tensorstore.experimental_collect_matching_metrics = lambda *_, **__: []


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Frequency of saves, and which checkpoints are kept."""

    save_every_steps: Place[int | None] = 1000
    """Steps between two checkpoints; null saves at the end and on interruption only."""
    keep_last: Place[int] = 1
    """Newest checkpoints kept; at least 1."""
    keep_best: Place[int] = 1
    """Checkpoints of lowest held-out fvu kept beside them; 0 keeps none."""

    def __post_init__(self) -> None:
        numeric.check(self, "checkpoint.")
        if self.save_every_steps is not None and self.save_every_steps < 1:
            raise UserError(f"checkpoint.save_every_steps must be at least 1 or null, got {self.save_every_steps}")
        if self.keep_last < 1:
            raise UserError(f"checkpoint.keep_last must be at least 1, got {self.keep_last}")
        if self.keep_best < 0:
            raise UserError(f"checkpoint.keep_best must be at least 0, got {self.keep_best}")


class Checkpoints:
    """The checkpoints of one run directory, written asynchronously.

    Args:
      run_dir: its subdirectory `checkpoints/` is used.
      config: see `CheckpointConfig`.
      owner: the run; what is saved says so, and what is read must be of it. None asks and says nothing.
      spare: newest checkpoints kept beyond what `config` says, until `trim`.
    """

    def __init__(self, run_dir: Path, config: CheckpointConfig, owner: Owner | None = None, spare: int = 0) -> None:
        self._run_dir, self._config, self._owner = paths.local(run_dir, "run_dir"), config, owner
        self._keep = _kept(config, spare)
        self._pending: Any = None
        self._error = ""
        _mend_libraries()
        self._open()

    def _open(self) -> None:
        self._checkpointer = ocp.training.Checkpointer(
            str(self._run_dir / "checkpoints"),
            preservation_policy=self._keep,
            cleanup_tmp_directories=True,
        )

    @property
    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint, None when there is none."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, step: int, state: Any, loader: dict[str, Any], fvu: float | None) -> None:
        """Start to save; returns while the bytes are still being written, and the state may be donated at once.

        A failed save, for example on a full disk, is logged as an error at the next one and stops nothing. Earlier
        checkpoints stay, and every save tries again. Whoever must have the last one calls `ensure`.

        Args:
          step: optimiser steps taken.
          state: the `TrainState`.
          loader: position of the loader, JSON.
          fvu: held-out fvu of this very step, None where it was not evaluated.
        """
        self.wait()
        if self.latest_step == step:
            return
        items = {STATE: state, LOADER: loader, RECORD: checkpoint_record.make(step, state, loader, fvu, self._owner)}
        metrics: Any = None if fvu is None else {"fvu": fvu}
        try:
            with processes.alike():
                atomic.check_writable(Path(self._checkpointer.directory))  # Orbax would wait for minutes, in threads
                self._pending = self._checkpointer.save_checkpointables_async(step, items, force=True, metrics=metrics)
        except Exception as error:  # what a file system refuses comes in many kinds
            self._failed(error)

    def ensure(self, step: int, state: Any, loader: dict[str, Any], fvu: float | None) -> None:
        """Save, wait until everything is on disk, and try again where that fails.

        Raises:
          UserError: after `TRIES` tries, `PAUSE_SECONDS` apart, it is not.
        """
        for remaining in reversed(range(TRIES)):
            self.save(step, state, loader, fvu)
            self.wait()
            if self.latest_step == step:
                return
            if remaining:
                time.sleep(PAUSE_SECONDS)
        raise UserError(
            f"checkpoint of step {step} could not be written under {self._checkpointer.directory}: {self._error}; "
            f"the last complete one is step {self.latest_step}"
        )

    def wait(self, leaving: bool = False) -> None:
        """Wait for the save that is under way; where it failed, say so and be ready for the next.

        Args:
          leaving: whether this may be the only process that asks.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            with contextlib.nullcontext() if leaving else processes.alike():
                pending.result()
        except Exception as error:
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        self._error, self._pending = checkpoint_read.reason(error), None
        logger.error(
            "CHECKPOINT NOT WRITTEN under %s: %s. Training continues, and the next save tries again; the last complete "
            "checkpoint is step %s",
            *(self._checkpointer.directory, self._error, self.latest_step),
        )
        with contextlib.suppress(Exception):
            self._checkpointer.close()
        self._open()  # a new one forgets the error and removes what the failed save left behind

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """Read a checkpoint onto the shardings of `abstract_state`.

        Args:
          abstract_state: `jax.ShapeDtypeStruct`s with shardings, as from `training.state.abstract`.
          step: which one; None takes the newest that can be read. Broken ones before it are moved to
            `checkpoints_broken/`, out of the way of the run that goes on.

        Returns:
          (state, loader position).

        Raises:
          UserError: none can be read.
        """
        candidates = json.loads(processes.gather(json.dumps(steps(self._run_dir)[::-1] if step is None else [step]))[0])
        directory = self._run_dir / "checkpoints"
        if not candidates:
            raise UserError(f"no checkpoint in {directory}: start the run anew")
        broken: dict[int, str] = {}
        for candidate in candidates:
            try:
                found = self._restored(directory / str(candidate), candidate, abstract_state)
            except Exception as error:  # a cut-off file surfaces as one of many kinds
                if not checkpoint_read.is_damage(error):
                    raise
                broken[candidate] = checkpoint_read.reason(error)
                logger.warning("checkpoint %s cannot be restored (%s)", candidate, broken[candidate])
                continue
            self._set_aside(list(broken))
            return found
        tried = "; ".join(f"step {number}: {reason}" for number, reason in broken.items())
        raise UserError(f"no checkpoint in {directory} can be restored ({tried})")

    def _restored(self, path: Path, step: int, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
        # Partial, because fields that are None now were once not there.
        with processes.alike(), checkpoint_read.alone(partial_load=True):
            atomic.check_readable(path)
            record = checkpoint_read.checked_record(path, step, self._owner)
            wanted = _in_saved_dtypes(path, abstract_state, record)
            found = self._checkpointer.load_checkpointables(step, {STATE: wanted, LOADER: None})
        with processes.alike():
            checkpoint_record.compare(record, found[STATE], found[LOADER])
        return jax.tree.map(_bits_as, found[STATE], abstract_state), found[LOADER]

    def _set_aside(self, numbers: list[int], name: str = "checkpoints_broken") -> None:
        """Move checkpoints away, so that neither `latest_step` nor the preservation policy counts them."""
        if not numbers:
            return
        aside = self._run_dir / name
        self._checkpointer.close()
        with processes.alike():
            for number in numbers if processes.first() else ():
                target = aside / str(number)
                aside.mkdir(exist_ok=True)
                shutil.rmtree(target, ignore_errors=True)
                (self._run_dir / "checkpoints" / str(number)).rename(target)
        self._open()

    def trim(self) -> None:
        """Delete what only `spare` kept."""
        self.wait()
        there = list(self._checkpointer.checkpoints)
        for found, kept in zip(there, _kept(self._config).should_preserve(there, context=None), strict=True):
            if not kept:
                self._checkpointer.delete(found.step)

    def rewind(self, step: int) -> None:
        """Move checkpoints after a step to `checkpoints_ahead/`: the run continues from there and writes them again."""
        ahead = [number for number in steps(self._run_dir) if number > step]
        self._set_aside(ahead, "checkpoints_ahead")

    def close(self) -> None:
        """Wait for the last save and release Orbax's threads."""
        self.wait(leaving=True)
        self._checkpointer.close()


def _kept(config: CheckpointConfig, spare: int = 0) -> Any:
    """Checkpoints to keep: the newest, and the best of those that were evaluated."""
    policies: Any = ocp.training.preservation_policies
    keep: list[Any] = [policies.LatestN(config.keep_last + spare)]
    if config.keep_best:
        lowest: Any = {"get_metric_fn": lambda metrics: metrics["fvu"], "reverse": True}
        keep.append(policies.BestN(**lowest, n=config.keep_best, keep_checkpoints_without_metrics=False))
    return policies.AnyPreservationPolicy(keep)


def _in_saved_dtypes(path: Path, wanted: Any, record: dict[str, Any] | None) -> Any:
    """`wanted` with the dtypes of a checkpoint: the buffer held rows as floats before it held their bits."""
    saved = (ocp.checkpointables_metadata(str(path)).metadata or {}).get(STATE)
    dtypes = {array_checksums.name(where): leaf.dtype for where, leaf in jax.tree_util.tree_leaves_with_path(saved)}
    names = {array_checksums.name(where) for where, _ in jax.tree_util.tree_leaves_with_path(wanted)}
    if record is not None and (wrong := sorted(names ^ record["arrays"].keys())):
        raise UserError(f"{path} does not fit the config of the run: of {', '.join(wrong)} only one of them knows")
    if differing := sorted(names ^ dtypes.keys()):
        raise Damaged(f"of {', '.join(differing)} either it or the config knows nothing")

    def as_saved(where: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        dtype = dtypes.get(array_checksums.name(where), leaf.dtype)
        if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key) or dtype.itemsize != leaf.dtype.itemsize:
            return leaf
        return leaf.update(dtype=dtype)

    return jax.tree_util.tree_map_with_path(as_saved, wanted)


def _bits_as(saved: jax.Array, wanted: jax.ShapeDtypeStruct) -> jax.Array:
    return saved if saved.dtype == wanted.dtype else jax.lax.bitcast_convert_type(saved, wanted.dtype)
