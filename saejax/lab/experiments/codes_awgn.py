"""Random codebook in white noise: success turns at the Shannon limit, not at Proposition 3 as printed."""

import dataclasses
import math
from typing import TYPE_CHECKING, ClassVar, Self

import jax
import numpy as np

from saejax.lab.codes import awgn, capacity
from saejax.lab.codes.arguments import check_positive, check_sizes
from saejax.lab.experiments import figures
from saejax.lab.experiments.codes_data import PAPER, RUN
from saejax.lab.experiments.harness import Check, Experiment, Outcome, near, register

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class AWGNCodebook(Experiment):
    """P(nearest codeword is the sent one) against d, by simulation and by an integral over spherical caps."""

    name: ClassVar[str] = "codes/awgn_codebook"
    summary: ClassVar[str] = (
        "a random codebook in white noise turns at the Shannon limit; the printed bound is too small"
    )
    cpu_seconds: ClassVar[tuple[int, int]] = (20, 8)

    n_codewords: int = 2**14
    """Codewords (count, >= 2)."""
    noise: float = 1.0
    """Noise power over signal power (above 0)."""
    dims: tuple[int, ...] = (16, 20, 24, 28, 33, 38, 44)
    """Dimensions (each >= 2)."""
    trials: int = 2000
    """Messages per dimension, over 20 codebooks (count, >= 20)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(n_codewords=self.n_codewords, trials=self.trials)
        check_positive(noise=self.noise)
        for d in self.dims:
            check_sizes(dims=d)

    def quick(self) -> Self:
        return dataclasses.replace(self, dims=(20, 28, 38), trials=1000)

    def run(self) -> Outcome:
        key = jax.random.key(self.seed)
        measured = {
            d: float(
                awgn.success(
                    jax.random.fold_in(key, d), self.n_codewords, d, self.noise, self.trials, n_codebooks=20
                ).mean()
            )
            for d in self.dims
        }
        exact = {d: awgn.exact_success(self.n_codewords, d, self.noise) for d in self.dims}
        limits = {
            "printed Proposition 3": 2 * self.noise * math.log(self.n_codewords),
            "Shannon limit": capacity.awgn_dims_sufficient(self.n_codewords, self.noise),
            "needed for P = 0.5": capacity.awgn_dim_lower_bound(self.n_codewords, self.noise, 0.5),
            "needed for P = 0.9": capacity.awgn_dim_lower_bound(self.n_codewords, self.noise, 0.1),
        }
        checks = self._checks(measured, exact, limits)
        return Outcome(
            {"measured": measured, "exact": exact, "limits": limits}, checks, self._figure(measured, exact, limits)
        )

    def _checks(self, measured: dict[int, float], exact: dict[int, float], limits: dict[str, float]) -> list[Check]:
        # Three standard errors of the trials, doubled because trials share codebooks, and 0.002 of the integral.
        tolerance = 3 * 2 * math.sqrt(0.25 / self.trials) + 0.002
        checks = [
            near(f"P(success), d = {d}", p, exact[d], tolerance, "exact integral over spherical caps")
            for d, p in measured.items()
        ]
        if (self.n_codewords, self.noise) != (2**14, 1.0):
            return checks
        if 38 in measured:
            checks.append(near("P(success), d = 38, against the reference", measured[38], 0.90, 0.08, RUN))
        if 20 in measured:
            source = f"{RUN} of 60 trials; the exact value is 0.36, so not judged"
            checks.append(
                Check(quantity="P(success), d = 20, 60 trials gave 0.23", measured=measured[20], source=source)
            )
        least = limits["Shannon limit"] / limits["printed Proposition 3"]
        source = f"{PAPER}, Corollary 1 contradicts Proposition 3 as printed"
        checks.append(
            Check(quantity="Shannon limit over printed Proposition 3", measured=least, low=1.2, source=source)
        )
        beyond = math.ceil(limits["printed Proposition 3"])
        p = awgn.exact_success(self.n_codewords, beyond, self.noise)
        quantity = f"P(success) at the printed Proposition 3, d = {beyond}"
        checks.append(Check(quantity=quantity, measured=p, high=0.5, source="exact integral over spherical caps"))
        return checks

    def _figure(self, measured: dict[int, float], exact: dict[int, float], limits: dict[str, float]) -> "Figure":
        figure, (ax,) = figures.new(width=5)
        spread = [math.sqrt(p * (1 - p) / self.trials) for p in measured.values()]
        figures.line(ax, list(measured), list(measured.values()), 0, "simulated", spread=spread, linestyle="none")
        fine = np.arange(max(min(exact) - 4, 2), max(exact) + 5)
        exact_curve = [awgn.exact_success(self.n_codewords, int(d), self.noise) for d in fine]
        figures.line(ax, fine, exact_curve, 1, "exact", marker=False)
        for name, style in (("printed Proposition 3", (0, (1, 1))), ("Shannon limit", (0, (4, 2)))):
            ax.axvline(limits[name], color="0.35", linewidth=1, linestyle=style, label=f"{name}: {limits[name]:.1f}")
        title = f"{self.n_codewords} codewords, noise / signal = {self.noise:g}"
        figures.finish(ax, x="dimensions d", y="P(nearest is the sent one)", title=title, legend=True)
        return figure
