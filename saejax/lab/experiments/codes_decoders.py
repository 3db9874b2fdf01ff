"""Six decoders on the same codes: the dimensions at which each recovers 50 % and 90 % of all sets."""

import dataclasses
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np

from saejax.errors import UserError
from saejax.lab.codes import capacity, gaussian, success
from saejax.lab.codes.decoders import Decoder
from saejax.lab.codes.success import Curve
from saejax.lab.experiments import figures
from saejax.lab.experiments.codes_data import ITERATIVE, ONE_STEP, PAPER, RUN, trial_mesh
from saejax.lab.experiments.harness import Check, Experiment, Outcome, near, register

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Cell = tuple[int, int]
"""(log2 n_atoms, k)."""

PURSUITS = {"integer_pursuit": Decoder(method="integer_pursuit"), "omp": Decoder(method="omp", nonneg=False)}
CONVEX = {"basis_pursuit": True, "signed_bp": False}
"""Basis pursuit by whether it knows that codes are non-negative."""
ONE_STEP_TOLERANCE, ITERATIVE_TOLERANCE = 0.05, 0.08


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Fig4Decoders(Experiment):
    """P(exact recovery) against d for thresholds, top-k, integer pursuit, OMP and basis pursuit, per (N, k)."""

    name: ClassVar[str] = "codes/fig4_decoders"
    summary: ClassVar[str] = "success curves of six decoders; d50 and d90 against the reference tables"
    cpu_seconds: ClassVar[tuple[int, int]] = (1500, 60)

    log2_atoms: tuple[int, ...] = (12,)
    """log2 of the number of features (each 12, 14 or 16; basis pursuit takes hours on a laptop from 14 on)."""
    actives: tuple[int, ...] = (4, 16, 64)
    """Active features (each 4, 16 or 64)."""
    decoders: tuple[str, ...] = ("top_k", "threshold_half", "integer_pursuit", "omp", "basis_pursuit", "signed_bp")
    """Decoders to run, of top_k, threshold_half, integer_pursuit, omp, basis_pursuit, signed_bp."""
    n_dictionaries: int = 4
    """Dictionaries of the one-step decoders, 100 subsets each (count, >= 1)."""
    n_pursuit: int = 3
    """Dictionaries of the pursuits, 100 subsets each (count, >= 1)."""
    n_convex: int = 80
    """Subsets of basis pursuit, on one dictionary (count, >= 1)."""
    convex_iterations: int = 20_000
    """Steps of basis pursuit (count, >= 1); signals stop when they have converged, the sparsest codes last."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for cell in ((n, k) for n in self.log2_atoms for k in self.actives):
            if cell not in ONE_STEP:
                raise UserError(f"log2_atoms = {cell[0]}, actives = {cell[1]}: one of {sorted(ONE_STEP)} is needed")
        for name in self.decoders:
            if name not in {"top_k", "threshold_half", *PURSUITS, *CONVEX}:
                allowed = ", ".join(["top_k", "threshold_half", *PURSUITS, *CONVEX])
                raise UserError(f"decoders = {name!r}: some of {allowed} are needed")

    def quick(self) -> Self:
        return dataclasses.replace(self, log2_atoms=(12,), actives=(16,), n_convex=40, convex_iterations=2500)

    def run(self) -> Outcome:
        curves: dict[Cell, dict[str, Curve]] = {}
        for cell in ((n, k) for n in self.log2_atoms for k in self.actives):
            curves[cell] = self._one_step(cell) | self._solvers(cell)
        values = {f"2^{n}, k={k}": {name: _record(c) for name, c in found.items()} for (n, k), found in curves.items()}
        checks = [check for cell, found in curves.items() for check in self._checks(cell, found)]
        return Outcome({"curves": values}, checks, self._figure(curves))

    def _one_step(self, cell: Cell) -> dict[str, Curve]:
        """One pass over the dictionary serves both decoders at all dimensions."""
        wanted = {name: ONE_STEP[cell][name] for name in ONE_STEP[cell] if name in self.decoders}
        if not wanted:
            return {}
        grids = {name: _grid(*reference, n=12) for name, reference in wanted.items()}
        margins = success.one_step(
            2 ** cell[0],
            cell[1],
            np.unique(np.concatenate(list(grids.values()))).tolist(),
            n_dictionaries=self.n_dictionaries,
            seed=self.seed,
            mesh=trial_mesh(),
        )
        return {name: margins.top_k() if name == "top_k" else margins.threshold(0.5) for name in wanted}

    def _solvers(self, cell: Cell) -> dict[str, Curve]:
        curves = {}
        for name, (d50, d90) in ITERATIVE[cell].items():
            if name not in self.decoders:
                continue
            convex = name in CONVEX
            curves[name] = success.curve(
                self._basis_pursuit(CONVEX[name]) if convex else PURSUITS[name],
                2 ** cell[0],
                cell[1],
                _grid(d50, d90, n=6 if convex else 8).tolist(),
                n_dictionaries=1 if convex else self.n_pursuit,
                n_supports=self.n_convex if convex else 100,
                seed=self.seed,
                mesh=trial_mesh(),
            )
        return curves

    def _basis_pursuit(self, nonneg: bool) -> Decoder:
        return Decoder(method="basis_pursuit", nonneg=nonneg, options=(("max_iterations", self.convex_iterations),))

    def _checks(self, cell: Cell, found: dict[str, Curve]) -> list[Check]:
        checks, (n, k) = [], cell
        for name, curve in found.items():
            one_step = name in ONE_STEP[cell]
            d50, d90 = (ONE_STEP if one_step else ITERATIVE)[cell][name]
            share = ONE_STEP_TOLERANCE if one_step else ITERATIVE_TOLERANCE
            where = f"N = 2^{n}, k = {k}: {name}"
            checks.append(near(f"d50, {where}", curve.dims_at(0.5), d50, share * d50, RUN))
            if name not in CONVEX:
                checks.append(near(f"d90, {where}", curve.dims_at(0.9), d90, share * d90, RUN))
            elif k >= 16:
                delta = capacity.statistical_dimension(2**n, k, nonneg=CONVEX[name])
                # 80 trials leave 3 % in d50, 40 leave 4 %; the theory is asymptotic, within 2 % from k = 16 on.
                source = "Amelunxen et al. 2014: the statistical dimension"
                checks.append(near(f"d50 / delta, {where}", curve.dims_at(0.5) / delta, 1, 0.06, source))
        if "top_k" in found and "threshold_half" in found:
            lead = float((found["top_k"].probability - found["threshold_half"].probability).min())
            quantity = f"least lead of top-k over the threshold, N = 2^{n}, k = {k}"
            source = f"{PAPER}: top-k succeeds wherever a threshold does"
            checks.append(Check(quantity=quantity, measured=lead, low=0, source=source))
        return checks

    def _figure(self, curves: dict[Cell, dict[str, Curve]]) -> "Figure":
        figure, axes = figures.new(len(self.log2_atoms), len(self.actives), width=4.2, height=3)
        for ax, ((n, k), found) in zip(axes, curves.items(), strict=True):
            for index, (name, curve) in enumerate(found.items()):
                figures.line(ax, curve.dims, curve.probability, index, name, spread=curve.standard_error)
            if "top_k" in found:
                dims = found["top_k"].dims
                theory = [gaussian.top_k_success(2**n, k, d) for d in dims]
                figures.line(ax, dims, theory, 5, "top-k, Gaussian theory", marker=False, linewidth=0.8)
            ax.set_xscale("log")
            title = f"N = 2^{n}, k = {k}, H = {capacity.entropy_bits(2**n, k):.0f} bits"
            figures.finish(ax, x="dimensions d", y="P(exact set)", title=title, legend=ax is axes[0])
        return figure


def _grid(d50: float, d90: float, *, n: int) -> np.ndarray:
    """Dimensions from below half to above nine in ten."""
    return np.unique(np.geomspace(0.85 * d50, 1.15 * d90, n).round().astype(int))


def _record(curve: Curve) -> dict[str, object]:
    return {
        "dims": curve.dims,
        "probability": curve.probability,
        "trials": curve.trials,
        "unconverged": curve.unconverged,
        "d50": curve.dims_at(0.5),
        "d90": curve.dims_at(0.9),
    }
