"""Dimensions that each decoder needs as the number of active features grows, at a million features.

Closed forms run at full size, Monte Carlo at a size for a laptop; the same formulas serve both.
"""

import dataclasses
import math
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from saejax.errors import UserError
from saejax.lab.codes import capacity, gaussian, rules, success
from saejax.lab.codes.arguments import check_indexable
from saejax.lab.experiments import figures
from saejax.lab.experiments.codes_data import ONE_STEP, PAPER, RUN, trial_mesh
from saejax.lab.experiments.harness import Check, Experiment, Outcome, near, register

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = ("basis_pursuit_nonneg", "integer_pursuit", "top_k_half", "top_k_ninety", "top_k", "threshold_ninety")
AT_SCALE = {"top_k_half": 14982, "top_k_ninety": 17656, "threshold_ninety": 27672, "basis_pursuit_nonneg": 2705}
"""Dimensions at n_atoms = 2^20, k = 2^8, by an independent evaluation of the closed forms."""

TOLERANCE = {"half": 0.05, "ninety": 0.075}
"""Share of a measured dimension that it may be off the reference. 400 trials on four dictionaries have a standard
deviation of 1.3 % at P = 0.5 and of 2.6 % at P = 0.9 (14 seeds), the reference run has its own: two of the difference
are 2 sqrt(2) times that."""


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Fig2(Experiment):
    """Least dimensions against k for top-k, thresholds, integer pursuit and basis pursuit, and per bit of entropy."""

    name: ClassVar[str] = "codes/fig2"
    summary: ClassVar[str] = "dimensions that each decoder needs at 2^20 features against k, theory and Monte Carlo"
    cpu_seconds: ClassVar[tuple[int, int]] = (300, 15)
    may_be_zero: ClassVar[tuple[str, ...]] = ("supports_at_scale",)
    in_formulas: ClassVar[tuple[str, ...]] = ("n_atoms",)

    n_atoms: int = 2**20
    """Features of the closed forms (count, >= 1024)."""
    measured_log2: int = 16
    """log2 of the features of the Monte Carlo runs (12, 14 or 16, where a reference exists)."""
    measured_k: tuple[int, ...] = (4, 16, 64)
    """Active features of the Monte Carlo runs (each 4, 16 or 64)."""
    n_dictionaries: int = 4
    """Dictionaries per Monte Carlo run, 100 subsets each (count, >= 1)."""
    supports_at_scale: int = 100
    """Subsets of top-k decoding at n_atoms and k = 256, streamed (count; 0 leaves it out; 100 take two minutes)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_atoms < 1024:
            raise UserError(f"n_atoms = {self.n_atoms}: at least 1024 is needed")
        if self.supports_at_scale:
            check_indexable(n_atoms=self.n_atoms)
        for k in self.measured_k:
            if (self.measured_log2, k) not in ONE_STEP:
                cell = f"measured_log2 = {self.measured_log2}, measured_k = {k}"
                raise UserError(f"{cell}: one of {sorted(ONE_STEP)} is needed")

    def quick(self) -> Self:
        return dataclasses.replace(self, measured_log2=12, measured_k=(4, 16), supports_at_scale=0)

    def run(self) -> Outcome:
        largest = int(math.log2(self.n_atoms)) // 2
        actives = [2**i for i in range(1, largest + 1)]
        theory = {name: [rules.dims_needed(self.n_atoms, k, name) for k in actives] for name in SHOWN}
        measured = {k: self._measure(k) for k in self.measured_k}
        values: dict[str, Any] = {"k": actives, "theory": theory, "measured": measured}
        checks = self._checks(measured)
        if self.supports_at_scale:
            values["at_scale"] = at_scale = self._at_scale()
            for d, (p, target) in at_scale.items():
                tolerance = 3 * math.sqrt(target * (1 - target) / self.supports_at_scale)
                quantity = f"P(top-k), N = {self.n_atoms}, k = 256, d = {d}, streamed"
                checks.append(near(quantity, p, target, tolerance, "Gaussian theory; three standard errors"))
        return Outcome(values, checks, self._figure(actives, theory, measured))

    def _measure(self, k: int) -> dict[str, float]:
        """d50 and d90 of both decoders, measured and by theory."""
        n_atoms = 2**self.measured_log2
        references = ONE_STEP[self.measured_log2, k]
        curves = [references["top_k"], references["threshold_half"]]
        grid = np.unique(np.concatenate([np.linspace(0.8 * d50, 1.12 * d90, 12).round() for d50, d90 in curves]))
        margins = success.one_step(
            n_atoms, k, grid.astype(int).tolist(), n_dictionaries=self.n_dictionaries, seed=self.seed, mesh=trial_mesh()
        )
        result = {}
        for name, curve in (("top_k", margins.top_k()), ("threshold", margins.threshold(0.5))):
            for label, p in (("half", 0.5), ("ninety", 0.9)):
                result[f"{name}_{label}"] = curve.dims_at(p)
                result[f"{name}_{label}_theory"] = rules.dims_needed(n_atoms, k, f"{name}_{label}")
        return result

    def _checks(self, measured: dict[int, dict[str, float]]) -> list[Check]:
        checks = []
        for rule, target in AT_SCALE.items():
            dims = rules.dims_needed(2**20, 256, rule)
            checks.append(near(f"dims at N = 2^20, k = 256: {rule}", dims, target, 0.02 * target, RUN))
        for k, found in measured.items():
            reference = ONE_STEP[self.measured_log2, k]
            for name in ("top_k", "threshold"):
                published = reference["top_k" if name == "top_k" else "threshold_half"]
                for place, (label, share) in enumerate(TOLERANCE.items()):
                    quantity = f"dims at N = 2^{self.measured_log2}, k = {k}: {name}_{label}, measured"
                    target = published[place]
                    checks.append(near(quantity, found[f"{name}_{label}"], target, share * target, RUN))
            if k >= 16:  # the formulas hold to 3 % there; measuring adds twice its own 2.6 %
                ratio = found["top_k_ninety"] / found["top_k_ninety_theory"]
                quantity = f"top-k d90, measured over Gaussian theory, k = {k}"
                checks.append(near(quantity, ratio, 1, 0.08, f"{PAPER}: scores are nearly Gaussian"))
        return checks

    def _at_scale(self) -> dict[int, tuple[float, float]]:
        """P(success) of top-k at full size, measured and by theory, at the d50 and d90 of theory."""
        dims = [round(rules.dims_needed(self.n_atoms, 256, name)) for name in ("top_k_half", "top_k_ninety")]
        margins = success.one_step(
            self.n_atoms,
            256,
            dims,
            n_dictionaries=1,
            n_supports=self.supports_at_scale,
            seed=self.seed,
            mesh=trial_mesh(),
        )
        measured = margins.top_k().probability
        theory = [gaussian.top_k_success(self.n_atoms, 256, d) for d in dims]
        return {d: (float(p), target) for d, p, target in zip(dims, measured, theory, strict=True)}

    def _figure(
        self, actives: list[int], theory: dict[str, list[float]], measured: dict[int, dict[str, float]]
    ) -> "Figure":
        figure, axes = figures.new(1, 2, width=5, height=3.8)
        bits = np.array([capacity.entropy_bits(self.n_atoms, k) for k in actives])
        for index, (name, dims) in enumerate(theory.items()):
            figures.line(axes[0], actives, dims, index, name, marker=False)
            figures.line(axes[1], actives, np.array(dims) / bits, index, name, marker=False)
        n_small = 2**self.measured_log2
        for name, index in (("top_k_half", SHOWN.index("top_k_half")), ("threshold_ninety", len(SHOWN) - 1)):
            dims = [found[name] for found in measured.values()]
            per_bit = [d / capacity.entropy_bits(n_small, k) for d, k in zip(dims, measured, strict=True)]
            label = f"{name}, measured at 2^{self.measured_log2}"
            figures.line(axes[0], list(measured), dims, index, label, linestyle="none")
            figures.line(axes[1], list(measured), per_bit, index, label, linestyle="none")
        for ax in axes:
            ax.set_xscale("log", base=2)
        axes[0].set_yscale("log")
        title = f"N = 2^{math.log2(self.n_atoms):.4g}"
        figures.finish(axes[0], x="active features k", y="least dimensions d", title=title, legend=True)
        figures.finish(axes[1], x="active features k", y="dimensions per bit, d / H", title=title)
        return figure
