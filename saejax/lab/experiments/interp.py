"""Interpretability scores without people or language models: do they tell interpretable units from others?

Step 3 of the argument, on the benchmark SB-iid. An item's true features are its descriptor. So the intruder and 2AFC
scores of true latents, SAE latents, polysemantic sums, neurons and random directions have a known order.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, ClassVar, Self

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from saejax.activations.synthetic import Synthetic
from saejax.errors import UserError
from saejax.lab.experiments import figures, fit
from saejax.lab.experiments.harness import Check, Experiment, Outcome, near, register
from saejax.lab.metrics import interpretability
from saejax.lab.metrics.over import over
from saejax.sae import TopK

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REFERENCE = {
    "true latents": (0.874, 0.998),
    "matched filter": (0.854, 0.843),
    "SAE latents": (0.863, 0.964),
    "sum of 2 latents": (0.780, 0.720),
    "sum of 8 latents": (0.727, 0.520),
    "neurons": (0.696, 0.427),
    "random directions": (0.700, 0.424),
}
"""(2AFC, intruder) of each type of unit in the independent reference run, which had 20,000 items and 64 units."""

RUN = "independent NumPy reference run"
LATENTS, NEURONS, DIRECTIONS = "SAE latents", "neurons", "random directions"
SIGNED = "neurons, signed"

Units = Float[np.ndarray, "n_items n_units"]
PerUnit = dict[str, Float[np.ndarray, "n_units"]]
"""The scores "mis" (2AFC) and "intruder" of each unit."""


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class IntruderMIS(Experiment):
    """Scores of nine types of unit, the contrast of latents and neurons, and the four traps of such scores.

    Neurons and random directions are rectified, as latents are: otherwise their low end is not silence but the features
    they weigh negatively, as alike as those at the high end. The signed ones are shown beside.
    """

    name: ClassVar[str] = "interp/intruder_mis"
    summary: ClassVar[str] = "intruder and 2AFC scores of latents, neurons and random directions, and their four traps"
    cpu_seconds: ClassVar[tuple[int, int]] = (30, 25)

    n_items: int = 20_000
    """Items that are ranked (count, at least 900 per trial, so that latents fire on all items at their high end)."""
    n_units: int = 64
    """Units of each type (count, 1 to 64: there are 64 neurons)."""
    n_trials: int = 20
    """2AFC trials per unit (count, >= 1)."""
    n_steps: int = 6000
    """Training steps of the SAE, 512 rows each (count, >= 1)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.n_units <= 64:
            raise UserError(f"n_units must be between 1 and 64, got {self.n_units}")
        if self.n_trials < 1 or self.n_items < 900 * self.n_trials:
            raise UserError(f"n_items must be at least 900 for each of n_trials = {self.n_trials}, got {self.n_items}")

    def quick(self) -> Self:
        return dataclasses.replace(self, n_steps=3000)

    def run(self) -> Outcome:
        source = Synthetic(feature_seed=self.seed, heldout_rows=self.n_items)
        rows, codes = (np.concatenate(parts) for parts in zip(*source.heldout_with_codes(1024), strict=True))
        labels = (codes > 0).astype(np.float32)
        types = self._units(source, rows, codes)
        scores = {name: self._scores(units, labels) for name, units in types.items()}
        layer = {name: self._scores(types[name], rows) for name in (LATENTS, NEURONS, DIRECTIONS)}
        alone = self._scores(codes[:, :1], labels[:, :1])
        values = {
            "described_by_labels": {name: _means(per_unit) for name, per_unit in scores.items()},
            "described_by_the_layer": {name: _means(per_unit) for name, per_unit in layer.items()},
            "described_by_its_own_label": _means(alone),
            "intruder_ties_by_place": _ties_by_place(labels, self.seed),
            "contrast": {score: _contrast(scores, score, self.seed) for score in ("mis", "intruder")},
            "per_unit": scores,
        }
        return Outcome(values, _checks(values), _figure(scores, layer))

    def _units(self, source: Synthetic, rows: np.ndarray, codes: np.ndarray) -> dict[str, Units]:
        """The types of unit, from one meaning to none."""
        rng = np.random.default_rng(self.seed)
        some = rng.choice(codes.shape[1], self.n_units, replace=False)
        training = TopK(d_in=source.d_in, d_sae=source.n_features, k=4)
        sae = fit.train(training, source, n_tokens=512 * self.n_steps, seed=self.seed)
        latents = np.asarray(sae.encode(jnp.asarray(rows)))
        live = np.flatnonzero((latents > 0).any(axis=0))
        directions = rng.standard_normal((source.d_in, self.n_units))
        directions /= np.linalg.norm(directions, axis=0)

        def sums(count: int) -> Units:
            parts = (rng.choice(codes.shape[1], count, replace=False) for _ in range(self.n_units))
            return np.stack([codes[:, part].sum(axis=1) for part in parts], axis=1)

        return {
            "true latents": codes[:, some],
            "matched filter": np.maximum(rows @ source.features()[some].T - 0.5, 0),
            LATENTS: latents[:, rng.choice(live, min(self.n_units, len(live)), replace=False)],
            **{f"sum of {count} latents": sums(count) for count in (2, 8, 32)},
            NEURONS: np.maximum(rows[:, : self.n_units], 0),
            DIRECTIONS: np.maximum(rows @ directions, 0),
            SIGNED: rows[:, : self.n_units],
            "noise": rng.standard_normal((len(rows), self.n_units)),
        }

    def _scores(self, units: Units, descriptor: Float[np.ndarray, "n_items p"]) -> PerUnit:
        """Both scores of every unit, under one descriptor of the items."""
        batch = interpretability.DescribedBatch(latents=units, descriptor=descriptor, row_id=np.arange(len(units)))
        mis = over(interpretability.TwoAlternatives(trials=self.n_trials, seed=self.seed), batch)
        intruder = over(interpretability.Intruder(seed=self.seed), batch)
        return {"mis": mis.arrays["mis_per_unit"], "intruder": intruder.arrays["intruder_per_unit"]}


def _means(per_unit: PerUnit) -> dict[str, float]:
    """Mean and standard deviation over units."""
    means = {score: float(np.nanmean(values)) for score, values in per_unit.items()}
    return means | {f"{score}_sd": float(np.nanstd(values)) for score, values in per_unit.items()}


def _contrast(scores: dict[str, PerUnit], score: str, seed: int) -> dict[str, float]:
    """Latents against neurons and against random directions, with bootstrap intervals."""
    arms = {"neurons": NEURONS, "latents": LATENTS, "directions": DIRECTIONS}
    per_unit = {short: scores[name][score] for short, name in arms.items()}
    return interpretability.contrast(per_unit, "neurons", seed=seed)


def _ties_by_place(labels: Float[np.ndarray, "n_items n_features"], seed: int, trials: int = 4000) -> float:
    """Intruder accuracy of a meaningless unit if, of equally dissimilar items, the first one is always called."""
    chosen = np.random.default_rng(seed).choice(len(labels), (trials, 5))
    described = labels[chosen]
    similar = described @ described.transpose(0, 2, 1)
    others = similar.sum(axis=2) - np.diagonal(similar, axis1=1, axis2=2)
    return float((others.argmin(axis=1) == 4).mean())  # the intruder is listed last


def _checks(values: dict[str, Any]) -> list[Check]:
    """The table: each score with its level of chance, the contrasts, the four traps."""
    by_labels, by_layer = values["described_by_labels"], values["described_by_the_layer"]
    contrast = values["contrast"]
    names = {"mis": "2AFC (chance 0.5)", "intruder": "intruder (chance 0.2)"}
    checks = []
    for name, targets in REFERENCE.items():
        for score, target in zip(names, targets, strict=True):
            checks.append(near(f"{name}: {names[score]}", by_labels[name][score], target, 0.04, RUN))
    checks += [
        near("noise: 2AFC (chance 0.5)", by_labels["noise"]["mis"], 0.5, 0.04, "chance"),
        near("noise: intruder (chance 0.2)", by_labels["noise"]["intruder"], 0.2, 0.06, "chance"),
    ]
    for score, least in (("mis", 0.12), ("intruder", 0.35)):
        name = f"SAE latents minus neurons: {names[score].split(' ')[0]}"
        checks.append(Check(quantity=name, measured=contrast[score]["latents_minus_neurons"], low=least, source=RUN))
        low = contrast[score]["latents_minus_neurons_low"]
        checks.append(Check(quantity=f"{name}, lower 95 % bound", measured=low, low=0.0, source="Klindt et al. 2025"))
    # The reference run had -.005 with signed neurons, whose low end is alike too; a third of the true .18 is "little".
    blurred = by_layer[LATENTS]["mis"] - by_layer[NEURONS]["mis"]
    quantity = "trap 1, descriptor is the layer: SAE latents minus neurons, 2AFC"
    checks.append(Check(quantity=quantity, measured=blurred, high=0.06, source=RUN))
    quantity = "trap 2, ties broken by place: noise, intruder (chance 0.2)"
    # The reference run had .01: all it says is far below chance.
    checks.append(Check(quantity=quantity, measured=values["intruder_ties_by_place"], high=0.1, source=RUN))
    # Of 18 x 2 similarities a quarter is 1 and the rest 0, standardised to sqrt(3) and -1 / sqrt(3).
    perfect = 1 / (1 + math.exp(-4 / math.sqrt(3)))
    quantity = "trap 3, saturation: a unit described by its own label alone, 2AFC"
    measured = values["described_by_its_own_label"]["mis"]
    checks.append(near(quantity, measured, perfect, 0.001, "closed form 1 / (1 + exp(-4 / sqrt 3))"))
    quantity = "trap 4, low end not silent: neurons with their sign, 2AFC (rectified above)"
    checks.append(Check(quantity=quantity, measured=by_labels[SIGNED]["mis"], source="shown, not judged"))
    return checks


def _figure(scores: dict[str, PerUnit], layer: dict[str, PerUnit]) -> Figure:
    """Both scores under labels, and those of three arms under the layer's own activations."""
    figure, (first, second) = figures.new(1, 2, width=4.8, height=3.8)
    for ax, group, title in (
        (first, scores, "described by true labels"),
        (second, layer, "trap 1: described by the layer itself"),
    ):
        places = -np.arange(len(group))
        for i, (score, label, chance) in enumerate((("mis", "2AFC", 0.5), ("intruder", "intruder", 0.2))):
            means = [_means(group[name]) for name in group]
            spread = [m[f"{score}_sd"] for m in means]
            figures.line(ax, [m[score] for m in means], places - 0.15 * i, i, label, xerr=spread, linestyle="none")
            ax.axvline(chance, color="0.35", linewidth=0.9, linestyle=figures.DASHES[i + 1])
            ax.annotate(f"chance, {label}", (chance, 0.6), rotation=90, ha="right", va="top", fontsize=7, color="0.25")
        ax.set_yticks(places, list(group))
        ax.set(xlim=(0, 1.05), ylim=(places[-1] - 0.7, 0.7))
        figures.finish(ax, x="score (share of trials; bars: sd over units)", y="unit", title=title, legend=ax is first)
    return figure
