"""E4, dead latents: how many die in training, and what revives them. Data: the benchmark SB-iid."""

from __future__ import annotations

import dataclasses
from typing import Any

from saejax.activations.synthetic import Synthetic
from saejax.evals import evaluate
from saejax.lab.experiments import figures, fit, harness
from saejax.sae import BatchTopK, TopK, base

REFERENCE = "independent NumPy reference run"

RESAMPLED = "TopK + resampling"
"""Name of the arm that resamples."""

_NO_REVIVAL: dict[str, Any] = {"aux_alpha": 0.0}


@harness.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class DeadLatents(harness.Experiment):
    """The signature of dead latents: without revival a tenth of TopK's latents dies, with AuxK or resampling few."""

    name = "synth/dead_latents"
    summary = "known features: the share of latents that die without revival, with AuxK and with resampling"
    cpu_seconds = (100, 75)

    n_tokens: int = 3_072_000
    """Rows that each SAE is trained on."""
    alphas: tuple[float, ...] = (0.0, 0.03125, 1.0)
    """Weights of AuxK to compare; 0 is no revival."""
    resample_every_steps: int = 500
    """Steps between two resamplings of dead latents, in the arm that resamples (>= 1)."""
    eval_rows: int = 20_000
    """Held-out rows: a latent that fires in none of them counts as dead."""

    def quick(self):
        """Without the arm at weight 1/32."""
        return dataclasses.replace(self, alphas=(0.0, 1.0))

    def run(self) -> harness.Outcome:
        """Train one SAE per weight and count the latents that fire on no held-out row."""
        source = Synthetic()
        shape: dict[str, Any] = {"d_in": source.d_in, "d_sae": source.n_features, "k": 4}
        arms: dict[str, base.Sparsifier] = {_arm(alpha): TopK(**shape, aux_alpha=alpha) for alpha in self.alphas}
        arms[RESAMPLED] = TopK(**shape, **_NO_REVIVAL)
        if 0.0 in self.alphas:
            arms["BatchTopK, no revival"] = BatchTopK(**shape, **_NO_REVIVAL)
        values: dict[str, Any] = {}
        curves: dict[str, Any] = {}
        for name, sparsifier in arms.items():
            every = self.resample_every_steps if name == RESAMPLED else None
            done = fit.fit(sparsifier, source, n_tokens=self.n_tokens, seed=self.seed, resample_every_steps=every)
            result = evaluate.evaluate(done.sae, source, max_rows=self.eval_rows)
            keys = ("dead_share", "mcc", "mcc_chance", "recovered_features", "fvu", "l0")
            values[name] = {key: result[key] for key in keys}
            curves[name] = done.history
        checks = [self._check(name, scores["dead_share"]) for name, scores in values.items()]
        values = {"rows_of_the_window": self.eval_rows, "arms": values, "curves": curves}
        return harness.Outcome(values, checks, _figure(values))

    @staticmethod
    def _check(name: str, share: float) -> harness.Check:
        quantity = f"dead latents, {name}"
        if name == "BatchTopK, no revival":
            return harness.near(quantity, share, 0.27, 0.05, f"{REFERENCE}: .273")
        if name.endswith("no revival"):
            return harness.Check(quantity=quantity, measured=share, low=0.08, source=f"{REFERENCE}: .094")
        if name == RESAMPLED:
            return harness.Check(quantity=quantity, measured=share, high=0.03, source=f"{REFERENCE}: .023")
        return harness.Check(quantity=quantity, measured=share, high=0.01, source=f"{REFERENCE}: 0")


def _arm(alpha: float) -> str:
    return f"TopK + AuxK {alpha:g}" if alpha else "TopK, no revival"


def _figure(values: dict[str, Any]) -> Any:
    figure, (left, right) = figures.new(1, 2)
    for i, (name, history) in enumerate(values["curves"].items()):
        figures.line(left, history["step"], 100 * history["dead_share"], i, name)
    figures.finish(left, x="training step", y="dead latents (% of 256)", title="During training", legend=True)
    arms = values["arms"]
    names = [name.replace(", ", "\n").replace(" + ", "\n+ ") for name in arms]
    rows = [[scores[key] for scores in arms.values()] for key in ("dead_share", "mcc")]
    figures.bars(right, names, rows, series=("dead share", "dictionary MCC"))
    right.set_ylim(0, 1.3)
    figures.finish(right, x="", y="share or score (0 to 1)", title="After it", legend=True)
    return figure
