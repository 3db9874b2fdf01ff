"""Panels of training curves from metrics.jsonl: one per quantity, with training and held-out series.

Second step of a report: Run.rows -> panels -> plot.line_chart.
"""

import dataclasses
import math
from typing import Any

import numpy as np

from saejax.report import records

_MAX_POINTS = 240
"""Points that one curve keeps: more than a screen shows, few enough for a light file."""

MAIN = {
    "loss": ("Loss", "Training objective, all terms, on normalised activations."),
    "fvu": ("Fraction of variance unexplained", "0 is perfect, 1 is no better than the mean."),
    "l0": ("Active latents per token", "L0: how many latents are not zero."),
    "dead_share": ("Dead latents", "Share silent for the configured span of training; held out: on all rows."),
    "tokens_per_second": ("Tokens per second", "Throughput of the whole loop."),
}
"""The quantities that everyone looks at first, in this order: name in the log -> title, note."""


@dataclasses.dataclass(frozen=True)
class Series:
    """One curve, thinned: the mean of each stretch with its lowest and highest value."""

    label: str
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclasses.dataclass(frozen=True)
class Panel:
    """One chart: a quantity and its series."""

    name: str
    title: str
    note: str
    series: list[Series]
    log_y: bool


def panels(rows: list[dict[str, Any]]) -> tuple[list[Panel], list[Panel]]:
    """Groups logged values by quantity.

    Args:
      rows: Lines of metrics.jsonl with keys "train/<name>", "eval/<name>", "step", "tokens".

    Returns:
      The panels of MAIN that have data, and the panels of everything else that was logged, by name.
    """
    names = {key.split("/", 1)[1] for row in rows for key in row if "/" in key}
    found = {name: _panel(rows, name) for name in names}
    shown = [found[n] for n in MAIN if n in found and found[n].series]
    others = [found[n] for n in sorted(names - set(MAIN)) if found[n].series]
    return shown, others


def x_name(rows: list[dict[str, Any]]) -> str:
    """Name of the horizontal axis: tokens where they are logged, else steps."""
    return "tokens" if any("tokens" in row for row in rows) else "step"


def _panel(rows: list[dict[str, Any]], name: str) -> Panel:
    axis, tokens_per_step = x_name(rows), _tokens_per_step(rows)
    series = []
    for part, label in (("train", "training"), ("eval", "held out")):
        points = [
            (row[axis] if axis in row else row["step"] * tokens_per_step, row[f"{part}/{name}"])
            for row in rows
            if records.is_number(row.get(f"{part}/{name}")) and (axis in row or "step" in row)
        ]
        if points:
            series.append(_thin(label, *np.asarray(sorted(points), float).T))
    title, note = MAIN.get(name, (name.replace("_", " "), ""))
    return Panel(name, title, note, series, log_y=name != "tokens_per_second" and _wants_log(series))


def _tokens_per_step(rows: list[dict[str, Any]]) -> float:
    """Places held-out values, which are logged by step alone, among the tokens; every step has as many."""
    for row in reversed(rows):
        if row.get("step") and records.is_number(row.get("tokens")):
            return row["tokens"] / row["step"]
    return 1.0


def _thin(label: str, x: np.ndarray, y: np.ndarray) -> Series:
    groups = np.array_split(np.arange(len(x)), min(len(x), _MAX_POINTS))
    pick = [[f(v[g]) for g in groups] for f, v in ((np.mean, x), (np.mean, y), (np.min, y), (np.max, y))]
    return Series(label, *(np.asarray(p) for p in pick))


def _wants_log(series: list[Series]) -> bool:
    """Log scale where values span more than a factor of 30: the early fall would flatten the rest."""
    if not series:
        return False
    low, high = min(s.low.min() for s in series), max(s.high.max() for s in series)
    return low > 0 and math.log10(high / low) > 1.5
