"""Capacity calculator: how many features fit d dimensions with k active, by every rule."""

import dataclasses
import math
from typing import TYPE_CHECKING, Any, ClassVar, Self

from saejax.errors import UserError
from saejax.lab.codes import capacity, coherence, rules
from saejax.lab.experiments import figures
from saejax.lab.experiments.codes_data import FEATURES_OF_BERT
from saejax.lab.experiments.harness import Check, Experiment, Outcome, near, register

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Capacity(Experiment):
    """Every rule side by side; with n_atoms also the dimensions they need and the margin that d leaves."""

    name: ClassVar[str] = "codes/capacity"
    summary: ClassVar[str] = "capacity calculator: features that fit d_in dimensions with k active, by every rule"
    cpu_seconds: ClassVar[tuple[int, int]] = (2, 2)
    in_formulas: ClassVar[tuple[str, ...]] = ("d_in", "k", "n_atoms")

    d_in: int = 768
    """Dimensions (count, >= 1)."""
    k: int = 10
    """Active features (count, >= 1)."""
    n_atoms: int = 2**14
    """Features whose fit is asked for (count, > k)."""
    brief: bool = False
    """Leaves out the rows that nothing is expected of."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.d_in < 1 or self.k < 1:
            raise UserError(f"d_in = {self.d_in}, k = {self.k}: both must be at least 1")
        if self.n_atoms <= self.k:
            raise UserError(f"n_atoms = {self.n_atoms}: more than k = {self.k} is needed")

    def quick(self) -> Self:
        return dataclasses.replace(self, brief=True)

    def run(self) -> Outcome:
        rows = rules.table(self.d_in, self.k, self.n_atoms)
        facts = self._facts()
        checks = self._features(rows) + self._fits(rows)
        checks += [Check(quantity=name, measured=value, source="closed form") for name, value in facts.items()]
        if self.brief:
            checks = [check for check in checks if check.verdict != "-"]
        return Outcome({"rules": rows, "facts": facts}, checks, self._figure(rows))

    def _features(self, rows: list[dict[str, Any]]) -> list[Check]:
        """Features that fit; judged where the numbers are published."""
        checks = []
        for row in rows:
            log10 = row["log10_features"]
            quantity = f"features that fit {self.d_in} dims, {self.k} active: {row['rule']}"
            if log10 > 300:
                checks.append(Check(quantity=f"log10 of {quantity}", measured=log10, source=row["formula"]))
            elif (self.d_in, self.k) == (768, 10) and row["rule"] in FEATURES_OF_BERT:
                target = FEATURES_OF_BERT[row["rule"]]
                checks.append(near(quantity, 10**log10, target, 0.03 * target, row["formula"]))
            else:
                checks.append(Check(quantity=quantity, measured=10**log10, source=row["formula"]))
        return checks

    def _fits(self, rows: list[dict[str, Any]]) -> list[Check]:
        """Dimensions that n_atoms features need."""
        checks = []
        for row in rows:
            asked = f"for {self.n_atoms} features, {self.k} active: {row['rule']}"
            checks.append(Check(quantity=f"dims {asked}", measured=row["dims"], source=row["formula"]))
            checks.append(
                Check(
                    quantity=f"margin d/dims {asked}", measured=row["margin"], source="above 1: fits, a necessary sign"
                )
            )
            if math.isfinite(row["active"]):
                most = f"most active of {self.n_atoms} features in {self.d_in} dims: {row['rule']}"
                checks.append(Check(quantity=most, measured=row["active"], source=row["formula"]))
        return checks

    def _facts(self) -> dict[str, float]:
        """Entropy, capacity and bounds of this code."""
        n_atoms, k, d = self.n_atoms, self.k, self.d_in
        bits = capacity.entropy_bits(n_atoms, k)
        epsilon = capacity.sparsity_exponent(n_atoms, k)
        return {
            "entropy (bits)": bits,
            "entropy, k log2(eN/k) (bits)": capacity.entropy_bits_approximate(n_atoms, k),
            "dimensions per bit": d / bits,
            "epsilon = ln k / ln N": epsilon,
            "kappa(epsilon) (dims per k ln N)": capacity.kappa(epsilon),
            "C(epsilon) (nats per dim)": capacity.capacity(epsilon),
            "C(epsilon) (bits per dim)": capacity.capacity(epsilon) / math.log(2),
            "best threshold": capacity.optimal_threshold(n_atoms, k),
            "MAP threshold at d_in": capacity.map_threshold(n_atoms, k, d),
            "AWGN bound, one of N at noise k - 1, p = 0.1 (dims)": capacity.awgn_dim_lower_bound(
                n_atoms, max(k - 1, 1), 0.1
            ),
            "AWGN sufficient, same noise (dims)": capacity.awgn_dims_sufficient(n_atoms, max(k - 1, 1)),
            "Welch bound on mean square interference": coherence.welch_bound(n_atoms, d),
            "Welch bound on coherence": math.sqrt(coherence.welch_bound(n_atoms, d)),
            "dims for coherence < 1/2, p = 0.1": coherence.dims_for_coherence(n_atoms, 0.5, 0.1),
        }

    def _figure(self, rows: list[dict[str, Any]]) -> "Figure":
        figure, (ax,) = figures.new(width=6.5, height=3.8)
        shown = [row for row in rows if math.isfinite(row["log10_features"]) and row["log10_features"] < 300]
        ax.barh([row["rule"] for row in shown], [row["log10_features"] for row in shown], color=figures.COLOURS[0])
        for place, row in enumerate(shown):
            ax.annotate(f" {row['log10_features']:.1f}", (row["log10_features"], place), va="center", fontsize=7)
        ax.axvline(math.log10(self.n_atoms), color="0.35", linestyle=(0, (2, 2)), linewidth=0.9)
        title = f"{self.k} active in {self.d_in} dimensions; dotted: {self.n_atoms} features"
        figures.finish(ax, x="log10 of the features that fit", y="", title=title)
        return figure
