"""Dimension margins of a dictionary: are there enough dimensions for its features? One margin per decoder.

Rows and a dictionary give estimates for the rules: K, the features active at once (mean L0 of the inferred codes), N,
the features in use (atoms that ever fire), and M, the dimensions. Each rule then gives the dimensions that its decoder
needs. A margin below 1 warns about that decoder where M < N. It says nothing where M >= N, because features need no
superposition there. A margin above 1 forbids nothing and proves nothing.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, ClassVar, Self

import jax.numpy as jnp
import numpy as np

from saejax.activations.synthetic import Synthetic
from saejax.evals import metric, sparsity
from saejax.lab.codes import capacity, rules
from saejax.lab.experiments import figures
from saejax.lab.experiments.codes_data import FEATURES_OF_BERT
from saejax.lab.experiments.harness import Check, Experiment, Outcome, near, register
from saejax.lab.experiments.known_codes import DROP_BELOW, Dictionary
from saejax.lab.metrics import dimension, over
from saejax.sae import base

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DECODERS = {
    "margin_sensing": "compressed sensing, k ln(N/k)",
    "margin_sensing_twice": "compressed sensing, 2 k ln(N/k)",
    "margin_statistical": "basis pursuit, statistical dimension",
    "margin_top_k": "one-step top-k, 4 k ln(kN)",
}
"""The margins of metric M7, from the least to the most demanding decoder."""

DATA: dict[str, dict[str, Any]] = {
    "sparse": {"n_features": 256, "firing_rate": 4 / 256},
    "dense": {"n_features": 256, "firing_rate": 24 / 256},
    "not superposed": {"n_features": 48, "firing_rate": 4 / 48},
}
"""Features and their rates in 64 dimensions: the benchmark SB-iid, six times as dense, and fewer features than
dimensions."""


def verdict(margin: float, *, superposed: bool) -> str:
    """Verdict that a margin supports.

    Args:
      margin: dimensions over the dimensions that a rule asks for.
      superposed: whether there are more features than dimensions.

    Returns:
      One of three phrases; none of them says that recovery succeeds.

    Examples:
      >>> verdict(0.5, superposed=False)
      'no superposition needed'
    """
    if not superposed:
        return "no superposition needed"
    if margin < 1:
        return "warning: too few dimensions for this decoder"
    return "not forbidden, not proven"


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Dimensionality(Experiment):
    """K, N and M measured on three data sets of known answer, and the margin of every decoder."""

    name: ClassVar[str] = "check/dimensionality"
    summary: ClassVar[str] = "K, N and M of the data and the margin of each decoder: warns, never proves"
    cpu_seconds: ClassVar[tuple[int, int]] = (15, 8)

    rows: int = 4_000
    """Rows of each data set."""

    def quick(self) -> Self:
        """A quarter of the rows."""
        return dataclasses.replace(self, rows=1_000)

    def run(self) -> Outcome:
        checks = []
        for rule, target in FEATURES_OF_BERT.items():
            fits = math.exp(rules.ln_max_features(768, 10, rule))
            quantity = f"features that fit 768 dimensions, 10 active: {rule}"
            checks.append(near(quantity, fits, target, 0.03 * target, "closed form, to two digits"))
        values = {name: self.measure(Synthetic(feature_seed=self.seed, **change)) for name, change in DATA.items()}
        checks += _checks(values)
        return Outcome(values=values, checks=checks, figure=_figure(values))

    def measure(self, source: Synthetic) -> dict[str, Any]:
        """Estimates K, N and M by sparse coding with the true dictionary, and the margins that follow."""
        features = source.features()
        x, z = next(source.heldout_with_codes(self.rows, self.rows))
        codes, unconverged = Dictionary.of(features, features).codes(x, "fista", drop=DROP_BELOW, l1_coef=0.02)
        latents = jnp.asarray(codes, jnp.float32)
        batch = metric.EvalBatch(
            x=jnp.asarray(x),
            recon=latents @ features,
            encoding=base.Encoding(values=None, indices=None, latents=latents, d_sae=source.n_features),
            weight=jnp.ones(len(x)),
            W_dec=jnp.asarray(features),
            b_dec=jnp.zeros(source.d_in),
        )
        firing = over.over(sparsity.Firing(), batch)
        k, n = firing["l0"], round(source.n_features * (1 - firing["dead_share"]))
        margins = dimension.dimension_margins(
            source.d_in, k, n, statistical_dimension=capacity.statistical_dimension(n, k)
        )
        superposed = margins.pop("superposed") > 0
        return {
            "K": k,
            "K_true": float((z > 0).sum(axis=1).mean()),
            "N": n,
            "N_true": source.n_features,
            "M": source.d_in,
            "unconverged": unconverged,
            "effective_dimension": over.over(dimension.EffectiveDimension(), batch)["effective_dimension"],
            "effective_dimension_expected": _effective_dimension(features, x),
            "margins": margins,
            "verdicts": {name: verdict(margin, superposed=superposed) for name, margin in margins.items()},
        }


def _effective_dimension(features: np.ndarray, x: np.ndarray) -> float:
    """Effective dimension of independent features of equal rates: (tr C)^2 / tr C^2, C the sum of their outer products.

    A finite number of rows adds E|x|^4 / (E|x|^2)^2 / rows to the inverse.
    """
    scatter = features.T @ features
    square = ((x - x.mean(axis=0, keepdims=True)) ** 2).sum(axis=1)
    return float(1 / ((scatter**2).sum() / np.trace(scatter) ** 2 + (square**2).mean() / square.mean() ** 2 / len(x)))


def _warnings(found: dict[str, Any]) -> int:
    """Decoders that the data set warns about."""
    return sum(text.startswith("warning") for text in found["verdicts"].values())


def _checks(values: dict[str, dict[str, Any]]) -> list[Check]:
    """Rows of the table."""
    closed, own = "closed form", "true codes of the data"
    sparse = values["sparse"]
    checks = [
        near("K of sparse data / true K", sparse["K"] / sparse["K_true"], 1.0, 0.1, own),
        near("N of sparse data", sparse["N"], sparse["N_true"], 0.5, own),
        near(
            "effective dimension of sparse data",
            sparse["effective_dimension"],
            sparse["effective_dimension_expected"],
            1.0,  # 2 %: fluctuation of the rates of 256 features over 1,000 rows
            closed,
        ),
    ]
    for name, found in values.items():
        checks.append(Check(quantity=f"K, {name}", measured=found["K"], expected=f"{found['K_true']:.3g}", source=own))
        for key, text in DECODERS.items():
            margin, said = found["margins"][key], found["verdicts"][key]
            checks.append(Check(quantity=f"margin, {name}: {text}", measured=margin, expected=said, source="metric M7"))
    expected = {"sparse": 1, "dense": 4, "not superposed": 0}
    for name, count in expected.items():
        checks.append(near(f"decoders warned about, {name}", _warnings(values[name]), count, 0.1, closed))
    return checks


def _figure(values: dict[str, dict[str, Any]]) -> Figure:
    """Margins of every data set and decoder on one axis."""
    figure, (ax,) = figures.new(width=7.5, height=3.8)
    names = [text.replace(", ", "\n") for text in DECODERS.values()]
    series = [f"{name}: K = {v['K']:.1f}, N = {v['N']}, M = {v['M']}" for name, v in values.items()]
    figures.bars(ax, names, [[v["margins"][key] for key in DECODERS] for v in values.values()], series=series)
    ax.set_yscale("log")
    ax.set_ylim(0.03, 60)  # room for the legend
    figures.reference(ax, 1.0, "1")
    figures.finish(ax, x="decoder", y="dimensions / dimensions asked for\n(below 1: too few, where N > M)", legend=True)
    return figure
