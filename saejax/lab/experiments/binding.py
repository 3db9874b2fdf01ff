"""Binding problem: does a sum of parts keep which colour belongs to which shape?

Scenes hold two objects, each a role (its shape or place) and a filler (its colour). A sum code adds a vector per role
and a vector per filler. Swapping the fillers changes nothing, so no sparse code can recover the pairing. A role-filler
code adds the outer product of each pair, the tensor product representation; it is the positive control.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
from jaxtyping import Float, Int

from saejax.errors import UserError
from saejax.lab.experiments import figures
from saejax.lab.experiments.harness import Check, Experiment, Outcome, near, register
from saejax.lab.metrics import binding, over

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SOURCE = "Klindt et al. 2025, open question on binding; Smolensky 1990, tensor product representations"


@dataclasses.dataclass(frozen=True)
class Scenes:
    """Two objects per scene, and the same parts bound the other way.

    Attributes:
      roles: two distinct roles per scene, [rows, 2].
      fillers: two distinct fillers per scene, [rows, 2]; object i has role i and filler i.
    """

    roles: Int[np.ndarray, "rows 2"]
    fillers: Int[np.ndarray, "rows 2"]

    def swapped(self) -> Scenes:
        """The same roles and fillers, each role with the other filler."""
        return Scenes(self.roles, self.fillers[:, ::-1])


def draw(rng: np.random.Generator, rows: int, n_roles: int, n_fillers: int) -> Scenes:
    """Draws scenes of two different roles and two different fillers, uniformly."""

    def pairs(n: int) -> np.ndarray:
        first = rng.integers(n, size=rows)
        return np.stack([first, (first + rng.integers(1, n, size=rows)) % n], axis=1)

    return Scenes(pairs(n_roles), pairs(n_fillers))


@dataclasses.dataclass(frozen=True)
class Parts:
    """Unit vectors of all parts.

    Attributes:
      roles: [n_roles, d].
      fillers: [n_fillers, d].
    """

    roles: Float[np.ndarray, "n_roles d"]
    fillers: Float[np.ndarray, "n_fillers d"]

    def summed(self, scenes: Scenes) -> Float[np.ndarray, "rows d"]:
        """sum over objects of role + filler: [rows, d]."""
        return self.roles[scenes.roles].sum(axis=1) + self.fillers[scenes.fillers].sum(axis=1)

    def bound(self, scenes: Scenes) -> Float[np.ndarray, "rows d2"]:
        """sum over objects of role (x) filler: [rows, d * d]."""
        product = np.einsum("boi,boj->bij", self.roles[scenes.roles], self.fillers[scenes.fillers])
        return product.reshape(len(product), -1)

    def rectified(self, scenes: Scenes) -> Float[np.ndarray, "rows d"]:
        """sum over objects of ReLU(role + filler): the least nonlinearity before the sum, [rows, d]."""
        return np.maximum(self.roles[scenes.roles] + self.fillers[scenes.fillers], 0.0).sum(axis=1)


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorProduct(Experiment):
    """The binding distance of a sum code, of a role-filler code, and of a sum after one nonlinearity."""

    name: ClassVar[str] = "binding/tpr"
    summary: ClassVar[str] = "a sum of parts cannot say what belongs to what; a role-filler code can"
    cpu_seconds: ClassVar[tuple[int, int]] = (3, 3)

    n_roles: int = 16
    """Roles; at least 2."""
    n_fillers: int = 16
    """Fillers; at least 2."""
    d: int = 64
    """Dimensions of the vector of a part; the role-filler code has d squared."""
    rows: int = 4_000
    """Scenes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for field, least in {"n_roles": 2, "n_fillers": 2, "d": 1, "rows": 2}.items():
            if getattr(self, field) < least:
                raise UserError(f"{field}={getattr(self, field)}: at least {least} is needed")

    def quick(self) -> Self:
        """A quarter of the scenes."""
        return dataclasses.replace(self, rows=1_000)

    def run(self) -> Outcome:
        rng = np.random.default_rng(self.seed)
        scenes = draw(rng, self.rows, self.n_roles, self.n_fillers)
        parts = Parts(*(_unit(rng.standard_normal((n, self.d))) for n in (self.n_roles, self.n_fillers)))
        values = {}
        for name, code in {"sum": parts.summed, "role-filler": parts.bound, "sum of ReLU": parts.rectified}.items():
            f, g = (np.asarray(code(s), np.float32) for s in (scenes, scenes.swapped()))
            values[name] = dict(over.over(binding.Binding(), binding.SwapBatch(f_bound=f, f_swapped=g), rows=500))
        # For orthogonal parts |a(x)x + b(x)y - a(x)y - b(x)x|^2 = |a - b|^2 |x - y|^2 is 4, and |a(x)x + b(x)y|^2 is 2:
        # sqrt(2). Random unit vectors have inner products of size d^-1/2, so the mean stays within twice that.
        tolerance = 2 / self.d**0.5
        distance = {name: found["binding_distance"] for name, found in values.items()}
        checks = [
            # Both scenes add the same four vectors; only the order of one addition differs.
            Check(quantity="binding distance, sum code", measured=distance["sum"], high=1e-6, source=SOURCE),
            Check(quantity="binding distance, role-filler", measured=distance["role-filler"], low=0.5, source=SOURCE),
            near(
                "binding distance, role-filler",
                distance["role-filler"],
                math.sqrt(2),
                tolerance,
                "closed form for orthogonal parts",
            ),
            Check(quantity="binding distance, sum of ReLU", measured=distance["sum of ReLU"], source="shown"),
        ]
        return Outcome(values=values, checks=checks, figure=_figure(values))


def _unit(x: np.ndarray) -> np.ndarray:
    """Rows of length 1."""
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def _figure(values: dict[str, dict[str, float]]) -> Figure:
    """The distance of each code beside that of unrelated scenes."""
    figure, (ax,) = figures.new(width=5.2)
    series = {
        "same parts, bound otherwise": "binding_distance_rms",
        "unrelated scenes": "binding_distance_rms_shuffled",
    }
    rows = [[values[code][key] for code in values] for key in series.values()]
    figures.bars(ax, list(values), rows, series=list(series))
    ax.set_ylim(0, 2)  # room for the legend
    figures.finish(ax, x="code", y="distance between scenes / length (rms)", legend=True)
    return figure
