"""A directory of runs -> one HTML page: a table of all runs and sparsity against faithfulness.

Beside page.py; reads each run through records.py. Failed and missing runs are listed, never hidden.
"""

import dataclasses
import datetime
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from markupsafe import Markup

from saejax.errors import UserError
from saejax.report import page, plot, records

_METRICS = ("fvu", "l0", "dead_share", "recovered_zero", "delta_ce", "mcc", "tokens_per_second")
_SPARSITY = ("sae.k", "sae.l1_coef")
"""Knobs that move a run along its curve; runs that differ only in these and in the seed form one group."""
_PLACES = ("dir", "path", "run", "name", "resume")
"""Last parts of config keys that say where or as what a run was written, not what it was."""
_DEPTH = 3


@dataclasses.dataclass(frozen=True)
class Row:
    """One run in the table."""

    name: str
    link: str | None
    status: str
    settings: list[str]
    metrics: list[float | None]
    source: str
    group: int
    front: bool


def build_sweep(sweep_dir: str | Path, *, out: str | Path | None = None) -> Path:
    """Writes the page of a sweep.

    Args:
      sweep_dir: Directory with run directories in it, up to three levels down.
      out: Where to write; None is sweep.html in `sweep_dir`.

    Returns:
      The file that was written.

    Raises:
      UserError: no such directory, or no run in it.
    """
    root = Path(sweep_dir)
    runs = [records.read(path) for path in find(root)]
    target = Path(out) if out is not None else root / "sweep.html"
    keys = differing([records.flatten(r.config) for r in runs])
    groups = _groups(runs, keys)
    points = [(r.metric("l0"), r.metric("fvu")) if status(r) != "failed" else (None, None) for r in runs]
    front = pareto(points)
    rows = [
        _row(r, keys, target.parent, group, n in front)
        for n, (r, group) in enumerate(zip(runs, groups.of_run, strict=True))
    ]
    shown = [m for i, m in enumerate(_METRICS) if any(row.metrics[i] is not None for row in rows)]
    html = page.environment().get_template("sweep.html").render(
        title=root.resolve().name,
        made=datetime.datetime.now().astimezone().strftime("%d %B %Y, %H:%M"),
        keys=keys,
        columns=[(i, m) for i, m in enumerate(_METRICS) if m in shown],
        rows=rows,
        legend=groups.labels,
        chart=_chart(rows, points),
        sources=sorted({row.source for row in rows if row.source}),
    )  # fmt: skip
    target.write_text(html, encoding="utf-8")
    return target


def find(root: Path) -> list[Path]:
    """Run directories below `root` in natural order; a run inside a run is not looked for.

    Raises:
      UserError: no such directory, or no run in it.
    """
    if not root.is_dir():
        raise UserError(f"sweep={root}: no such directory")
    found: list[Path] = []

    def walk(folder: Path, depth: int) -> None:
        for child in sorted(folder.iterdir()):
            if not child.is_dir() or child.name.startswith("."):
                continue
            if records.is_run(child):
                found.append(child)
            elif depth < _DEPTH:
                walk(child, depth + 1)

    walk(root, 1)
    if not found:
        raise UserError(f"sweep={root}: no run directory in it (none holds config.yaml, metrics.jsonl or run.json)")
    return sorted(found, key=lambda p: [(not s.isdigit(), int(s) if s.isdigit() else 0, s) for s in p.parts])


def status(found: records.Run) -> str:
    """How far a run came.

    Returns:
      "failed" (no metric at all), "evaluated" (eval.json is there), "trained" (it ended), "stopped" (by a signal) or
      "unfinished" (it runs still, or broke off).
    """
    if found.evaluation.get("metrics"):
        return "evaluated"
    if not found.rows:
        return "failed"
    if "finished" not in found.record:
        return "unfinished"
    return "trained" if found.record["finished"] else "stopped"


def differing(configs: Sequence[dict[str, Any]]) -> list[str]:
    """Flat config keys whose values differ among the runs that have a config, without names and places."""
    configs = [c for c in configs if c]
    keys = dict.fromkeys(key for c in configs for key in c if key.split(".")[-1] not in _PLACES)
    return [key for key in keys if len({repr(c.get(key)) for c in configs}) > 1]


def pareto(points: Sequence[tuple[float | None, float | None]]) -> set[int]:
    """Indices of the points that no other point beats: not larger in both values and smaller in one.

    Example:
      >>> sorted(pareto([(16, 0.3), (32, 0.2), (32, 0.25), (None, 0.1), (64, 0.2)]))
      [0, 1]
    """
    known = [(n, x, y) for n, (x, y) in enumerate(points) if x is not None and y is not None]
    front, best = set(), np.inf
    for n, x, y in sorted(known, key=lambda p: (p[1], p[2])):
        twin = any(m in front and (x, y) == (a, b) for m, a, b in known)
        if y < best or twin:
            front.add(n)
            best = y
    return front


@dataclasses.dataclass(frozen=True)
class _Groups:
    labels: list[str]
    of_run: list[int]


def _groups(runs: Sequence[records.Run], keys: Sequence[str]) -> _Groups:
    """Runs that differ only in their sparsity and seed share a colour."""
    kept = [k for k in keys if k not in _SPARSITY and k.split(".")[-1] != "seed"]
    flat = [records.flatten(r.config) for r in runs]
    labels = [", ".join(f"{k}={_text(c.get(k))}" for k in kept if k in c) or "all runs" for c in flat]
    order = list(dict.fromkeys(labels))
    return _Groups(order, [order.index(label) for label in labels])


def _row(found: records.Run, keys: Sequence[str], base: Path, group: int, front: bool) -> Row:
    flat = records.flatten(found.config)
    state = status(found)
    failed = state == "failed"
    link = found.path / "report.html"
    return Row(
        name=found.path.name,
        link=quote(Path(os.path.relpath(link, base)).as_posix()) if link.exists() else None,
        status=state,
        settings=[_text(flat[key]) if key in flat else "" for key in keys],
        metrics=[None if failed else found.metric(name) for name in _METRICS],
        source={"evaluated": "eval.json", "failed": ""}.get(state, "last logged values"),
        group=group,
        front=front,
    )


def _chart(rows: Sequence[Row], points: Sequence[tuple[float | None, float | None]]) -> Markup | None:
    marks = [
        plot.Point(x, y, row.group, f"{row.name}: l0 {plot.human(x)}, fvu {plot.human(y)}", row.front)
        for row, (x, y) in zip(rows, points, strict=True)
        if x is not None and y is not None
    ]
    if not marks:
        return None
    return plot.scatter(marks, title="Sparsity against faithfulness", x_label="l0 →", y_label="↑ fvu")


def _text(value: Any) -> str:
    return plot.human(value) if isinstance(value, float) else str(value)
