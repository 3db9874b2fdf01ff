"""Where measured values go: a JSONL file always, Weights & Biases when asked, behind one `log(step, values)`.

The only file that knows wandb.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import logging
import math
from pathlib import Path
from typing import Any

from saejax.errors import UserError

logger = logging.getLogger(__name__)


class WandbMode(enum.Enum):
    """How wandb runs; `offline` needs no login."""

    online = "online"
    offline = "offline"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrackerConfig:
    """Who is told about a run. metrics.jsonl is always written."""

    wandb: bool = False
    """Whether the run is logged to Weights & Biases as well."""
    project: str = "saejax"
    """W&B project."""
    entity: str | None = None
    """W&B team or user; null takes the default of the login."""
    group: str | None = None
    """W&B group, say the name of a sweep."""
    mode: WandbMode = WandbMode.online
    """online or offline."""


class Tracker:
    """One open log of one run.

    Args:
      run_dir: where metrics.jsonl lies; appended to, so that a resumed run is one curve.
      config: see `TrackerConfig`.
      run_config: the whole resolved config, shown by W&B.
      start_step: on resume, lines after this step are dropped first: the run writes them again.
      enabled: False logs nothing; for processes other than the first.
    """

    def __init__(
        self,
        run_dir: Path,
        config: TrackerConfig,
        run_config: dict[str, Any],
        start_step: int = 0,
        enabled: bool = True,
    ) -> None:
        path = run_dir / "metrics.jsonl"
        self._file = self._wandb = None
        if enabled:
            _drop_lines_after(path, start_step)
            self._file = path.open("a", encoding="utf-8", buffering=1)
            self._wandb = _start_wandb(config, run_config, run_dir) if config.wandb else None

    def log(self, step: int, values: dict[str, float]) -> None:
        """Write one line.

        Args:
          step: optimiser steps taken.
          values: finite or not; JSON has no NaN, so non-finite values are written as null.
        """
        line = {"step": step} | {k: (v if math.isfinite(v) else None) for k, v in values.items()}
        if self._file is not None:
            self._file.write(json.dumps(line) + "\n")
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def close(self) -> None:
        """Flush and close; W&B runs of a sweep share a process, so each must be finished."""
        if self._file is not None:
            self._file.close()
        if self._wandb is not None:
            self._wandb.finish()


def read(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; a last line cut off by a crash is left out."""
    lines = []
    for text in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            logger.warning("metrics.jsonl: skipped a broken line")
    return lines


def _drop_lines_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = [line for line in read(path.parent) if line["step"] <= step] if step else []
    temporary = path.with_suffix(".jsonl.tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    temporary.replace(path)


def _start_wandb(config: TrackerConfig, run_config: dict[str, Any], run_dir: Path) -> Any:
    try:
        import wandb
    except ImportError:
        raise UserError("tracker.wandb=true needs wandb: pip install 'saejax[wandb]'") from None
    id_file = run_dir / "wandb_id"
    run_id = id_file.read_text().strip() if id_file.exists() else None
    try:
        run = wandb.init(
            project=config.project,
            entity=config.entity,
            group=config.group,
            mode=config.mode.value,
            config=run_config,
            dir=str(run_dir),
            id=run_id,
            resume="allow" if run_id else None,
            reinit="create_new",  # members of an ensemble are open at once
            settings=wandb.Settings(init_timeout=30),
        )
    except Exception as error:  # wandb raises many kinds; a run must not die for want of its dashboard
        logger.warning("W&B could not start (%s); going on with metrics.jsonl", str(error).splitlines()[0])
        return None
    id_file.write_text(run.id)
    return run
