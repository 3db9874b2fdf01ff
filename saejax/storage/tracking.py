"""Metric logging: always to a JSONL file, on request to Weights & Biases, through one `log(step, values)`.

No other file knows wandb.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import errno
import importlib.util
import json
import logging
import math
import os
import queue
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from saejax.errors import UserError
from saejax.fields.resume_policy import Place
from saejax.storage import atomic

logger = logging.getLogger(__name__)

START_SECONDS, FINISH_SECONDS = 20.0, 60.0
"""Seconds that W&B may take to start, and again to send the rest at the end."""


class WandbMode(enum.Enum):
    """Mode of wandb; `offline` needs no login."""

    online = "online"
    offline = "offline"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrackerConfig:
    """Receivers of a run's metrics. metrics.jsonl is always written."""

    wandb: Place[bool] = False
    """Whether the run is logged to Weights & Biases as well."""
    project: Place[str] = "saejax"
    """W&B project."""
    entity: Place[str | None] = None
    """W&B team or user; null takes the default of the login."""
    group: Place[str | None] = None
    """W&B group, say the name of a sweep."""
    mode: Place[WandbMode] = WandbMode.online
    """online or offline."""


def check(config: TrackerConfig) -> None:
    """Refuse a tracker that is not installed or cannot be imported, before anything is compiled for it.

    Raises:
      UserError: says what to install, or what came of the import.
    """
    if not config.wandb or sys.modules.get("wandb") is not None:
        return
    found = importlib.util.find_spec("wandb")
    if found is None or found.origin is None:  # a folder wandb/, which wandb leaves wherever it runs, is no package
        raise UserError("tracker.wandb=true needs wandb: pip install 'saejax[wandb]'")
    try:
        importlib.import_module("wandb")
    except Exception as error:  # whatever a package does that half of it is missing, or that another one is too old for
        said = (str(error).splitlines() or [repr(error)])[0]
        raise UserError(f"tracker.wandb=true needs wandb, and {found.origin} cannot be imported ({said})") from error


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
        self._path, self._waiting = path, b""
        self._file = self._wandb = None
        if enabled:
            _drop_lines_after(path, start_step)
            self._file = atomic.appended(path)
            self._wandb = _start_wandb(config, run_config, run_dir) if config.wandb else None

    def log(self, step: int, values: dict[str, float]) -> None:
        """Write one line; a full disk or a failing W&B is reported once and stops nothing.

        Args:
          step: optimiser steps taken.
          values: finite or not; JSON has no NaN, so non-finite values are written as null.
        """
        line = {"step": step} | {k: (v if math.isfinite(v) else None) for k, v in values.items()}
        if self._file is not None:
            self._write((json.dumps(line) + "\n").encode())
        self._tell_wandb(lambda run: run.log(values, step=step))

    def close(self) -> None:
        """Flush and close; W&B runs of a sweep share a process, so each must be finished."""
        if self._file is not None:
            if self._waiting:
                self._write(b"")
            if self._waiting:
                logger.error("%s lacks its last %d lines", self._path, self._waiting.count(b"\n"))
            self._file.close()
        self._tell_wandb(lambda run: _within(FINISH_SECONDS + 10, run.finish))

    def _write(self, line: bytes) -> None:
        """Append whole lines; those that the disk does not take wait for the next one."""
        assert self._file is not None
        failed_before, self._waiting = bool(self._waiting), self._waiting + line
        end = self._file.seek(0, os.SEEK_END)
        try:
            if self._file.write(self._waiting) < len(self._waiting):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._waiting = b""
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(end)
            if not failed_before:
                logger.error(
                    "METRICS NOT WRITTEN to %s: %s. Training continues; the lines are kept and tried again",
                    *(self._path, error.strerror),
                )

    def _tell_wandb(self, what: Callable[[Any], None]) -> None:
        """A run must not die for want of its dashboard: the first failure is the last call."""
        if self._wandb is None:
            return
        try:
            what(self._wandb)
        except Exception as error:  # of many kinds
            said = (str(error).splitlines() or [repr(error)])[0]
            logger.error("W&B failed (%s); continuing with metrics.jsonl", said)
            self._wandb = None


def _within(seconds: float, work: Callable[[], None]) -> None:
    """Run a call that may hang in a daemon thread, and raise its error."""
    outcome: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def do() -> None:
        try:
            work()
        except BaseException as error:
            outcome.put(error)
        else:
            outcome.put(None)

    threading.Thread(target=do, daemon=True).start()
    try:
        error = outcome.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"not finished after {seconds:g} s") from None
    if error is not None:
        raise error


def read(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; a last line cut off by a crash is left out."""
    lines = []
    atomic.check_file(run_dir / "metrics.jsonl")
    for text in (run_dir / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
        else:
            logger.warning("metrics.jsonl: skipped a broken line")
    return lines


def _drop_lines_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = [line for line in read(path.parent) if line["step"] <= step] if step else []
    atomic.write(path, "".join(json.dumps(line) + "\n" for line in kept))


def _start_wandb(config: TrackerConfig, run_config: dict[str, Any], run_dir: Path) -> Any:
    check(config)
    import wandb

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
            settings=wandb.Settings(init_timeout=START_SECONDS, finish_timeout=FINISH_SECONDS),
        )
    except Exception as error:  # wandb raises many kinds; a run must not die for want of its dashboard
        said = (str(error).splitlines() or [repr(error)])[0]
        logger.warning("W&B could not start (%s); continuing with metrics.jsonl", said)
        return None
    with contextlib.suppress(OSError):  # then a resumed run is a new one there
        atomic.write(id_file, run.id)
    return run
