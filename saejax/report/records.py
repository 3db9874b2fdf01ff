"""Reader of a run directory's files for reports. A missing file is not an error.

First step of a report: run directory -> Run -> page.py (one run) or sweep.py (many runs).
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from saejax.errors import UserError
from saejax.fields import paths
from saejax.storage import json_yaml

_MARKS = ("config.yaml", "metrics.jsonl", "run.json", "eval.json", "train.log", ".hydra")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """Content of one run directory, as plain Python values; missing parts are empty."""

    path: Path
    """The directory."""
    config: dict[str, Any]
    """config.yaml, nested."""
    rows: list[dict[str, Any]]
    """metrics.jsonl, one dict a line, in the order of the file."""
    evaluation: dict[str, Any]
    """eval.json: "metrics", "arrays", "definitions", "data"; empty before `saejax evaluate`."""
    record: dict[str, Any]
    """run.json: versions, device, commit, seeds, source fingerprint, speed."""
    problems: tuple[str, ...]
    """One sentence for every file that is there but could not be read."""

    def metric(self, name: str) -> float | None:
        """Best known value: of the evaluation, the run's record, last held out, last in training."""
        for value in (self.evaluation.get("metrics", {}).get(name), self.record.get(name)):
            if value is not None and is_number(value):
                return float(value)
        return _first(self.last(f"eval/{name}"), self.last(f"train/{name}"))

    def last(self, key: str) -> float | None:
        """Last logged value of `key`, or None."""
        for row in reversed(self.rows):
            if is_number(row.get(key)):
                return float(row[key])
        return None


def is_run(path: Path) -> bool:
    """Returns whether a directory holds at least one file that only runs leave behind."""
    return path.is_dir() and any((path / mark).exists() for mark in _MARKS)


def read(path: str | Path) -> Run:
    """Reads a run directory; absent files leave their field empty, broken ones are named in `problems`.

    Raises:
      UserError: `path` is no directory, or holds none of the files of a run.
    """
    path = paths.local(path, "run")
    if not path.is_dir():
        raise UserError(f"run={path}: no such directory")
    if not is_run(path):
        raise UserError(f"run={path}: no run directory (none of {', '.join(_MARKS[:4])} in it)")
    problems: list[str] = []
    evaluation = _read_mapping(path / "eval.json", json_yaml.read_json, problems)
    for part in [key for key, value in evaluation.items() if not isinstance(value, dict)]:
        problems.append(f"eval.json: {json_yaml.one_line(part)} is no mapping")
        del evaluation[part]
    if other := evaluation.get("data", {}).get("other_data"):
        problems.append(f"eval.json: measured on other data than the run was trained on ({json_yaml.one_line(other)})")
    return Run(
        path=path,
        config=_read_mapping(path / "config.yaml", json_yaml.read_yaml, problems),
        rows=_read_rows(path / "metrics.jsonl", problems),
        evaluation=evaluation,
        record=_read_mapping(path / "run.json", json_yaml.read_json, problems),
        problems=tuple(problems),
    )


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Flattens nested dicts to dotted keys; lists stay values.

    Examples:
      >>> flatten({"sae": {"type": "topk", "k": 32}, "seed": 0})
      {'sae.type': 'topk', 'sae.k': 32, 'seed': 0}
    """
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def shown(tree: Any) -> dict[str, Any]:
    """As `flatten`, for a page that others may read: without the folders of this machine."""
    return flatten(paths.unplaced(tree))


def is_number(value: Any) -> bool:
    """Returns whether a value read from JSON is a finite number (a bool is not)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def _first(*values: float | None) -> float | None:
    return next((v for v in values if v is not None), None)


def _read_mapping(path: Path, parse: Callable[[Path], dict[str, Any]], problems: list[str]) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return parse(path)
    except (UserError, OSError) as error:
        problems.append(f"{path.name} could not be read: {str(error).removeprefix(f'{path}: ')}")
        return {}


def _read_rows(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    """Reads whole lines; a run that was killed leaves a broken last one."""
    if not path.exists():
        return []
    if not path.is_file():
        problems.append(f"{path.name} is not a plain file")
        return []
    rows, broken = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append({key: value for key, value in row.items() if is_number(value)})
        elif line.strip():
            broken += 1
    if broken:
        problems.append(f"{path.name}: {broken} broken line{'s' * (broken > 1)} skipped")
    return rows
