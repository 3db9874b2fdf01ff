"""What a run directory holds when a command line comes to it: nothing yet, a part of the run, or all of it.

The same command line is the way to go on, after a preemption, a crash or a failed point of a sweep. What is finished
is left alone, what has a checkpoint goes on from it, and a directory that holds another run is refused.
"""

from __future__ import annotations

import dataclasses
import enum
from pathlib import Path
from typing import Any

from saejax import checkpoint, config, plain
from saejax.errors import UserError

MAY_DIFFER = ("mesh.", "checkpoint.", "tracker.", "source.path", "source.verify", "source.skip_damaged")
"""How config keys begin that say where and how a run is worked on, not which run it is."""


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
    for key, (before, now) in config.changed(config.from_run(run_dir), cfg).items():
        if not key.startswith(MAY_DIFFER):
            raise UserError(
                f"{run_dir} holds checkpoints already, of another run: {key} is {before} there, got {now}; take "
                f"another directory, or go on with that run: resume={run_dir}"
            )
    record = _record(run_dir)
    done = record.get("finished") is True and record.get("step") == steps[-1] == cfg.train.n_steps
    return Found(standing=Standing.finished if done else Standing.unfinished, step=steps[-1])


def objective(run_dir: Path, direction: Any) -> float | tuple[float, float] | None:
    """What a sweeper that searches is told about a finished run.

    Args:
      run_dir: of the run.
      direction: of the sweeper's config; None where it does not search, a list of two where it searches on both axes.

    Returns:
      Held-out fvu; (l0, fvu) for two directions; None where nothing is searched or known.
    """
    measured = _record(run_dir).get("evaluation")
    if direction is None or not isinstance(measured, dict):
        return None
    l0, fvu = measured.get("l0"), measured.get("fvu")
    if not isinstance(l0, float) or not isinstance(fvu, float):
        return None
    return fvu if isinstance(direction, (str, enum.Enum)) or len(direction) != 2 else (l0, fvu)


def _record(run_dir: Path) -> dict[str, Any]:
    try:
        return plain.read_json(run_dir / "run.json")
    except (OSError, UserError):
        return {}
