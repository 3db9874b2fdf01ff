"""Record of a checkpoint: its step, its run, and a checksum of every array.

A checkpoint that was renamed, linked, copied from elsewhere or damaged loads without an error. The record reveals it:
it names the format, the step, the run, the run's config and its data. Every read of arrays compares it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saejax.errors import UserError
from saejax.storage import array_checksums
from saejax.storage.version import VERSION

logger = logging.getLogger(__name__)

FORMAT_VERSION = 3
"""Of what a checkpoint holds. 1 had no record; the record of 2 did not say of which step and run it was."""


class Damaged(Exception):
    """Mismatch between the data read and the data written."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Owner:
    """The run that checkpoints belong to."""

    run_id: str | None
    """Of its config.yaml; None of runs of older versions."""
    config: Mapping[str, Any]
    """Flat key -> value, of all that says which run it is."""
    fixed: frozenset[str]
    """Keys of `config` that never change in the life of a run."""
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Fingerprint and identity of its activations; empty where nobody asked."""
    older_up_to_step: int = -1
    """Checkpoints up to this step are of an older saejax, and may lack what records say now."""


def make(step: int, state: Any, loader: dict[str, Any], fvu: float | None, owner: Owner | None) -> dict[str, Any]:
    """The record of a state that is about to be saved.

    Args:
      step: optimiser steps taken.
      state: the arrays.
      loader: position of the loader, JSON.
      fvu: held-out fvu that the save is ranked by, None without one.
      owner: the run, None outside of one.
    """
    run = owner and {"id": owner.run_id, "config": dict(owner.config), "data": dict(owner.data)}
    body = {
        "format_version": FORMAT_VERSION,
        "saejax_version": VERSION,
        "step": step,
        "fvu": fvu,
        "run": run,
        "arrays": array_checksums.of(state),
        "loader_sha256": sha256(loader),
    }
    body = json.loads(json.dumps(body))  # tuples become lists, as they will read back
    return {"json": json.dumps(body | {"sha256": sha256(body)})}


def parse(saved: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The original record, from its saved form.

    Args:
      saved: as from `make`; of format 2 the fields themselves.
      path: of the checkpoint, for messages.

    Raises:
      Damaged: it does not match its own checksum.
      UserError: it was written by a newer saejax.
    """
    try:
        body = json.loads(saved["json"]) if "json" in saved else dict(saved)
        if body.pop("sha256", None) != sha256(body):
            raise Damaged("its record does not match its own checksum")
        version, writer = int(body["format_version"]), str(body["saejax_version"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise Damaged(f"its record cannot be read ({error})") from error
    if version > FORMAT_VERSION:
        raise UserError(
            f"{path} was written by saejax {writer} in format {version}; this is {VERSION}, which "
            f"reads formats up to {FORMAT_VERSION}: install a newer one"
        )
    if writer != VERSION:
        logger.info("%s was written by saejax %s, this is %s", path, writer, VERSION)
    return body


def check_owner(record: Mapping[str, Any] | None, path: Path, step: int, owner: Owner | None) -> None:
    """Refuse a checkpoint of another step, another run, or of a config that is not the run's any more.

    Args:
      record: from `parse`; None where the checkpoint has none.
      path: of the checkpoint.
      step: that the name of its folder says.
      owner: the run that it lies in; None where any run will do.

    Raises:
      Damaged: it says less than its format promises.
      UserError: it is whole, but not what its place says.
    """
    older = owner is None or owner.run_id is None or step <= owner.older_up_to_step
    if record is None or record["format_version"] < FORMAT_VERSION:
        if not older:
            raise Damaged("its record is missing" if record is None else "its record is of an older format")
        if record is None:
            logger.warning("%s is of format 1, without checksums: it cannot be checked", path)
        return
    if record["step"] != step:
        raise UserError(f"{path} holds step {record['step']}, not {step}: was it renamed or linked? put it back")
    if owner is None:
        return
    run = record["run"] or {}
    if run.get("id") != owner.run_id:
        raise UserError(f"{path} is of another run ({run.get('id')}, this is {owner.run_id}): take it away")
    now = json.loads(json.dumps(dict(owner.config)))
    for key in sorted(owner.fixed):
        before, value = run["config"].get(key), now.get(key)
        if before != value:
            raise UserError(
                f"{key} is {value}, but {path} was trained with {before}: put it back in config.yaml of the run"
            )


def changes(record: Mapping[str, Any] | None, owner: Owner) -> dict[str, tuple[Any, Any]]:
    """Keys of the config that a run goes on with in another value -> (value at the checkpoint, value now)."""
    if record is None or not record.get("run"):
        return {}
    before, now = record["run"]["config"], json.loads(json.dumps(dict(owner.config)))
    return {k: (before.get(k), now.get(k)) for k in sorted(before.keys() | now.keys()) if before.get(k) != now.get(k)}


def compare(record: Mapping[str, Any] | None, fields: Any, loader: dict[str, Any] | None = None) -> None:
    """Refuse arrays that differ from the saved ones.

    Raises:
      Damaged: an array or the loader's position is not.
    """
    if record is None:
        return
    if wrong := array_checksums.differences(record["arrays"], array_checksums.of(fields)):
        raise Damaged(f"{', '.join(wrong)}: the checksum is not that of the save")
    if loader is not None and sha256(loader) != record["loader_sha256"]:
        raise Damaged("the loader's position: the checksum is not that of the save")


def sha256(plain: Mapping[str, Any]) -> str:
    """Hash of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
