"""Non-Euclidean latents: is an angle linearly identified, or only its embedding?

Latents on a circle, a torus, or the rotations of space cluster around classes with density exp(kappa <E(c), E(z)>),
E the usual embedding (cosine and sine; nine matrix entries). The best logits are linear in E(z), so a classifier can
hold E(z) linearly, never the raw angle, which jumps: the probe must ask for embedding coordinates.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from saejax.errors import UserError
from saejax.lab.experiments import classifier, figures
from saejax.lab.experiments.harness import Check, Experiment, Outcome, near, register
from saejax.lab.metrics import identifiability, manifold_probe, over

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Angles = Float[np.ndarray, "rows q"]
Embedded = Float[np.ndarray, "rows n"]


def rotation_vectors(matrices: Embedded) -> Angles:
    """Inverse of `rotation_matrices` for angles below pi: [rows, 9] -> [rows, 3]."""
    m = matrices.reshape(-1, 3, 3)
    axial = np.stack([m[:, 2, 1] - m[:, 1, 2], m[:, 0, 2] - m[:, 2, 0], m[:, 1, 0] - m[:, 0, 1]], axis=1)
    length = np.linalg.norm(axial, axis=1, keepdims=True)  # 2 sin(angle)
    angle = np.arctan2(length, np.trace(m, axis1=1, axis2=2)[:, None] - 1)
    return angle * axial / np.maximum(length, 1e-300)


def rotation_angles(rng: np.random.Generator, rows: int, kappa: float) -> np.ndarray:
    """Draws the angle of a rotation S with density exp(kappa tr S): proportional to (1 - cos a) exp(2 kappa cos a).

    The cumulative density is tabulated at 2^14 points, and inverted linearly in between; returns [rows].
    """
    edges = np.linspace(0, np.pi, 2**14)
    centres = (edges[1:] + edges[:-1]) / 2
    mass = (1 - np.cos(centres)) * np.exp(2 * kappa * (np.cos(centres) - 1))
    cumulative = np.concatenate([[0.0], np.cumsum(mass)])
    return np.interp(rng.random(rows), cumulative / cumulative[-1], edges)


def draw_circles(q: int) -> Callable[..., tuple[Angles, Angles]]:
    """A sampler of (latents [rows, q], class centres [n_classes, q]) on q circles, angles in (-pi, pi]."""

    def draw(rng: np.random.Generator, labels: np.ndarray, n_classes: int, kappa: float) -> tuple[Angles, Angles]:
        centres = rng.uniform(-np.pi, np.pi, (n_classes, q))
        turned = centres[labels] + rng.vonmises(0.0, kappa, (len(labels), q))
        return np.angle(np.exp(1j * turned)), centres

    return draw


def draw_rotations(rng: np.random.Generator, labels: np.ndarray, n_classes: int, kappa: float) -> tuple[Angles, Angles]:
    """A sampler of rotation vectors (latents [rows, 3], class centres [n_classes, 3]) of length at most pi."""

    def about(angles: np.ndarray) -> Angles:
        axes = rng.standard_normal((len(angles), 3))
        return angles[:, None] * axes / np.linalg.norm(axes, axis=1, keepdims=True)

    centres = about(rotation_angles(rng, n_classes, 0.0))
    turns = manifold_probe.rotation_matrices(about(rotation_angles(rng, len(labels), kappa))).reshape(-1, 3, 3)
    turned = manifold_probe.rotation_matrices(centres)[labels].reshape(-1, 3, 3) @ turns
    return rotation_vectors(turned.reshape(-1, 9)), centres


@dataclasses.dataclass(frozen=True)
class Space:
    """A space of latents.

    Attributes:
      manifold: what `ManifoldProbe` calls it.
      draw: (rng, labels, n_classes, kappa) -> latents, class centres.
      embed: latents [rows, q] -> [rows, n].
      linear_angle_r2: R2 of the best linear map from E(z) to the raw coordinates, for uniform z: what a perfect
        representation scores on them.
      kappa: concentration of the clusters.
    """

    manifold: Literal["circles", "rotations"]
    draw: Callable[..., tuple[Angles, Angles]]
    embed: Callable[[Angles], Embedded]
    linear_angle_r2: float
    kappa: float


SPACES = {
    "circle": Space("circles", draw_circles(1), manifold_probe.embed_circles, 6 / math.pi**2, 10.0),
    "torus": Space("circles", draw_circles(2), manifold_probe.embed_circles, 6 / math.pi**2, 4.0),
    "rotations": Space(
        "rotations", draw_rotations, manifold_probe.rotation_matrices, (25 / 16) / (1 + math.pi**2 / 6), 3.0
    ),
}
"""Circle: E[t sin t]^2 / (E[t^2] E[sin^2 t]) = 6 / pi^2, and the cosine adds nothing. Rotations: the same quotient for
the angle of a uniform rotation, whose density is (1 - cos a) / pi. Each kappa lets neighbouring clusters overlap:
where a space of more dimensions is left empty between them (torus with kappa 10: R2 .82), training stops short."""

MEASURED = "own measurement, on an open question of Klindt et al. 2025"
CLOSED = "closed form for uniform latents: 6 / pi^2 on circles, .5908 for rotations"


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class NonEuclidean(Experiment):
    """Linear probes for embedding coordinates and for raw angles, on latents that are not Euclidean."""

    name: ClassVar[str] = "ident/noneuclid"
    summary: ClassVar[str] = "latents on circles and rotations: the embedding is linearly readable, the angle is not"
    cpu_seconds: ClassVar[tuple[int, int]] = (35, 20)

    spaces: tuple[str, ...] = tuple(SPACES)
    """Which spaces; see `SPACES`."""
    n_classes: int = 100
    """Clusters in each space."""
    n_train: int = 100_000
    """Rows to train on."""
    n_test: int = 4_000
    """Rows to measure on."""
    n_steps: int = 4_000
    """Updates of the classifier."""
    batch: int = 256
    """Rows per update."""
    learning_rate: float = 0.01
    """Of Adam, falling to 0 along half a cosine."""

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = [space for space in self.spaces if space not in SPACES]
        if unknown or not self.spaces:
            raise UserError(f"spaces={list(self.spaces)}: some of {list(SPACES)} are needed")

    def quick(self) -> Self:
        """Half the steps: R2 of the embedding falls by at most .02."""
        return dataclasses.replace(self, n_steps=2_000)

    def run(self) -> Outcome:
        values = {name: self.measure(SPACES[name]) for name in self.spaces}
        checks = []
        for name, found in values.items():
            checks += _checks(name, found)
        return Outcome(values=values, checks=checks, figure=_figure(values))

    def measure(self, space: Space) -> dict[str, float]:
        """Trains one classifier and probes its representation."""
        rng = np.random.default_rng(self.seed)
        labels = rng.integers(self.n_classes, size=self.n_train + self.n_test)
        angles, centres = space.draw(rng, labels, self.n_classes, space.kappa)
        embedded = space.embed(angles)
        n = embedded.shape[1]
        x = classifier.mixing(rng, embedded).astype(np.float32)
        trained = classifier.train(
            classifier.Classifier(encoder=classifier.MLP(widths=(n, 128, 128, 128, n)), n_classes=self.n_classes),
            x[: self.n_train],
            labels[: self.n_train],
            seed=self.seed,
            n_steps=self.n_steps,
            batch=self.batch,
            learning_rate=self.learning_rate,
        )
        represent = jax.jit(trained.model.representation)
        layers = {
            "": represent(trained.params, x),
            "_untrained": represent(trained.start, x),
            "_input": x,
            "_limit": embedded,
        }
        test = slice(self.n_train, None)
        gap = over.over(
            identifiability.CrossEntropyGap(),
            identifiability.ClassBatch(
                logits=trained.model.logits(trained.params, jnp.asarray(x[test])),
                bayes_logits=space.kappa * embedded[test] @ space.embed(centres).T,
                label=labels[test],
            ),
        )
        found = {"ce_gap": gap["ce_gap"], "r2_angle_limit_uniform": space.linear_angle_r2}
        for name, h in layers.items():
            score = self.probe(space, h, angles)
            found |= {f"r2_embedding{name}": score["manifold_r2"], f"r2_angle{name}": score["manifold_raw_r2"]}
            found |= {f"angular_error{name}": score["angular_error"]}
            found |= {f"angular_error_chance{name}": score["angular_error_chance"]}
        return found

    def probe(self, space: Space, h: Any, angles: Angles) -> dict[str, float]:
        """Linear probes on the last `n_test` rows, fitted to all others."""
        ids = np.arange(len(angles))
        batch = manifold_probe.ManifoldBatch(h=np.asarray(h), point=angles, test=ids >= self.n_train, row_id=ids)
        return over.over(manifold_probe.ManifoldProbe(manifold=space.manifold), batch)


def _checks(name: str, found: dict[str, float]) -> list[Check]:
    """Rows of the table for one space.

    Measured over three seeds: embedding .965 to .997 (.953 to .990 with half the steps), angle .53 to .62. A perfectly
    linear representation would score `r2_angle_limit` on the angle; what is nonlinear in the trained one moves it by
    .034 at most (.062 with half the steps).
    """
    limit = found["r2_angle_limit"]
    return [
        Check(quantity=f"R2 embedding, {name}", measured=found["r2_embedding"], low=0.9, source=MEASURED),
        Check(quantity=f"R2 raw angle, {name}", measured=found["r2_angle"], high=0.7, source=MEASURED),
        near(f"R2 raw angle above a perfect embedding's, {name}", found["r2_angle"] - limit, 0.0, 0.08, CLOSED),
        Check(quantity=f"R2 embedding from the input, {name}", measured=found["r2_embedding_input"], source="control"),
    ]


def _figure(values: dict[str, dict[str, float]]) -> Figure:
    """R2 of the embedding and of the raw angle, for the trained network, the untrained one, and the input."""
    figure, axes = figures.new(1, 2, width=5.2)
    names = list(values)
    series = {"trained": "", "from the input": "_input", "untrained": "_untrained", "perfect embedding": "_limit"}
    for ax, (target, label) in zip(axes, {"embedding": "embedding", "angle": "raw angle"}.items(), strict=True):
        rows = [[values[space][f"r2_{target}{key}"] for space in names] for key in series.values()]
        figures.bars(ax, names, rows, series=list(series))
        ax.set_ylim(0, 1.4)  # room for the legend
        figures.finish(ax, x="space of the latents", y=f"R2 of a linear probe for the {label}", legend=True)
    return figure
