"""Saving, resuming and reading runs. The only file that knows Orbax.

A checkpoint holds the whole `TrainState` and the position of the loader, so that going on is bit for bit the run
that was never interrupted. It can be restored onto any mesh, and its parameters read on one CPU without a mesh. A
record beside them holds the format's version and a checksum of every array, compared whenever arrays are read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import shutil
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import tensorstore
from orbax.checkpoint import v1 as ocp

from saejax import digest, processes, whole
from saejax.errors import UserError

logger = logging.getLogger(__name__)

_STATE = "state"
_LOADER = "loader"
_RECORD = "record"

TRIES, PAUSE_SECONDS = 3, 10.0
"""Tries to write the last checkpoint of a run, and the time between them, in which a user may make room."""

FORMAT_VERSION = 2
"""Of what a checkpoint holds; 1 had no record, so nothing in it could be compared."""


class _NotOrbax(logging.Filter):
    """Drops asyncio's page of text per read that Orbax left unfinished over a broken file; ours is a line."""

    def filter(self, record: logging.LogRecord) -> bool:
        said = record.getMessage()
        return not any(word in said for word in ("orbax", "tensorstore", "zarr", "OCDBT"))


logging.getLogger("asyncio").addFilter(_NotOrbax())
# Its binding (0.1.86) never frees what it returns, and Orbax asks it twice in every save, for throughput it logs.
tensorstore.experimental_collect_matching_metrics = lambda *_, **__: []


class _Damaged(Exception):
    """What was read is not what was written."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """How often a run is saved and what is kept."""

    save_every_steps: int | None = 1000
    """Steps between two checkpoints; null saves at the end and on interruption only."""
    keep_last: int = 1
    """Newest checkpoints kept; at least 1."""
    keep_best: int = 1
    """Checkpoints of lowest held-out fvu kept beside them; 0 keeps none."""

    def __post_init__(self) -> None:
        if self.save_every_steps is not None and self.save_every_steps < 1:
            raise UserError(f"checkpoint.save_every_steps must be at least 1 or null, got {self.save_every_steps}")
        if self.keep_last < 1:
            raise UserError(f"checkpoint.keep_last must be at least 1, got {self.keep_last}")
        if self.keep_best < 0:
            raise UserError(f"checkpoint.keep_best must be at least 0, got {self.keep_best}")


def steps(run_dir: Path) -> list[int]:
    """Steps of the complete checkpoints of a run, ascending; what a killed save left behind does not count."""
    root = run_dir / "checkpoints"
    return sorted(int(p.name) for p in root.iterdir() if p.name.isdigit()) if root.is_dir() else []


class Checkpoints:
    """The checkpoints of one run directory, written asynchronously.

    Args:
      run_dir: its subdirectory `checkpoints/` is used.
      config: see `CheckpointConfig`.
      spare: newest checkpoints kept beyond what `config` says, until `trim`.
    """

    def __init__(self, run_dir: Path, config: CheckpointConfig, spare: int = 0) -> None:
        self._run_dir, self._config = run_dir, config
        self._keep = _kept(config, spare)
        self._pending: Any = None
        self._error = ""
        self._open()

    def _open(self) -> None:
        self._checkpointer = ocp.training.Checkpointer(
            str((self._run_dir / "checkpoints").absolute()),
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

        A save that fails, say on a full disk, is told loudly at the next one and stops nothing: earlier checkpoints
        stay, and every save is a new try. Whoever must have the last one calls `ensure`.

        Args:
          step: optimiser steps taken.
          state: the `TrainState`.
          loader: position of the loader, JSON.
          fvu: held-out fvu of this very step, None where it was not evaluated.
        """
        self.wait()
        if self.latest_step == step:
            return
        items = {_STATE: state, _LOADER: loader, _RECORD: _record(state, loader)}
        metrics: Any = None if fvu is None else {"fvu": fvu}
        try:
            with processes.alike():
                whole.check_writable(Path(self._checkpointer.directory))  # Orbax would wait for minutes, in threads
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
        self._error, self._pending = _first_line(error), None
        logger.error(
            "CHECKPOINT NOT WRITTEN under %s: %s. Training goes on and the next save tries again; the last complete "
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
        broken = []
        for candidate in candidates:
            try:
                with processes.alike(), _alone(partial_load=True):  # fields that are None now were once not there
                    whole.check_readable(directory / str(candidate))
                    record = _read_record(directory / str(candidate))
                    wanted = _in_saved_dtypes(directory / str(candidate), abstract_state)
                    found = self._checkpointer.load_checkpointables(candidate, {_STATE: wanted, _LOADER: None})
                with processes.alike():
                    _compare(record, found[_STATE], found[_LOADER])
            except UserError:
                raise
            except Exception as error:  # a cut-off file surfaces as one of many kinds
                logger.warning("checkpoint %s cannot be restored (%s)", candidate, _first_line(error))
                broken.append(candidate)
                continue
            self._set_aside(broken)
            return jax.tree.map(_bits_as, found[_STATE], abstract_state), found[_LOADER]
        raise UserError(f"no checkpoint in {directory} can be restored; tried steps {', '.join(map(str, candidates))}")

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
        """Move checkpoints after a step to `checkpoints_ahead/`: the run goes on from there and writes them again."""
        ahead = [number for number in steps(self._run_dir) if number > step]
        self._set_aside(ahead, "checkpoints_ahead")

    def close(self) -> None:
        """Wait for the last save and release Orbax's threads."""
        self.wait(leaving=True)
        self._checkpointer.close()


def _kept(config: CheckpointConfig, spare: int = 0) -> Any:
    """Which checkpoints stay: the newest, and the best of those that were evaluated."""
    policies: Any = ocp.training.preservation_policies
    keep: list[Any] = [policies.LatestN(config.keep_last + spare)]
    if config.keep_best:
        lowest: Any = {"get_metric_fn": lambda metrics: metrics["fvu"], "reverse": True}
        keep.append(policies.BestN(**lowest, n=config.keep_best, keep_checkpoints_without_metrics=False))
    return policies.AnyPreservationPolicy(keep)


def load_arrays(run_dir: Path, names: tuple[str, ...], step: int | None = None) -> tuple[int, dict[str, Any]]:
    """Read some fields of the saved state onto one device, as nested dicts, without the training code's config.

    Args:
      run_dir: a run directory.
      names: fields of `TrainState`, say ("params", "normalizer").
      step: which checkpoint; None takes the newest.

    Returns:
      (step, field -> nested dict of arrays).

    Raises:
      UserError: there is no such checkpoint, it lacks a field or is damaged.
    """
    root, there = run_dir / "checkpoints", steps(run_dir)
    if not there:
        raise UserError(f"no checkpoint in {root}: has the run saved yet?")
    if step is not None and step not in there:
        raise UserError(f"step={step}: {root} holds {', '.join(map(str, there))}")
    chosen = there[-1] if step is None else step
    path = (root / str(chosen)).absolute()
    try:
        return chosen, _load_fields(path, names)
    except UserError:
        raise
    except Exception as error:  # a cut-off file surfaces as one of many kinds
        raise UserError(
            f"{path} is broken ({_first_line(error)}); saejax train resume={run_dir} goes back before it"
        ) from error


def _load_fields(path: Path, names: tuple[str, ...]) -> dict[str, Any]:
    with _alone():
        record = _read_record(path)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    found = (ocp.checkpointables_metadata(str(path)).metadata or {}).get(_STATE)
    if found is None:
        raise _Damaged("its metadata cannot be read")
    missing = [name for name in names if name not in found]
    if missing:
        raise UserError(f"{path} holds {', '.join(found)}; {', '.join(missing)} is missing")
    wanted = {name: found[name] for name in names}
    wanted = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=device), wanted)
    with _alone(partial_load=True):
        fields = ocp.load_checkpointables(str(path), {_STATE: wanted})[_STATE]
    _compare(record, fields)
    return fields


def _alone(partial_load: bool = False) -> Any:
    """A context in which this process reads without waiting for others: damage may be seen by one of them only."""
    context = ocp.Context()
    context.pytree.loading.partial_load = partial_load
    if processes.several():
        number, options = jax.process_index(), context.multiprocessing
        options.primary_host, options.active_processes, options.barrier_sync_key_prefix = number, {number}, f"{number}"
    return context


def _in_saved_dtypes(path: Path, wanted: Any) -> Any:
    """`wanted` with the dtypes of a checkpoint: the buffer held rows as floats before it held their bits."""
    saved = (ocp.checkpointables_metadata(str(path)).metadata or {}).get(_STATE)
    dtypes = {digest.name(where): leaf.dtype for where, leaf in jax.tree_util.tree_leaves_with_path(saved)}
    names = {digest.name(where) for where, _ in jax.tree_util.tree_leaves_with_path(wanted)}
    if differing := sorted(names ^ dtypes.keys()):
        raise _Damaged(f"of {', '.join(differing)} either it or the config knows nothing")

    def as_saved(where: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        dtype = dtypes.get(digest.name(where), leaf.dtype)
        if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key) or dtype.itemsize != leaf.dtype.itemsize:
            return leaf
        return leaf.update(dtype=dtype)

    return jax.tree_util.tree_map_with_path(as_saved, wanted)


def _bits_as(saved: jax.Array, wanted: jax.ShapeDtypeStruct) -> jax.Array:
    return saved if saved.dtype == wanted.dtype else jax.lax.bitcast_convert_type(saved, wanted.dtype)


def _record(state: Any, loader: dict[str, Any]) -> dict[str, Any]:
    """What is written beside a state so that damage and other versions are seen when it is read."""
    body = {
        "format_version": FORMAT_VERSION,
        "saejax_version": metadata.version("saejax"),
        "arrays": digest.of(state),
        "loader_sha256": _sha256(loader),
    }
    return body | {"sha256": _sha256(body)}


def _read_record(path: Path) -> dict[str, Any] | None:
    """The record of a checkpoint; None of one of format 1, which had none.

    Raises:
      UserError: it was written by a newer saejax.
      _Damaged: it is not as it was written.
    """
    if not (path / _RECORD).exists():
        logger.warning("%s is of format 1, without checksums: it cannot be checked", path)
        return None
    record: dict[str, Any] = dict(ocp.load_checkpointables(str(path), {_RECORD: None})[_RECORD])
    if record.pop("sha256", None) != _sha256(record):
        raise _Damaged("its record does not match its own checksum")
    if record["format_version"] > FORMAT_VERSION:
        raise UserError(
            f"{path} was written by saejax {record['saejax_version']} in format {record['format_version']}; "
            f"this is {metadata.version('saejax')}, which reads formats up to {FORMAT_VERSION}: install a newer one"
        )
    if (writer := record["saejax_version"]) != metadata.version("saejax"):
        logger.info("%s was written by saejax %s, this is %s", path, writer, metadata.version("saejax"))
    return record


def _compare(record: dict[str, Any] | None, fields: Any, loader: dict[str, Any] | None = None) -> None:
    """Refuses what was read unless it is what was written.

    Raises:
      _Damaged: an array or the loader's position is not.
    """
    if record is None:
        return
    if wrong := digest.differences(record["arrays"], digest.of(fields)):
        raise _Damaged(f"{', '.join(wrong)}: the checksum is not that of the save")
    if loader is not None and _sha256(loader) != record["loader_sha256"]:
        raise _Damaged("the loader's position: the checksum is not that of the save")


def _sha256(plain: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
