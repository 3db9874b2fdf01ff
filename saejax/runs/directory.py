"""State of a run directory: new, begun, finished, or another run's; who may write there, and as which run.

The same command line continues after a preemption, a crash or a failed point of a sweep. A finished run is left alone,
a checkpoint is continued, and a directory of another run is refused. So is one in which another process is at work.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import json
import logging
import time
import uuid
from pathlib import Path
from typing import Any

from saejax import config
from saejax.activations.source import ActivationSource
from saejax.errors import UserError
from saejax.fields import paths, resume_policy
from saejax.fields.resume_policy import Policy
from saejax.parallel import processes
from saejax.storage import atomic, checkpoint, checkpoint_record, json_yaml, lock

logger = logging.getLogger(__name__)


class Standing(enum.Enum):
    """How far a run directory has come."""

    new = "starts"
    unfinished = "goes on"
    finished = "is finished already"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """A run directory as a command line finds it."""

    standing: Standing
    """How far it has come."""
    step: int = 0
    """Optimiser steps of its newest checkpoint, 0 without one."""

    def __str__(self) -> str:
        return self.standing.value + (f" at step {self.step}" if self.step else "")


def look(cfg: config.Config, run_dir: Path) -> Found:
    """How far the run of a config has come in a directory.

    Args:
      cfg: the run that is wanted.
      run_dir: may be missing.

    Returns:
      See `Found`. A run without a complete checkpoint starts anew.

    Raises:
      UserError: checkpoints of another run are there.
    """
    steps = checkpoint.steps(run_dir)
    if not steps:
        return Found(standing=Standing.new)
    for key, (before, now) in changed(config.from_run(run_dir), cfg).items():
        raise UserError(
            f"{run_dir} holds checkpoints already, of another run: {key} is {before} there, got {now}; take "
            f"another directory, or go on with that run: {paths.typed('resume', run_dir)}"
        )
    found = record(run_dir)
    done = found.get("finished") is True and found.get("step") == steps[-1] == cfg.train.n_steps
    return Found(standing=Standing.finished if done else Standing.unfinished, step=steps[-1])


def definition(cfg: config.Config) -> dict[str, Any]:
    """All that says which run it is, flat: every key and value but those of place (`saejax.fields.resume_policy`)."""
    policies, values = resume_policy.of(cfg), config.flat(config.to_plain(cfg))
    return {key: value for key, value in values.items() if policies[key] is not Policy.place}


def fixed(cfg: config.Config) -> frozenset[str]:
    """The keys that never change in the life of a run."""
    return frozenset(key for key, policy in resume_policy.of(cfg).items() if policy is Policy.fixed)


def changed(before: config.Config, now: config.Config) -> dict[str, tuple[Any, Any]]:
    """Keys of `definition` in which two configs differ -> (value before, value now), None where a key is not there."""
    old, new = definition(before), definition(now)
    return {k: (old.get(k), new.get(k)) for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)}


def check_resumable(before: config.Config, now: config.Config) -> None:
    """Refuse overrides under which a run would not be the same run any more.

    Args:
      before: config in the run directory.
      now: the same with overrides on top.

    Raises:
      UserError: a fixed key was changed.
    """
    known = fixed(before) | fixed(now)
    for key, (old, new) in changed(before, now).items():
        if key in known:
            raise UserError(f"{key} cannot change on resume: the run has {old}, got {new}")


def take(cfg: config.Config, run_dir: Path, resume: bool, stack: contextlib.ExitStack) -> checkpoint_record.Owner:
    """Hold a run directory alone until `stack` closes, and say whose checkpoints are in it from now on.

    Args:
      cfg: the run.
      run_dir: absolute; made where missing.
      resume: whether the run goes on.
      stack: releases the directory, after all that is closed before.

    Raises:
      UserError: another process works there; another run is there, or none to go on with.
    """
    if resume:
        config.from_run(run_dir)  # before a lock makes a folder of a path that was mistyped
    with processes.alike():
        if processes.first():
            stack.enter_context(lock.hold(run_dir, "saejax train", again=True))
            atomic.remove_left(run_dir, ("config.yaml", "run.json", "metrics.jsonl"))
        check_run_dir(cfg, run_dir, resume)
        for name in ("config.yaml", "run.json", "metrics.jsonl"):
            atomic.check_file(run_dir / name)  # written at the end, refused before the work
    stamp = json_yaml.read_run(run_dir)[1] if resume else json_yaml.Stamp()
    if stamp.run_id is None:  # new, or of an older version
        newest = checkpoint.steps(run_dir)[-1:] if resume else []
        stamp = json_yaml.Stamp(uuid.uuid4().hex, newest[0] if newest else -1)
    run_id, older = json.loads(processes.gather(json.dumps([stamp.run_id, stamp.older_up_to_step]))[0])
    owner = checkpoint_record.Owner(
        run_id=run_id,
        config=definition(cfg),
        fixed=fixed(cfg),
        data={"fingerprint": cfg.source.fingerprint(), "identity": cfg.source.identity()},
        older_up_to_step=older,
    )
    if resume:
        with processes.alike():
            checkpoint.check_newest(run_dir, owner)
            if differs := data_differ(run_dir, cfg.source):
                raise UserError(f"{differs}; going on needs the same data, wherever they lie")
    return owner


def begin(cfg: config.Config, run_dir: Path, owner: checkpoint_record.Owner, step: int) -> None:
    """Write config.yaml for the part of a run that begins, and say in what it differs from the part before.

    Where no step is left to do, nothing is written: the run stays the one that its own command line names.

    Args:
      cfg: the run.
      run_dir: its directory.
      owner: from `take`.
      step: at which it goes on, 0 for a new one.
    """
    if step >= cfg.train.n_steps:
        return
    saved = checkpoint.read_record(run_dir, step) if step else None  # by all processes: Orbax counts what each one does
    if not processes.first():
        return
    if step:
        older = saved is None or not saved.get("run")
        changes = changed(config.from_run(run_dir), cfg) if older else checkpoint_record.changes(saved, owner)
        for key, (old, new) in changes.items():
            logger.info("from step %d on %s is %s, it was %s", step, key, new, old)
        if changes:
            line = {"step": step, "at": now(), "changed": changes}
            with atomic.appended(run_dir / "changes.jsonl") as file:
                file.write((json.dumps(line) + "\n").encode())
    write_config(cfg, run_dir, json_yaml.Stamp(owner.run_id, owner.older_up_to_step))


def data_of(run_dir: Path, step: int | None = None) -> dict[str, Any]:
    """The data that a run was trained on, as its checkpoint says; nothing of them is read.

    Args:
      run_dir: its directory.
      step: of the checkpoint; None takes the newest.

    Returns:
      "fingerprint" for people, and "identity" for comparisons; of older versions the fingerprint in run.json, or
      nothing.
    """
    saved = checkpoint.read_record(run_dir, step)
    if saved is not None and saved.get("run"):
        return saved["run"]["data"]
    said = record(run_dir).get("source")
    return {"fingerprint": said} if isinstance(said, dict) else {}


def data_differ(run_dir: Path, source: ActivationSource, step: int | None = None) -> str | None:
    """Compares data with those that a run was trained on.

    Args:
      run_dir: its directory.
      source: what is there now.
      step: of the checkpoint; None takes the newest.

    Returns:
      The start of a message about the difference; None where they are the same, or the run has no record of them.
    """
    saved = data_of(run_dir, step)
    known = saved.get("identity") or saved.get("fingerprint")
    if not isinstance(known, dict):
        logger.warning("%s has no record of its data: whether these are the same cannot be told", run_dir)
        return None
    differs = source.differs_from(known)
    return differs and f"{source.place()} holds other data than {run_dir} was trained on: {differs}"


def check_run_dir(cfg: config.Config, run_dir: Path, resume: bool) -> None:
    """Refuse to write over another run, or to go on with a run as something that it is not."""
    if resume:
        check_resumable(config.from_run(run_dir), cfg)
    elif checkpoint.steps(run_dir):
        again = paths.typed("resume", run_dir)
        raise UserError(f"{run_dir} holds checkpoints already: go on with {again}, or take another directory")


def write_config(cfg: config.Config, run_dir: Path, stamp: json_yaml.Stamp | None = None) -> None:
    """config.yaml, at once or not at all.

    Args:
      cfg: the run.
      run_dir: its directory.
      stamp: names the run in its checkpoints; None where there will be none, as for an ensemble as a whole.
    """
    if processes.first():
        kept = dataclasses.replace(cfg, mesh=cfg.mesh.anywhere())
        atomic.write(run_dir / "config.yaml", config.to_yaml(kept, stamp))


def objective(run_dir: Path, direction: Any) -> float | tuple[float, float] | None:
    """What a sweeper that searches is told about a finished run.

    Args:
      run_dir: of the run.
      direction: of the sweeper's config; None where it does not search, a list of two where it searches on both axes.

    Returns:
      Held-out fvu; (l0, fvu) for two directions; None where nothing is searched or known.
    """
    measured = record(run_dir).get("evaluation")
    if direction is None or not isinstance(measured, dict):
        return None
    l0, fvu = measured.get("l0"), measured.get("fvu")
    if not isinstance(l0, float) or not isinstance(fvu, float):
        return None
    return fvu if isinstance(direction, (str, enum.Enum)) or len(direction) != 2 else (l0, fvu)


def record(run_dir: Path) -> dict[str, Any]:
    """What run.json says; nothing where it is missing or broken."""
    try:
        return json_yaml.read_json(run_dir / "run.json")
    except (OSError, UserError):
        return {}


def now() -> str:
    """The time, UTC, ISO 8601."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
