"""Checkpoint reading: the steps in a directory, their arrays for analysis, and whether each matches its record."""

from __future__ import annotations

import errno
import json
import re
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from saejax.errors import UserError
from saejax.fields import paths
from saejax.parallel import processes
from saejax.storage import atomic, checkpoint_record
from saejax.storage.checkpoint_record import Damaged, Owner

STATE, LOADER, RECORD = "state", "loader", "record"
"""Parts of a checkpoint."""


def steps(run_dir: Path) -> list[int]:
    """Steps of the complete checkpoints of a run, ascending; remains of a killed save do not count.

    Raises:
      UserError: a name that looks like a step and is none.
    """
    root = run_dir / "checkpoints"
    found = []
    for path in sorted(root.iterdir()) if root.is_dir() else ():
        if re.fullmatch("0|[1-9][0-9]*", path.name, re.ASCII) and path.is_dir():
            found.append(int(path.name))
        elif path.name.isdigit():
            raise UserError(f"{path} is not a saejax checkpoint: move it out of {root}")
    return sorted(found)


def load_arrays(
    run_dir: Path, names: tuple[str, ...], step: int | None = None, owner: Owner | None = None
) -> tuple[int, dict[str, Any]]:
    """Read some fields of the saved state onto one device, as nested dicts, without the training code's config.

    Args:
      run_dir: a run directory.
      names: fields of `TrainState`, say ("params", "normalizer").
      step: which checkpoint; None takes the newest.
      owner: the run that it must be of; None takes any.

    Returns:
      (step, field -> nested dict of arrays).

    Raises:
      UserError: there is no such checkpoint, it lacks a field, is damaged or of another run.
    """
    run_dir = paths.local(run_dir, "run_dir")
    root, there = run_dir / "checkpoints", steps(run_dir)
    if not there:
        raise UserError(f"no checkpoint in {root}: has the run saved yet?")
    if step is not None and step not in there:
        raise UserError(f"step={step}: {root} holds {', '.join(map(str, there))}")
    chosen = there[-1] if step is None else step
    path = root / str(chosen)
    try:
        return chosen, _load_fields(path, chosen, names, owner)
    except Exception as error:  # a cut-off file surfaces as one of many kinds
        if not is_damage(error):
            raise
        again = paths.typed("resume", run_dir)
        raise UserError(f"{path} is broken ({reason(error)}); saejax train {again} goes back before it") from error


def read_record(run_dir: Path, step: int | None = None) -> dict[str, Any] | None:
    """The record of a checkpoint, as `checkpoint_record.make` wrote it; None where it has none or cannot be read.

    Args:
      run_dir: a run directory.
      step: which checkpoint; None takes the newest.
    """
    run_dir = paths.local(run_dir, "run_dir")
    there = steps(run_dir)
    chosen = step if step is not None else there[-1] if there else None
    if chosen is None or chosen not in there:
        return None
    try:
        with alone():
            return _parsed(run_dir / "checkpoints" / str(chosen))
    except Exception as error:
        if not is_damage(error):
            raise
        return None


def check_newest(run_dir: Path, owner: Owner) -> None:
    """Refuse a run whose newest checkpoint is of another run or step, before anything slow; damage is told later.

    Raises:
      UserError: as from `checkpoint_record.check_owner`.
    """
    for step in steps(run_dir)[-1:]:
        path = run_dir / "checkpoints" / str(step)
        try:
            with alone():
                checkpoint_record.check_owner(_parsed(path), path, step, owner)
        except Exception as error:
            if not is_damage(error):
                raise


def _load_fields(path: Path, step: int, names: tuple[str, ...], owner: Owner | None) -> dict[str, Any]:
    atomic.check_readable(path)
    with alone():
        record = checked_record(path, step, owner)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    found = (ocp.checkpointables_metadata(str(path)).metadata or {}).get(STATE)
    if found is None:
        raise Damaged("its metadata cannot be read")
    missing = [name for name in names if name not in found]
    if missing:
        raise UserError(f"{path} holds {', '.join(found)}; {', '.join(missing)} is missing")
    wanted = {name: found[name] for name in names}
    wanted = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=device), wanted)
    with alone(partial_load=True):
        fields = ocp.load_checkpointables(str(path), {STATE: wanted})[STATE]
    checkpoint_record.compare(record, fields)
    return fields


def alone(partial_load: bool = False) -> Any:
    """A context in which this process reads without waiting for others: damage may be seen by one of them only."""
    context = ocp.Context()
    context.pytree.loading.partial_load = partial_load
    if processes.several():
        number, options = jax.process_index(), context.multiprocessing
        options.primary_host, options.active_processes, options.barrier_sync_key_prefix = number, {number}, f"{number}"
    return context


def _parsed(path: Path) -> dict[str, Any] | None:
    """The record of a checkpoint, None where there is none."""
    if not (path / RECORD).exists():
        return None
    return checkpoint_record.parse(ocp.load_checkpointables(str(path), {RECORD: None})[RECORD], path)


def checked_record(path: Path, step: int, owner: Owner | None) -> dict[str, Any] | None:
    """The record of a checkpoint that is what its place says; None of one of format 1.

    Raises:
      UserError: it is of another step or run, or of a newer saejax.
      Damaged: it is not as it was written.
    """
    record = _parsed(path)
    checkpoint_record.check_owner(record, path, step, owner)
    if record is not None and record["format_version"] >= 3:
        _check_metadata(path, record)
    return record


def _check_metadata(path: Path, record: dict[str, Any]) -> None:
    """Orbax's notes beside the arrays: the parts, how to read each, when it wrote them, and the rank of the save.

    No checksum covers this file, so each word is compared with the others. The times must follow each other; nothing
    depends on them.
    """
    noted = json.loads((path / "_CHECKPOINT_METADATA").read_text(encoding="utf-8"))
    handlers = dict(noted.get("item_handlers", {}))
    trees = {str(handlers.pop(name, None)) for name in (STATE, LOADER, RECORD)}  # all are written by one handler
    begun, done = (noted.get(f"{name}_timestamp_nsecs") for name in ("init", "commit"))
    if (
        not noted.keys() >= _NOTED
        or len(trees) > 1
        or handlers != ({} if record["fvu"] is None else {"metrics": _ranking(trees.pop(), handlers.get("metrics"))})
        or not (isinstance(begun, int) and isinstance(done, int) and 0 < begun <= done)
    ):
        raise Damaged("_CHECKPOINT_METADATA is not that of the save")
    if record["fvu"] is not None:
        ranked = json.loads((path / "metrics" / "metrics").read_text(encoding="utf-8"))  # Orbax reads it by no name
        if json.dumps(ranked) != json.dumps({"fvu": record["fvu"]}):  # as text, where NaN is NaN
            raise Damaged("its fvu is not that of the save")


_NOTED = {"item_handlers", "metrics", "performance_metrics", "custom_metadata"}
_TREES, _RANKS = "pytree_handler.PyTreeHandler", "json_handler.MetricsHandler"


def _ranking(trees: str, found: object) -> object:
    """Name of the handler that goes with that of trees; what was found where a version of Orbax names them anew."""
    return trees.removesuffix(_TREES) + _RANKS if trees.endswith(_TREES) else found or Damaged


def is_damage(error: Exception) -> bool:
    """Whether what ended a reading speaks of the files, and not of the machine or of a mistake."""
    if isinstance(error, (UserError, MemoryError, PermissionError)):
        return False
    if isinstance(error, OSError):
        return error.errno in (None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
    return "RESOURCE_EXHAUSTED" not in str(error)


def reason(error: BaseException) -> str:
    """The first line of an error, and of what was at its root."""
    root = error
    while (deeper := root.__cause__ or root.__context__) is not None:
        root = deeper
    said = [(str(e).splitlines() or [type(e).__name__])[0][:200] for e in (error, root)]
    return said[0] if said[1] in said[0] else ": ".join(said)
