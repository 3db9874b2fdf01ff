"""State of a run directory: empty, begun, finished, or another run's; who may write there, and as which run.

The same command line continues after a preemption, a crash or a failed point of a sweep. A finished run is left alone,
a checkpoint is continued, and a directory of another run is refused: `decide` alone says so, for every command. `take`
also refuses a directory in which another process is at work.
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
from saejax.training import ensemble_config

logger = logging.getLogger(__name__)


class Stage(enum.Enum):
    """How far the run in a directory has come."""

    empty = enum.auto()
    """No complete checkpoint."""
    begun = enum.auto()
    """Checkpoints, and steps left to do."""
    finished = enum.auto()
    """The newest checkpoint is of the last step, and run.json says so."""
    failed = enum.auto()
    """A member of an ensemble that was not finite."""
    ensemble = enum.auto()
    """Members of an ensemble, which have directories of their own."""


class Request(enum.Enum):
    """What somebody asks of a run directory."""

    new = enum.auto()
    """A run that begins: `run.train(cfg, run_dir)`."""
    same = enum.auto()
    """The run of this very config, wherever it stands: the same command line again, a job of a sweep."""
    resume = enum.auto()
    """The run that is there, with overrides: `resume=RUN_DIR`."""
    member = enum.auto()
    """As `same`, of an ensemble or a folded sweep."""
    member_resume = enum.auto()
    """As `resume`, of an ensemble."""


class Action(enum.Enum):
    """What happens to a run."""

    start = "starts"
    go_on = "goes on"
    skip = "is finished already"
    leave_out = "is left out"


@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
    """A run directory as a config finds it."""

    stage: Stage
    """How far it has come."""
    step: int | None
    """Optimiser steps of its newest complete checkpoint, None without one."""
    record: dict[str, Any]
    """What run.json says."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decision:
    """What happens to a run, and where it stands."""

    action: Action
    """What happens."""
    state: State
    """Where it stood before."""

    def __str__(self) -> str:
        return self.action.value + (f" at step {self.state.step}" if self.state.step else "")


def look(cfg: config.Config, run_dir: Path) -> State:
    """How far the run of a config has come in a directory: what checkpoints and run.json say together.

    Args:
      cfg: says how many steps the run has.
      run_dir: may be missing.
    """
    saved, said = checkpoint.steps(run_dir), record(run_dir)
    step = saved[-1] if saved else None
    if "failed" in said:
        stage = Stage.failed
    elif step is None:
        stage = Stage.ensemble if (run_dir / "members").is_dir() else Stage.empty
    else:
        done = said.get("finished") is True and said.get("step") == step == cfg.train.n_steps
        stage = Stage.finished if done else Stage.begun
    return State(stage=stage, step=step, record=said)


def decide(cfg: config.Config, run_dir: Path, request: Request) -> Decision:
    """Whether a run starts, goes on or is left alone; the same in all processes.

    Args:
      cfg: the run that is wanted, or an ensemble.
      run_dir: may be missing.
      request: as what it is wanted.

    Raises:
      UserError: the directory holds something that the request must not touch, or nothing to go on with.
    """
    with processes.alike():
        state = look(cfg, run_dir)
        found = (_of_ensemble if cfg.ensemble.points else _of_run)(cfg, run_dir, state, request)
    return Decision(action=Action[processes.gather(found.name)[0]], state=state)


def _of_run(cfg: config.Config, run_dir: Path, state: State, request: Request) -> Action:
    """The policy for one run, or one member of an ensemble."""
    again = paths.typed("resume", run_dir)
    if state.stage is Stage.ensemble:
        raise UserError(f"{run_dir} holds an ensemble: continue it with {again}, or take another directory")
    left_out = state.stage is Stage.failed and request in (Request.member, Request.member_resume)
    if state.step is None:
        if request is Request.resume:
            check_resumable(config.from_run(run_dir), cfg)
            raise UserError(f"no checkpoint in {run_dir / 'checkpoints'}: start the run anew")
        return Action.leave_out if left_out else Action.start
    if request is Request.new:
        raise UserError(f"{run_dir} already holds checkpoints: continue with {again}, or take another directory")
    there = config.from_run(run_dir)
    if request in (Request.resume, Request.member_resume):
        check_resumable(there, cfg)
    else:
        for key, (before, now) in changed(there, cfg).items():
            raise UserError(
                f"{run_dir} already holds checkpoints of another run: {key} is {before} there, got {now}; take "
                f"another directory, or continue that run: {again}"
            )
    if left_out:
        return Action.leave_out
    return Action.skip if state.stage is Stage.finished and request is not Request.resume else Action.go_on


def _of_ensemble(cfg: config.Config, run_dir: Path, state: State, request: Request) -> Action:
    """The policy for an ensemble as a whole: config.yaml alone says which one lies there, and it may grow."""
    if (run_dir / "config.yaml").is_file():
        there = config.from_run(run_dir)
        if request is Request.resume:
            check_resumable(there, cfg)
        before, now = (set(ensemble_config.members(c)) for c in (there, cfg))
        if request is not Request.resume and not before <= now:
            raise UserError(f"{run_dir} holds another ensemble, with {min(before - now)}; take another directory")
    if state.step is not None:
        raise UserError(f"{run_dir} already holds checkpoints of one run: take another directory for an ensemble")
    return Action.start if state.stage is Stage.empty else Action.go_on


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
    decide(cfg, run_dir, Request.resume if resume else Request.new)
    with processes.alike():
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
                raise UserError(f"{differs}; a run continues only with the same data, wherever they are")
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
