"""E10, stability: do two trainings find the same latents? Includes the trap of equal initial weights.

PW-MCC compares two dictionaries by the mean |cos| of their best one-to-one matching. Two SAEs with the same initial
weights agree before they have learnt anything, so final agreement proves nothing. Only the agreement gained in
training counts (stabilisation = PW-MCC at the end minus PW-MCC at the start).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from saejax.activations.synthetic import Synthetic
from saejax.errors import UserError
from saejax.evals import matching
from saejax.lab.experiments import figures, fit, harness
from saejax.lab.metrics import stability as agreement
from saejax.sae import TopK, model

REFERENCE = "independent NumPy reference run"


@harness.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Seeds(harness.Experiment):
    """Instability: TopK SAEs of different seeds agree less with each other than with the truth."""

    name = "stability/seeds"
    summary = "agreement of SAEs over seeds, beside chance, truth and the trap of identical initial weights"
    cpu_seconds = (70, 30)

    n_tokens: int = 3_072_000
    """Rows that each SAE is trained on."""
    n_seeds: int = 3
    """Independent trainings (>= 2)."""
    aux_alpha: float = 0.0
    """Weight of AuxK; 0, no revival, is the setting of the reference."""
    least_stabilisation: float = 0.1
    """Agreement that training must have brought about, or the comparison is flagged as a trap."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_seeds < 2:
            raise UserError(f"n_seeds = {self.n_seeds}: at least 2 are needed to compare")

    def quick(self):
        """Two seeds and half the rows."""
        return dataclasses.replace(self, n_seeds=2, n_tokens=1_536_000)

    def run(self) -> harness.Outcome:
        """Train independent SAEs, and one that shares the first one's initial weights but not its data order."""
        source = Synthetic()
        sparsifier = TopK(d_in=source.d_in, d_sae=source.n_features, k=4, aux_alpha=self.aux_alpha)
        seeds = range(self.seed, self.seed + self.n_seeds)
        fits = [fit.fit(sparsifier, source, n_tokens=self.n_tokens, seed=s, data_seed=1000 + s) for s in seeds]
        trap = fit.fit(sparsifier, source, n_tokens=self.n_tokens, seed=self.seed, data_seed=2000 + self.seed)
        features = source.features()
        values: dict[str, Any] = {
            "independent": self._compared(fits),
            "identical_init": self._compared([fits[0], trap]),
            "mcc_true": [matching.matched_mean(matching.abs_cos(_directions(done.sae), features)) for done in fits],
        }
        return harness.Outcome(values, self._checks(values), _figure(values))

    def _compared(self, fits: list[fit.Fit]) -> dict[str, Any]:
        """Agreement of all pairs at the start and at the end, and whether it may be believed."""
        starts, ends = [_directions(done.start) for done in fits], [_directions(done.sae) for done in fits]
        found: dict[str, Any] = agreement.stabilisation(starts, ends, seed=self.seed)
        found["flagged"] = bool(found["identical_init"]) or found["stabilisation"] < self.least_stabilisation
        return found

    def _checks(self, values: dict[str, Any]) -> list[harness.Check]:
        free, trap = values["independent"], values["identical_init"]
        true = float(np.mean(values["mcc_true"]))
        return [
            harness.Check(
                quantity="PW-MCC, independent seeds",
                measured=free["pw_mcc_final"],
                low=0.80,
                high=0.95,
                source=f"{REFERENCE}: .868; Song et al. 2025 for the metric",
            ),
            harness.Check(
                quantity="MCC with the truth minus PW-MCC",
                measured=true - free["pw_mcc_final"],
                low=0.0,
                source=f"{REFERENCE}: .92 - .87",
            ),
            # Chance over this shape has a standard deviation below .002 from dictionary to dictionary.
            harness.near(
                "PW-MCC before training",
                free["pw_mcc_initial"],
                free["pw_mcc_chance"],
                0.02,
                "random directions, same shape",
            ),
            harness.Check(
                quantity="stabilisation, independent seeds",
                measured=free["stabilisation"],
                low=self.least_stabilisation,
                source="training must bring agreement about",
            ),
            harness.Check(
                quantity="identical init: PW-MCC (looks stable)",
                measured=trap["pw_mcc_final"],
                low=0.80,
                source="the trap: shared weights pass for agreement of seeds",
            ),
            harness.Check(
                quantity="identical init: stabilisation (flagged)",
                measured=trap["stabilisation"],
                high=0.0,
                source="it starts at 1, so training can only lose agreement",
            ),
            harness.Check(
                quantity="flags raised: identical init, seeds",
                measured=float(trap["flagged"]) - float(free["flagged"]),
                low=1.0,
                expected="first only",
                source="the control that metric M27 is for",
            ),
        ]


def _directions(sae: model.SAE) -> np.ndarray:
    return np.asarray(sae.params.W_dec)


def _figure(values: dict[str, Any]) -> Any:
    figure, (ax,) = figures.new(width=5.6, height=3.4)
    arms = [values["independent"], values["identical_init"]]
    names = ["independent seeds", "identical initial weights\n(flagged)"]
    rows = [[arm[key] for arm in arms] for key in ("pw_mcc_initial", "pw_mcc_final", "stabilisation")]
    figures.bars(ax, names, rows, series=("PW-MCC before training", "PW-MCC after", "stabilisation: the difference"))
    figures.reference(ax, values["independent"]["pw_mcc_chance"], "chance")
    figures.reference(ax, float(np.mean(values["mcc_true"])), "MCC with the truth")
    ax.axhline(0, color="black", linewidth=0.8)
    ax.set_ylim(-0.2, 1.45)
    figures.finish(ax, x="", y="mean |cos| of matched latents", title="Agreement of two trainings", legend=True)
    return figure
