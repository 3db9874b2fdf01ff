"""Inline SVG charts that take their colours from the page: sharp at any size, light or dark.

page.py and sweep.py call it. A series' colour is the CSS variable --s0, --s1, ...; every text is escaped.
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup, escape

from saejax.report import curves

_W, _H = 380, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 10, 40


@dataclasses.dataclass(frozen=True)
class _Axis:
    """Maps data to pixels between two ends; logarithmic on demand."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self._scale(self.low), self._scale(self.high)
        return self.start + (self._scale(value) - low) / ((high - low) or 1.0) * (self.stop - self.start)

    def _scale(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def ticks(self) -> list[float]:
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            steps = (1,) if len(powers) > 5 else (1, 2, 5)
            marks = [m * 10.0**p for p in powers for m in steps]
            return [m for m in marks if self.low <= m <= self.high]
        step = _nice_step((self.high - self.low) / 4)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [n * step for n in range(first, last + 1)]


def line_chart(panel: curves.Panel, *, x_label: str) -> Markup:
    """Draws the series of one panel with a band from the lowest to the highest value of each stretch."""
    x_all = np.concatenate([s.x for s in panel.series])
    low = min(float(s.low.min()) for s in panel.series)
    high = max(float(s.high.max()) for s in panel.series)
    x = _Axis(float(x_all.min()), float(x_all.max()), _LEFT, _W - _RIGHT)
    y = _Axis(*_padded(low, high, panel.log_y), _H - _BOTTOM, _TOP, panel.log_y)
    body, data = [_grid(x, y, x_label, "")], []
    for series in panel.series:
        colour = 0 if series.label == "training" else 1
        points = [(x(a), y(b)) for a, b in zip(series.x, series.y, strict=True)]
        upper = [(x(a), y(b)) for a, b in zip(series.x, series.high, strict=True)]
        lower = [(x(a), y(b)) for a, b in zip(series.x, series.low, strict=True)]
        if np.any(series.high > series.low):
            body.append(Markup('<path class="band c{}" d="{}Z"/>').format(colour, _path(upper + lower[::-1])))
        body.append(Markup('<path class="line c{}" d="{}"/>').format(colour, _path(points)))
        if len(points) <= 40:
            body += [_dot(px, py, 2.4, f"c{colour}") for px, py in points]
        data.append({"label": series.label, "points": _readout(series, x)})
    return _svg(body, panel.title, data=data)


def histogram(
    edges: npt.ArrayLike,
    layers: Sequence[tuple[str, npt.ArrayLike]],
    *,
    title: str,
    x_label: str,
    y_label: str = "latents",
) -> Markup:
    """Draws histograms that share bins: the first as bars, the others as outlines.

    Args:
      edges: Bin edges, one more than bins.
      layers: (label, counts) each.
      title: What a screen reader says.
      x_label: Under the axis.
      y_label: What is counted.
    """
    edges = np.asarray(edges, float)
    heights = [(label, np.asarray(counts, float)) for label, counts in layers]
    top = max([1.0, *(float(counts.max()) for _, counts in heights)])
    x = _Axis(float(edges[0]), float(edges[-1]), _LEFT, _W - _RIGHT)
    y = _Axis(0.0, top * 1.05, _H - _BOTTOM, _TOP)
    body = [_grid(x, y, x_label, y_label)]
    for number, (label, counts) in enumerate(heights):
        if number == 0:
            body += [
                _bar(x(a), x(b), y(c), y(0), f"{label}: {human(c)} in {human(a)} to {human(b)}")
                for a, b, c in zip(edges[:-1], edges[1:], counts, strict=True)
                if c
            ]
        else:
            steps = [(x(edges[0]), y(0))]
            for a, b, c in zip(edges[:-1], edges[1:], counts, strict=True):
                steps += [(x(a), y(c)), (x(b), y(c))]
            steps.append((x(edges[-1]), y(0)))
            body.append(Markup('<path class="line c{}" d="{}"/>').format(number, _path(steps)))
    return _svg(body, title)


@dataclasses.dataclass(frozen=True)
class Point:
    """One mark of a scatter chart."""

    x: float
    y: float
    group: int
    note: str
    front: bool = False


def scatter(points: Sequence[Point], *, title: str, x_label: str, y_label: str) -> Markup:
    """Draws points coloured by group; those of the front are ringed and joined."""
    x_log = _spans(p.x for p in points)
    x = _Axis(*_padded(min(p.x for p in points), max(p.x for p in points), x_log), _LEFT, _W - _RIGHT, x_log)
    y = _Axis(*_padded(min(p.y for p in points), max(p.y for p in points), False), _H - _BOTTOM, _TOP)
    body = [_grid(x, y, x_label, y_label)]
    front = sorted((p.x, p.y) for p in points if p.front)
    if len(front) > 1:
        body.append(Markup('<path class="front" d="{}"/>').format(_path([(x(a), y(b)) for a, b in front])))
    for p in points:
        ring = " ring" if p.front else ""
        body.append(_dot(x(p.x), y(p.y), 3.6, f"c{p.group % 6}{ring}", p.note))
    return _svg(body, title)


def human(value: float, digits: int = 4) -> str:
    """Formats a number for people: `digits` significant digits, k and M for large ones.

    Examples:
      >>> human(0.23456), human(1_250_000), human(32), human(0.0000123)
      ('0.2346', '1.25M', '32', '1.23e-05')
    """
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    for bound, unit in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if size >= bound:
            return f"{value / (1e3 if unit == 'k' else bound):.3g}{unit}"
    if value == int(value):
        return str(int(value))
    return f"{value:.2e}" if size < 1e-4 else f"{value:.{digits}g}"


def _grid(x: _Axis, y: _Axis, x_label: str, y_label: str) -> Markup:
    parts = []
    for tick in y.ticks():
        parts.append(
            Markup('<path class="grid" d="M{} {:.1f}H{}"/><text class="ty" x="{}" y="{:.1f}">{}</text>').format(
                _LEFT, y(tick), _W - _RIGHT, _LEFT - 7, y(tick) + 4, human(tick)
            )
        )
    for tick in x.ticks():
        parts.append(
            Markup('<text class="tx" x="{:.1f}" y="{}">{}</text>').format(x(tick), _H - _BOTTOM + 17, human(tick))
        )
    parts.append(Markup('<path class="axis" d="M{} {}H{}"/>').format(_LEFT, _H - _BOTTOM, _W - _RIGHT))
    parts.append(Markup('<text class="lx" x="{}" y="{}">{}</text>').format(_W - _RIGHT, _H - 5, x_label))
    if y_label:
        parts.append(Markup('<text class="ly" x="{}" y="{}">{}</text>').format(_LEFT, _H - 5, y_label))
    return Markup("").join(parts)


def _svg(body: Sequence[Markup], title: str, *, data: Any = None) -> Markup:
    extra = Markup(' data-series="{}"').format(json.dumps(data)) if data else Markup("")
    head = Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}"{}>').format(_W, _H, title, extra)
    return head + Markup("").join(body) + Markup("</svg>")


def _readout(series: curves.Series, x: _Axis) -> list[list[Any]]:
    """Readout under the pointer for the page's script: pixel, x and y as text."""
    return [[round(x(a), 1), human(a), human(b)] for a, b in zip(series.x, series.y, strict=True)]


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in points)


def _dot(x: float, y: float, radius: float, style: str, note: str = "") -> Markup:
    title = Markup("<title>{}</title>").format(note) if note else ""
    return Markup('<circle class="dot {}" cx="{:.1f}" cy="{:.1f}" r="{}">{}</circle>').format(
        style, x, y, radius, title
    )


def _bar(left: float, right: float, top: float, bottom: float, note: str) -> Markup:
    width = max(right - left - 0.8, 0.5)
    return Markup(
        '<rect class="bar" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"><title>{}</title></rect>'
    ).format(left + 0.4, top, width, max(bottom - top, 0.8), escape(note))


def _padded(low: float, high: float, log: bool) -> tuple[float, float]:
    if log:
        return low / 1.15, high * 1.15
    pad = 0.07 * (high - low) or 0.1 * abs(high) or 1.0
    return (0.0 if 0 <= low < 0.35 * high else low - pad), high + pad


def _spans(values: Iterable[float]) -> bool:
    values = list(values)
    return min(values) > 0 and max(values) / min(values) > 3


def _nice_step(raw: float) -> float:
    if raw <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(raw))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw)
