"""E2 and E2b, recovery: does sparse coding find known features, and how does the number of latents matter?

Data: the benchmark SB-iid (`activations.synthetic`), 256 features in 64 dimensions, 4 of them active in the mean row.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from saejax.activations.synthetic import Synthetic
from saejax.evals import evaluate, recovery
from saejax.lab.experiments import figures, fit, harness
from saejax.sae import L1, TopK, base, model
from saejax.sparse_coding import learning

REFERENCE = "independent NumPy reference run"

_KEYS = ("mcc", "mcc_chance", "recovered_features", "fvu", "l0", "dead_share", "relative_reconstruction_bias")


def measured(sae: model.SAE, source: Synthetic, rows: int) -> dict[str, float]:
    """The held-out figures of one SAE that the tables of this module show."""
    result = evaluate.evaluate(sae, source, max_rows=rows)
    return {key: result[key] for key in _KEYS}


@harness.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class SbIid(harness.Experiment):
    """Mechanism 3 of the framework: TopK with AuxK, L1 and dictionary learning each find the true dictionary."""

    name = "synth/sb_iid"
    summary = "known features: TopK + AuxK, L1 and dictionary learning recover the dictionary"
    cpu_seconds = (150, 45)

    n_tokens: int = 3_072_000
    """Rows that each SAE is trained on; dictionary learning sees 400 batches of 512."""
    n_seeds: int = 2
    """Seeds of TopK with AuxK at full weight, from `seed` on (>= 1)."""
    gentle: bool = True
    """Whether TopK is also run with AuxK at weight 1/32."""
    l1_coef: float = 0.4
    """Weight of the penalty of the L1 SAE, in units of the data."""
    online_l1_coef: float = 0.1
    """Weight of the penalty in dictionary learning, against half the squared error."""
    eval_rows: int = 20_000
    """Held-out rows."""

    def quick(self):
        """One seed, without the arm at weight 1/32; as long as in full, since recovery needs it."""
        return dataclasses.replace(self, n_seeds=1, gentle=False)

    def run(self) -> harness.Outcome:
        """Train every arm, compare its dictionary to the truth."""
        source = Synthetic()
        shape: dict[str, Any] = {"d_in": source.d_in, "d_sae": source.n_features}
        arms: dict[str, tuple[base.Sparsifier, int]] = {
            f"TopK + AuxK 1, seed {s}": (TopK(**shape, k=4, aux_alpha=1.0), s) for s in self._seeds()
        }
        if self.gentle:
            arms["TopK + AuxK 1/32"] = (TopK(**shape, k=4), self.seed)
        arms["L1"] = (L1(**shape, l1_coef=self.l1_coef), self.seed)
        values: dict[str, Any] = {}
        for name, (sparsifier, seed) in arms.items():
            sae = fit.train(sparsifier, source, n_tokens=self.n_tokens, seed=seed)
            values[name] = measured(sae, source, self.eval_rows)
        values["dictionary learning"] = self._learned(source)
        checks = [self._check(name, scores["mcc"]) for name, scores in values.items()]
        checks += [
            harness.Check(quantity=f"dead latents, {name}", measured=scores["dead_share"], high=0.01, source=REFERENCE)
            for name, scores in values.items()
            if name.startswith("TopK")
        ]
        return harness.Outcome(values, checks, _recovery_figure(values))

    def _seeds(self) -> range:
        return range(self.seed, self.seed + self.n_seeds)

    def _learned(self, source: Synthetic) -> dict[str, float]:
        rows = next(source.open(n_lanes=1, block_rows=400 * 512, lanes=range(1), seed=self.seed, prefetch=0))[0]
        found = learning.learn(rows, source.n_features, l1_coef=self.online_l1_coef, n_steps=400, seed=self.seed)
        scores = recovery.dictionary_recovery(np.asarray(found.dictionary), source.features())
        return {key: float(scores[key]) for key in ("mcc", "mcc_chance", "recovered_features")}

    def _check(self, name: str, mcc: float) -> harness.Check:
        low, reached = {"T": (0.99, ".995 to .999"), "L": (0.97, ".980"), "d": (0.99, ".9999")}[name[0]]
        quantity = f"dictionary MCC, {name}"
        return harness.Check(quantity=quantity, measured=mcc, low=low, source=f"{REFERENCE}: {reached}")


def _recovery_figure(values: dict[str, dict[str, float]]) -> Any:
    figure, (ax,) = figures.new(width=7.0, height=3.4)
    names = [name.replace(", ", "\n").replace(" + ", "\n+ ") for name in values]
    rows = [[scores[key] for scores in values.values()] for key in ("mcc", "recovered_features")]
    figures.bars(ax, names, rows, series=("MCC", "share of features with |cos| > 0.9"))
    figures.reference(ax, next(iter(values.values()))["mcc_chance"], "MCC of random directions")
    ax.set_ylim(0, 1.25)
    figures.finish(ax, x="", y="score (0 to 1)", title="Recovery of 256 features in 64 dimensions", legend=True)
    return figure


@harness.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Width(harness.Experiment):
    """The trade-off of the number of latents: too few miss features, too many have no feature to be."""

    name = "synth/width"
    summary = "known features: how many are found with fewer or more latents than features"
    cpu_seconds = (240, 25)

    n_tokens: int = 3_072_000
    """Rows that each SAE is trained on."""
    ratios: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)
    """Latents per true feature, rising; must hold 1."""
    eval_rows: int = 20_000
    """Held-out rows."""

    def quick(self):
        """Three widths and a quarter of the rows."""
        return dataclasses.replace(self, n_tokens=768_000, ratios=(0.5, 1.0, 2.0))

    def run(self) -> harness.Outcome:
        """Train one TopK SAE per width, match it to the truth."""
        source = Synthetic()
        values: dict[float, Any] = {}
        for ratio in self.ratios:
            width = round(ratio * source.n_features)
            sparsifier = TopK(d_in=source.d_in, d_sae=width, k=4, aux_alpha=1.0)
            sae = fit.train(sparsifier, source, n_tokens=self.n_tokens, seed=self.seed)
            result = evaluate.evaluate(sae, source, max_rows=self.eval_rows)
            found = result["recovered_features"] * source.n_features
            values[ratio] = {key: result[key] for key in (*_KEYS, "mcc_features", "mmcs_latents")}
            values[ratio] |= {"d_sae": width, "unmatched_share": 1 - found / width}
        return harness.Outcome({"widths": values}, self._checks(values), _width_figure(values))

    def _checks(self, values: dict[float, Any]) -> list[harness.Check]:
        narrow = [r for r in self.ratios if r <= 1]
        found = [values[r]["recovered_features"] for r in narrow]
        rise = min(b - a for a, b in zip(found, found[1:], strict=False)) if len(found) > 1 else float("nan")
        source = "no published number; half of what this program measured"
        # Measured at 768,000 rows: shares .01, .30, .94 of the features at N/4, N/2, N, and .988, 1 beyond; the least
        # step, .29, is the first, where 64 latents share 256 features and hardly any reaches |cos| .9.
        checks = [
            harness.Check(
                quantity="least rise of recovered features per step up to N_sae = N",
                measured=rise,
                low=0.15,
                source=source,
            )
        ]
        for ratio in self.ratios:
            quantity = f"latents without a feature, N_sae = {ratio:g} N"
            scores = values[ratio]
            if (
                ratio > 1
            ):  # the surplus has no feature, by counting; that it is hardly more (.006 and 0 measured) is the claim
                surplus = 1 - 1 / ratio
                checks.append(
                    harness.Check(
                        quantity=quantity,
                        measured=scores["unmatched_share"],
                        low=surplus - 1e-9,
                        high=surplus + 0.1,
                        expected=f"{surplus:g} to {surplus + 0.1:g}",
                        source="counting, and that nearly all features are found",
                    )
                )
        return checks


def _width_figure(values: dict[float, Any]) -> Any:
    figure, (left, right) = figures.new(1, 2)
    ratios = list(values)
    for i, (key, label) in enumerate(
        {"recovered_features": "features with |cos| > 0.9", "mcc_features": "MCC over all features"}.items()
    ):
        figures.line(left, ratios, [scores[key] for scores in values.values()], i, label)
    for i, (key, label) in enumerate({"unmatched_share": "without a feature", "dead_share": "dead"}.items()):
        figures.line(right, ratios, [scores[key] for scores in values.values()], i, label)
    for ax in (left, right):
        ax.set_xscale("log", base=2)
        ax.set_ylim(-0.03, 1.05)
    figures.finish(left, x="latents per true feature", y="share or score of features", title="Features", legend=True)
    figures.finish(right, x="latents per true feature", y="share of latents", title="Latents", legend=True)
    return figure
