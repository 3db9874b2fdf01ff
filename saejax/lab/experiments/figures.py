"""Figure style of all experiments: readable in black and white, with units on the axes.

Every series differs in marker and dash as well as in colour (the palette of Okabe and Ito, safe for colour-blind
readers). Only `matplotlib.figure.Figure` is used, so there is no window system and no global state. Besides the
experiments only this module imports matplotlib.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from saejax.errors import UserError
from saejax.storage import atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1)), (0, (5, 1, 1, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (8, 3)))
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "++")


def check() -> None:
    """Refuse to begin what ends in a figure that cannot be drawn.

    Raises:
      UserError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("figures need matplotlib: pip install 'saejax[experiments]'")


def new(n_rows: int = 1, n_columns: int = 1, *, width: float = 4.2, height: float = 3.2) -> tuple[Figure, list[Axes]]:
    """An empty figure.

    Args:
      n_rows, n_columns: its grid.
      width, height: of one panel, in inches.

    Returns:
      The figure and its axes, row by row.

    Raises:
      UserError: matplotlib is not installed.
    """
    check()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * n_columns, height * n_rows), layout="constrained")
    grid = np.ravel(figure.subplots(n_rows, n_columns, squeeze=False)).tolist()
    for ax in grid:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25, linewidth=0.6)
        ax.set_axisbelow(True)
    return figure, grid


def line(
    ax: Axes,
    x: Any,
    y: Any,
    index: int,
    label: str = "",
    *,
    spread: Any = None,
    marker: bool = True,
    **kwargs: Any,
) -> None:
    """One series: colour, marker and dash number `index`.

    Args:
      ax: where.
      x, y: [n] each.
      index: which style; any integer from 0.
      label: in the legend; empty leaves it out.
      spread: half-height of error bars, [n] or [2, n].
      marker: False draws a plain curve, for closed forms.
      kwargs: to matplotlib's `errorbar`.
    """
    style: dict[str, Any] = {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": DASHES[index % len(DASHES)],
        "marker": MARKERS[index % len(MARKERS)] if marker else None,
        "markersize": 4,
        "linewidth": 1.4,
        "capsize": 2,
        "label": label or "_",
    }
    ax.errorbar(np.asarray(x), np.asarray(y), yerr=spread, **(style | kwargs))


def bars(ax: Axes, names: Sequence[str], values: Any, *, spread: Any = None, series: Sequence[str] = ()) -> None:
    """Bars with their values written on them; several series differ in hatch.

    Args:
      ax: where.
      names: of the groups, n.
      values: [n], or [n_series, n].
      spread: half-height of error bars, of the shape of `values`.
      series: names of the series for the legend.
    """
    grid = np.atleast_2d(np.asarray(values, float))
    errors = None if spread is None else np.atleast_2d(np.asarray(spread, float))
    width = 0.8 / len(grid)
    for i, row in enumerate(grid):
        at = np.arange(len(names)) + (i - (len(grid) - 1) / 2) * width
        label = series[i] if i < len(series) else "_"
        drawn = ax.bar(
            at,
            row,
            width,
            color=COLOURS[i % len(COLOURS)],
            alpha=0.75,
            edgecolor="black",
            hatch=HATCHES[i % len(HATCHES)],
            label=label,
            yerr=None if errors is None else errors[i],
            capsize=2,
        )
        ax.bar_label(
            drawn, fmt="%.3g", fontsize=7, padding=2, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6}
        )
    ax.set_xticks(np.arange(len(names)), names)


def reference(ax: Axes, y: float, label: str) -> None:
    """A thin horizontal line with its name at the right: a level of chance, a threshold, an oracle."""
    ax.axhline(y, color="0.35", linewidth=0.9, linestyle=(0, (2, 2)))
    ax.annotate(label, (1, y), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=7, color="0.25")


def finish(ax: Axes, *, x: str, y: str, title: str = "", legend: bool = False) -> None:
    """Names of the axes, with units, the title and the legend."""
    ax.set_xlabel(x, fontsize=9)
    ax.set_ylabel(y, fontsize=9)
    ax.tick_params(labelsize=8)
    if title:
        ax.set_title(title, fontsize=9, loc="left")
    if legend:
        ax.legend(fontsize=7, frameon=False)


def save(figure: Figure, path: Path) -> None:
    """Write `path`.png (150 dots per inch) and `path`.svg, the same bytes for the same figure."""
    from matplotlib import rc_context

    with rc_context({"svg.hashsalt": "saejax", "svg.fonttype": "none"}):
        with atomic.opened(path.with_suffix(".png")) as file:
            figure.savefig(file, format="png", dpi=150, metadata={"Software": None})
        with atomic.opened(path.with_suffix(".svg")) as file:
            figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
