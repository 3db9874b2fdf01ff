"""HTML page of a sweep: a table of all runs, and sparsity against faithfulness.

It reads each run through records.py. Failed and missing runs are listed, never hidden.
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
from saejax.evals import knee
from saejax.fields import paths
from saejax.report import page, plot, records
from saejax.storage import atomic

_METRICS = ("fvu", "l0", "dead_share", "recovered_zero", "delta_ce", "mcc", "tokens_per_second")
_SPARSITY = ("sae.k", "sae.l1_coef", "sae.l0_coef")
"""Knobs that move a run along its curve; runs that differ only in these and in the seed form one group."""
_PLACES = ("dir", "path", "run", "name", "resume", "saejax_version")
"""Last parts of config keys that name a run's place or name, not its settings."""
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
    knee: bool


@dataclasses.dataclass(frozen=True)
class Knee:
    """Knee of the trade-off of one group of runs."""

    label: str
    run: int
    l0: float
    low: float
    high: float

    def __str__(self) -> str:
        around = f" (95% interval {plot.human(self.low)} to {plot.human(self.high)})"
        return f"l0 {plot.human(self.l0)}{around if np.isfinite(self.low) else ''}"


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The runs of a sweep compared: what differs, which are beaten by none, where each curve bends."""

    root: Path
    runs: list[records.Run]
    keys: list[str]
    groups: "_Groups"
    points: list[tuple[float | None, float | None]]
    front: set[int]
    knees: list[Knee]


def read_sweep(sweep_dir: str | Path) -> Sweep:
    """Reads and compares the runs of a sweep.

    Args:
      sweep_dir: Directory with run directories in it, up to three levels down.

    Raises:
      UserError: no such directory, or no run in it.
    """
    root = paths.local(sweep_dir, "sweep")
    runs = [records.read(path) for path in find(root)]
    keys = differing([records.flatten(r.config) for r in runs])
    groups = _groups(runs, keys)
    points = [(r.metric("l0"), r.metric("fvu")) if status(r) != "failed" else (None, None) for r in runs]
    return Sweep(root, runs, keys, groups, points, pareto(points), knees(points, groups))


def build_sweep(sweep_dir: str | Path | Sweep, *, out: str | Path | None = None) -> Path:
    """Writes the page of a sweep.

    Args:
      sweep_dir: Directory of the sweep, or what `read_sweep` made of it.
      out: Where to write; None is sweep.html in the directory.

    Returns:
      The file that was written.

    Raises:
      UserError: no such directory, or no run in it.
    """
    found = sweep_dir if isinstance(sweep_dir, Sweep) else read_sweep(sweep_dir)
    target = paths.local(out, "out") if out is not None else found.root / "sweep.html"
    rows = _rows(found, target.parent)
    shown = [m for i, m in enumerate(_METRICS) if any(row.metrics[i] is not None for row in rows)]
    html = page.environment().get_template("sweep.html").render(
        title=found.root.resolve().name,
        made=datetime.datetime.now().astimezone().strftime("%d %B %Y, %H:%M"),
        keys=found.keys,
        columns=[(i, m) for i, m in enumerate(_METRICS) if m in shown],
        rows=rows,
        legend=found.groups.labels,
        knees=[(knee, rows[knee.run].name) for knee in found.knees],
        chart=_chart(rows, found.points),
        sources=sorted({row.source for row in rows if row.source}),
    )  # fmt: skip
    target.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(target, html)
    return target


def text(found: Sweep) -> str:
    """The comparison for a terminal: a line for each run, the front, and the knee of each curve."""
    rows = _rows(found, found.root)
    table = [["run", "status", *found.keys, "l0", "fvu", ""]]
    for row, (l0, fvu) in zip(rows, found.points, strict=True):
        marks = ["front"] * row.front + ["knee"] * row.knee
        figures = ["-" if value is None else plot.human(value) for value in (l0, fvu)]
        table.append([row.name, row.status, *row.settings, *figures, ", ".join(marks)])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    return "\n".join(lines + [f"knee of {k.label}: run {rows[k.run].name}, {k}" for k in found.knees])


def knees(points: Sequence[tuple[float | None, float | None]], groups: "_Groups") -> list[Knee]:
    """The knee of (log l0, fvu) in every group that has three different l0 and a knee at all."""
    found = []
    for number, label in enumerate(groups.labels):
        known = [
            (n, x, y)
            for n, ((x, y), group) in enumerate(zip(points, groups.of_run, strict=True))
            if group == number and x is not None and y is not None and x > 0
        ]
        if len({x for _, x, _ in known}) < 3:
            continue
        bend = knee.knee(np.log([x for _, x, _ in known]), np.array([y for _, _, y in known]))
        if bend["knee_index"] >= 0:
            run, l0, _ = known[int(bend["knee_index"])]
            low, high = float(np.exp(bend["knee_x_low"])), float(np.exp(bend["knee_x_high"]))
            found.append(Knee(label, run, l0, low, high))
    return found


def find(root: Path) -> list[Path]:
    """Run directories below `root` in natural order, each once, also through links; none inside a run is looked for.

    Raises:
      UserError: no such directory, or no run in it.
    """
    if not root.is_dir():
        raise UserError(f"sweep={root}: no such directory")
    found: list[Path] = []
    links: list[tuple[Path, int]] = []
    seen: set[str] = set()
    top = os.path.realpath(root)

    def visit(folder: Path, depth: int) -> None:
        if (real := os.path.realpath(folder)) in seen:
            return
        seen.add(real)
        if depth and records.is_run(folder):
            found.append(folder)
        elif depth < _DEPTH:
            for child in sorted(folder.iterdir()):
                if child.is_symlink():
                    links.append((child, depth + 1))
                elif child.is_dir() and not child.name.startswith("."):
                    visit(child, depth + 1)

    visit(root, 0)
    while links:  # after all that is really there, which keeps its own name
        link, depth = links.pop(0)
        around = os.path.commonpath([top, os.path.realpath(link)]) == os.path.realpath(link)
        if link.is_dir() and not link.name.startswith(".") and not around:
            visit(link, depth)
    if not found:
        raise UserError(f"sweep={root}: no run directory in it (none holds config.yaml, metrics.jsonl or run.json)")
    return sorted(found, key=lambda p: [(not s.isdigit(), int(s) if s.isdigit() else 0, s) for s in p.parts])


def status(found: records.Run) -> str:
    """Progress of a run.

    Returns:
      "failed" (no metric at all, or not finite in an ensemble), "evaluated" (eval.json is there), "trained" (it ended),
      "stopped" (by a signal) or "unfinished" (it runs still, or broke off).
    """
    if found.evaluation.get("metrics"):
        return "evaluated"
    if not found.rows or "failed" in found.record:
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

    Examples:
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
    groups = [tuple((k, _setting(c.get(k))) for k in kept if k in c) for c in flat]
    order = list(dict.fromkeys(groups))
    labels = [", ".join(f"{k}={paths.unplaced(value)}" for k, value in group) or "all runs" for group in order]
    return _Groups(labels, [order.index(group) for group in groups])


def _rows(found: Sweep, base: Path) -> list[Row]:
    bends = {bend.run for bend in found.knees}
    return [
        _row(run, found.keys, base, group, n in found.front, n in bends)
        for n, (run, group) in enumerate(zip(found.runs, found.groups.of_run, strict=True))
    ]


def _row(found: records.Run, keys: Sequence[str], base: Path, group: int, front: bool, knee: bool) -> Row:
    flat = records.shown(found.config)
    state = status(found)
    failed = state == "failed"
    link = found.path / "report.html"
    return Row(
        name=found.path.name,
        link=quote(Path(os.path.relpath(link, base)).as_posix()) if link.exists() else None,
        status=state,
        settings=[_setting(flat[key]) if key in flat else "" for key in keys],
        metrics=[None if failed else found.metric(name) for name in _METRICS],
        source={"evaluated": "eval.json", "failed": ""}.get(state, "last logged values"),
        group=group,
        front=front,
        knee=knee,
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


def _setting(value: Any) -> str:
    return plot.human(value) if isinstance(value, float) else str(value)
