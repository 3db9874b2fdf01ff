"""HTML page of one run directory: a single file that needs no network and no other file.

Last step of a report. It gathers the results of records.py, curves.py, decoder.py and latents.py and renders
templates/run.html. Every value is escaped. Only charts are marked safe, and plot.py escapes their texts.
"""

import datetime
import math
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from saejax.fields import paths
from saejax.report import curves, decoder, latents, plot, records
from saejax.sae import base
from saejax.sae.model import SAE
from saejax.storage import atomic

_FIGURES = {
    "fvu": ("Variance unexplained", "fvu on held-out activations"),
    "l0": ("Active latents", "per token"),
    "dead_share": ("Dead latents", "never fire on the held-out set"),
    "recovered_zero": ("Loss recovered", "against zero ablation"),
    "delta_ce": ("Added cross-entropy", "nats per token, SAE spliced in"),
    "mcc": ("Dictionary MCC", "against the true features"),
    "tokens_per_second": ("Tokens per second", "while training"),
}
"""Key figures of the header, in this order, each shown where it is known."""

_SHARES = {"dead_share", "dense_share", "recovered_zero", "recovered_mean"}
_DENSE = 0.1


def build(
    run_dir: str | Path,
    *,
    sae: SAE | None = None,
    examples: latents.Examples | None = None,
    out: str | Path | None = None,
) -> Path:
    """Writes the report of one run.

    Args:
      run_dir: Run directory; files that are missing leave a note that says which command fills the section.
      sae: The trained SAE, for the geometry of its decoder; None leaves that section with a note.
      examples: What `latents.collect` gathered; None shows latents without text where possible.
      out: Where to write; None is report.html in the run directory.

    Returns:
      The file that was written.

    Raises:
      UserError: `run_dir` is no run directory.
    """
    found = records.read(run_dir)
    rates = _array(found, "firing_rate")
    shown = sae is None or latents.shows(sae)
    if examples is None and sae is not None and shown and rates is not None and len(rates) == sae.sparsifier.d_sae:
        examples = latents.collect(sae, firing_rate=rates)
    main, others = curves.panels(found.rows)
    axis = curves.x_name(found.rows)
    html = environment().get_template("run.html").render(
        run=found,
        title=found.path.resolve().name,
        headline=_headline(found, sae),
        figures=_figures(found),
        made=datetime.datetime.now().astimezone().strftime("%d %B %Y, %H:%M"),
        panels=[(p, plot.line_chart(p, x_label=axis)) for p in main],
        others=[(p, plot.line_chart(p, x_label=axis)) for p in others],
        metrics=_metrics(found),
        densities=_densities(found),
        extremes=_extremes(rates),
        gain=_gain(found),
        cosine=_cosine(sae),
        examples=examples,
        not_shown=None if sae is None or shown else sae.sparsifier.family.name,
        config=records.shown(found.config) if found.config else {},
        record=records.shown(found.record) if found.record else {},
        evaluated_on=records.shown(found.evaluation.get("data", {})),
        commands=_commands(found.path),
    )  # fmt: skip
    target = paths.local(out, "out") if out is not None else found.path / "report.html"
    target.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(target, html)
    return target


def environment() -> jinja2.Environment:
    """Templates with escaping on and every missing name an error."""
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters |= {"human": _human, "brief": _brief, "share": _share, "visible": _visible, "shade": _shade}
    return env


def _headline(found: records.Run, sae: SAE | None) -> str:
    """One line about the run: architecture, width, sparsity, hook, tokens."""
    flat = records.shown(found.config)
    kind = flat.get("sae.type") or (sae.sparsifier.name if sae is not None else None)
    known = base.ARCHITECTURES.get(str(kind))
    parts = [str(kind) if known is None else known.__name__] if kind else []
    for key, text in (("d_sae", "{} latents"), ("k", "k = {}"), ("l1_coef", "λ = {}")):
        value = flat.get(f"sae.{key}", getattr(sae.sparsifier, key, None) if sae is not None else None)
        if value is not None:
            parts.append(text.format(f"{value:,}" if isinstance(value, int) else value))
    known = records.shown(found.record) | (records.shown(dict(sae.provenance)) if sae is not None else {})
    for key in ("source.model.name", "hook", "source.hook"):
        if known.get(key) and str(known[key]) not in parts:
            parts.append(str(known[key]))
    tokens = found.last("tokens")
    if tokens:
        parts.append(f"{plot.human(tokens)} tokens")
    return " · ".join(parts)


def _figures(found: records.Run) -> list[tuple[str, str, str]]:
    figures = []
    for name, (label, note) in _FIGURES.items():
        value = found.metric(name)
        if value is not None:
            figures.append((label, _share(value) if name in _SHARES else _human(value), note))
    return figures


def _metrics(found: records.Run) -> list[tuple[str, str, str]]:
    """Name, value and definition of every scalar of the evaluation, in its own order."""
    definitions = found.evaluation.get("definitions", {})
    values = found.evaluation.get("metrics", {})
    return [(name, _human(value), definitions.get(name, "")) for name, value in values.items()]


def _array(found: records.Run, name: str) -> np.ndarray | None:
    """An array of the evaluation as floats (None and NaN become NaN), or None where it is missing."""
    values = found.evaluation.get("arrays", {}).get(name)
    if not isinstance(values, list) or not values:
        return None
    try:
        return np.asarray([math.nan if v is None else v for v in values], float).reshape(-1)
    except (TypeError, ValueError, OverflowError):
        return None


def _densities(found: records.Run) -> Markup | None:
    """Histogram of log10 firing rates, cut to the bins that hold something."""
    counts, edges = _array(found, "log10_density_hist"), _array(found, "log10_density_edges")
    if counts is None or edges is None or len(edges) != len(counts) + 1 or not counts.any():
        return None
    full = np.flatnonzero(counts)
    first, last = max(full[0] - 2, 0), min(full[-1] + 2, len(counts) - 1)
    return plot.histogram(
        edges[first : last + 2], [("latents", counts[first : last + 1])],
        title="Latents by firing rate", x_label="log10 of the firing rate",
    )  # fmt: skip


def _extremes(rates: np.ndarray | None) -> dict[str, Any] | None:
    """Dead latents and the densest ones."""
    if rates is None:
        return None
    order = np.argsort(-rates, kind="stable")
    dense = [(int(i), float(rates[i])) for i in order[:24] if rates[i] > _DENSE]
    dead = np.flatnonzero(rates == 0)
    return {
        "n": len(rates),
        "n_dead": len(dead),
        "dead": dead[:60].tolist(),
        "n_dense": int((rates > _DENSE).sum()),
        "dense": dense,
        "threshold": _DENSE,
        "median": float(np.median(rates[rates > 0])) if (rates > 0).any() else None,
    }


def _gain(found: records.Run) -> dict[str, Any] | None:
    """Histogram of the least-squares gain of each latent; 1 means its size is right."""
    gain = _array(found, "gain")
    if gain is None or not np.isfinite(gain).any():
        return None
    gain = gain[np.isfinite(gain)]
    low, high = np.quantile(gain, [0.005, 0.995])
    low, high = min(float(low), 0.95), max(float(high), 1.05)
    counts, edges = np.histogram(gain.clip(low, high), bins=48, range=(low, high))
    chart = plot.histogram(edges, [("latents", counts)], title="Gain of each latent", x_label="gain")
    return {"chart": chart, "median": float(np.median(gain))}


def _cosine(sae: SAE | None) -> dict[str, Any] | None:
    """Histogram of the nearest decoder cosine with random directions as control."""
    if sae is None or sae.sparsifier.d_sae < 2:
        return None
    real, chance = decoder.nearest_cosines(sae.params.W_dec)
    low = min(0.0, float(min(real.min(), chance.min())))
    bins = np.linspace(low, 1.0, 51)
    layers = [(name, np.histogram(c.clip(low, 1.0), bins)[0]) for name, c in (("decoder", real), ("random", chance))]
    chart = plot.histogram(bins, layers, title="Cosine to the nearest other latent", x_label="cosine")
    medians = float(np.median(real)), float(np.median(chance))
    return {
        "chart": chart,
        "median": medians[0],
        "chance": medians[1],
        "twins": int((real > 0.9).sum()),
        "n": len(real),
    }


def _commands(path: Path) -> Mapping[str, str]:
    """Commands that fill the empty sections, to be typed in the folder that holds the run."""
    return {
        "train": f"saejax train {paths.typed('resume', path.name)}",
        "evaluate": f"saejax evaluate {paths.typed('run', path.name)}",
        "report": f"saejax report {paths.typed('run', path.name)}",
    }


def _human(value: Any) -> str:
    return plot.human(float(value)) if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)


def _brief(value: float) -> str:
    return plot.human(value, digits=3)


def _share(value: float) -> str:
    """Percent with as many digits as it needs.

    Examples:
      >>> _share(0.0123), _share(0.5), _share(0.0)
      ('1.23 %', '50 %', '0 %')
    """
    return f"{100 * value:.3g} %"


def _visible(text: str) -> str:
    """Makes line breaks and tabs visible, as they are tokens of their own; so are control characters."""
    shown = text.replace("\r\n", "↵").replace("\n", "↵").replace("\r", "↵").replace("\t", "⇥")
    return "".join("�" if unicodedata.category(c) in ("Cc", "Cs") else c for c in shown) or "∅"


def _shade(activation: float | None, largest: float | None) -> str:
    """Strength of a token's highlight between 0 and 1, as CSS wants it."""
    if not activation or not largest or activation <= 0:
        return "0"
    return f"{min(activation / largest, 1.0):.2f}"
