"""Coherence of random dictionaries: the dimension of Proposition 1 against the measured one."""

import dataclasses
import math
from typing import TYPE_CHECKING, ClassVar, Self

import jax
import numpy as np

from saejax.lab.codes import coherence, dictionaries
from saejax.lab.codes.arguments import check_positive, check_probability, check_sizes
from saejax.lab.experiments import figures
from saejax.lab.experiments.codes_data import PAPER
from saejax.lab.experiments.harness import Check, Experiment, Outcome, register

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHARES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Dimensions that are measured, over the bound."""


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Coherence(Experiment):
    """Share of Rademacher dictionaries with coherence below epsilon, at and below the dimension of Proposition 1."""

    name: ClassVar[str] = "codes/coherence"
    summary: ClassVar[str] = "Proposition 1: enough dimensions for epsilon-orthogonal atoms with probability 1 - p"
    cpu_seconds: ClassVar[tuple[int, int]] = (40, 8)

    n_atoms: int = 1024
    """Features (count, >= 2)."""
    epsilons: tuple[float, ...] = (0.25, 0.5)
    """Coherence to stay below (each above 0)."""
    p: float = 0.1
    """Probability of failure that the proposition allows (in (0, 1))."""
    n_draws: int = 100
    """Dictionaries per point (count, >= 1)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(n_atoms=self.n_atoms, n_draws=self.n_draws)
        check_probability(p=self.p)
        for epsilon in self.epsilons:
            check_positive(epsilons=epsilon)

    def quick(self) -> Self:
        return dataclasses.replace(self, n_atoms=256)

    def run(self) -> Outcome:
        values, checks = {}, []
        for epsilon in self.epsilons:
            bound = coherence.dims_for_coherence(self.n_atoms, epsilon, self.p)
            dims = [math.ceil(share * bound) for share in SHARES]
            shares = [self._share(d, epsilon) for d in dims]
            values[epsilon] = {"bound": bound, "dims": dims, "share": shares}
            source = f"{PAPER}, Proposition 1"
            quantity = f"P(coherence < {epsilon}), N = {self.n_atoms}, d = {dims[-1]}"
            checks.append(Check(quantity=quantity, measured=shares[-1], low=1 - self.p, source=source))
            # Proposed and measured here: the union bound is loose by about a fifth, far below it the claim fails.
            quantity = f"P(coherence < {epsilon}) at half of that d"
            checks.append(Check(quantity=quantity, measured=shares[0], high=0.5, source="the bound is not vacuous"))
        return Outcome({str(epsilon): found for epsilon, found in values.items()}, checks, self._figure(values))

    def _share(self, d: int, epsilon: float) -> float:
        keys = jax.random.split(jax.random.fold_in(jax.random.key(self.seed), d), self.n_draws)
        found = [coherence.coherence(dictionaries.rademacher(key, self.n_atoms, d)) for key in keys]
        return float((np.array(found) < epsilon).mean())

    def _figure(self, values: dict[float, dict]) -> "Figure":
        figure, (ax,) = figures.new()
        for index, (epsilon, found) in enumerate(values.items()):
            at = np.array(found["dims"]) / found["bound"]
            figures.line(ax, at, found["share"], index, f"epsilon = {epsilon}, bound {found['bound']:.0f}")
        figures.reference(ax, 1 - self.p, "1 - p")
        title = f"{self.n_draws} dictionaries of {self.n_atoms} atoms"
        figures.finish(ax, x="d / bound of Proposition 1", y="P(coherence < epsilon)", title=title, legend=True)
        return figure
