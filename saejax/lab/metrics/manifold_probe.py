r"""Linear probes of latents on a circle or among rotations.

Every chart cuts an angle somewhere, so a linear probe of the raw angle fails even where the representation holds the
circle. So the probe predicts (cos, sin), or the entries of a rotation matrix. Its answer is projected back onto the
circle (atan2) or the rotations (singular value decomposition), and its error is a true angle.

Sources:
  Klindt et al., From superposition to sparse codes, 2025, on latents of non-Euclidean geometry.
"""

import dataclasses
from typing import ClassVar, Literal

import numpy as np
from flax import struct
from jaxtyping import Float

from saejax.errors import UserError
from saejax.evals import metric
from saejax.lab.metrics import least_squares, rows


@struct.dataclass
class ManifoldBatch:
    """Representations and the points behind them.

    Attributes:
      h: Representations, [b, m].
      point: Angles in radians, [b, a], or rotation vectors (axis times angle), [b, 3].
      test: Whether the row judges (1) or trains (0) the probe, [b] bool or integers.
      row_id: Distinct for every row, [b] integers.
      weight: 1 for a real row, 0 for padding, [b] float32.
    """

    shared: ClassVar[tuple[str, ...]] = ()

    h: rows.Rows
    point: rows.Rows
    test: rows.Rows
    row_id: rows.Rows
    weight: rows.Rows = None


@metric.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class ManifoldProbe(rows.Kept, metric.Metric):
    """R2 of the embedded point and of the raw coordinates, and the error as an angle; rows are kept on the host."""

    name: ClassVar[str] = "manifold_probe"
    batch_type: ClassVar[type] = ManifoldBatch
    manifold: Literal["circles", "rotations"] = "circles"
    """Whether `point` holds angles, one for each circle of a torus, or one rotation of space."""
    ridge: float = 0.0
    """Penalty on the squared map, in units of the mean variance of h; 0 or more, 0 for least squares."""
    seed: int = 0
    """Of the control's pairing."""

    def kept(self, batch: ManifoldBatch) -> dict[str, np.ndarray]:
        if self.manifold not in ("circles", "rotations"):
            raise UserError(f"manifold must be one of circles, rotations, got {self.manifold!r}")
        width = np.shape(batch.point)[-1]
        if self.manifold == "rotations" and width != 3:
            raise UserError(f"point must hold rotation vectors [n, 3], got [n, {width}]")
        return {
            "row_id": np.asarray(batch.row_id),
            "h": np.asarray(batch.h, np.float64),
            "point": np.asarray(batch.point, np.float64),
            "test": np.asarray(batch.test).astype(np.int64),
        }

    def compute(self, state: dict[str, np.ndarray]) -> dict[str, float | np.ndarray]:
        state = rows.ordered(state)
        h, test = state["h"], state["test"] > 0
        if test.all() or not test.any():
            raise UserError(f"test must mark some rows and leave some to train on, got {int(test.sum())} of {len(h)}")
        embedded = embed_circles(state["point"]) if self.manifold == "circles" else rotation_matrices(state["point"])
        raw = _wrapped(state["point"]) if self.manifold == "circles" else state["point"]
        q, m = embedded.shape[1], h.shape[1]
        joint = np.concatenate([h, embedded, raw], axis=1)
        train = least_squares.moments(joint[~test])
        weights, intercept = least_squares.fit(train, m, ridge=self.ridge)
        scores = least_squares.r2(least_squares.moments(joint[test]), weights, intercept)
        guess = h[test] @ weights + intercept[None, :]
        other = rows.shuffled(state["row_id"][test], self.seed)
        truth = embedded[test]
        by_embedding = self._error(guess[:, :q], truth)
        return {
            "manifold_r2": float(np.nanmean(scores[:q])),
            "manifold_raw_r2": float(np.nanmean(scores[q:])),
            "angular_error": by_embedding,
            "angular_error_raw": self._error(self._embed(guess[:, q:]), truth),
            "angular_error_chance": self._error(guess[:, :q], truth[other]),
        }

    def _embed(self, point: np.ndarray) -> np.ndarray:
        return embed_circles(point) if self.manifold == "circles" else rotation_matrices(point)

    def _error(self, guess: np.ndarray, truth: np.ndarray) -> float:
        """Mean angle in radians between guessed and true points."""
        if self.manifold == "circles":
            a = guess.shape[1] // 2
            angles = np.arctan2(guess[:, a:], guess[:, :a]) - np.arctan2(truth[:, a:], truth[:, :a])
            return float(np.abs(_wrapped(angles)).mean())
        return float(_geodesic(_nearest_rotation(guess), truth.reshape(-1, 3, 3)).mean())

    def definitions(self) -> dict[str, str]:
        circles = self.manifold == "circles"
        what = "(cos, sin) of each angle" if circles else "the nine entries of the rotation matrix"
        raw = "each angle itself, in [-pi, pi)" if circles else "the rotation vector"
        back = "atan2 of the guessed (sin, cos)" if circles else "the rotation nearest to the guessed matrix"
        return {
            "manifold_r2": f"Linear map with intercept from h to {what}, fitted to the train rows: mean over columns "
            "of 1 - squared error / squared deviation from the mean, both over the test rows.",
            "manifold_raw_r2": f"As manifold_r2, for {raw}.",
            "angular_error": f"Mean angle in radians, over test rows, between the truth and {back}.",
            "angular_error_raw": f"As angular_error, for the point guessed by a linear map to {raw}.",
            "angular_error_chance": "Control: as angular_error, with the truth of another test row.",
        }


def rotation_matrices(vectors: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "n 9"]:
    """Rotation matrices of rotation vectors (axis times angle in radians), flattened; Rodrigues' formula."""
    angle = np.linalg.norm(vectors, axis=1)
    x, y, z = (vectors / np.where(angle > 0, angle, 1.0)[:, None]).T
    zero = np.zeros_like(x)
    cross = np.stack([zero, -z, y, z, zero, -x, -y, x, zero], axis=1).reshape(-1, 3, 3)
    sin, cos = np.sin(angle)[:, None, None], np.cos(angle)[:, None, None]
    return (np.eye(3)[None] + sin * cross + (1 - cos) * cross @ cross).reshape(-1, 9)


def embed_circles(angles: Float[np.ndarray, "n a"]) -> Float[np.ndarray, "n m"]:
    """All cosines, then all sines: [n, a] -> [n, 2 a].

    Examples:
      >>> embed_circles(np.array([[0.0, np.pi / 2]])).round(3).tolist()
      [[1.0, 0.0, 0.0, 1.0]]
    """
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1)


def _wrapped(angles: np.ndarray) -> np.ndarray:
    """Into [-pi, pi)."""
    return (angles + np.pi) % (2 * np.pi) - np.pi


def _nearest_rotation(entries: np.ndarray) -> np.ndarray:
    """The rotation nearest to each matrix in the Frobenius norm, [n, 3, 3]."""
    u, _, vt = np.linalg.svd(entries.reshape(-1, 3, 3))
    sign = np.where(np.linalg.det(u @ vt) < 0, -1.0, 1.0)
    u = u * np.stack([np.ones_like(sign), np.ones_like(sign), sign], axis=1)[:, None, :]
    return u @ vt


def _geodesic(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Angle of the rotation from one to the other, [n] radians."""
    apart = np.linalg.norm(a - b, axis=(1, 2)) / 8**0.5
    return 2 * np.arcsin(np.clip(apart, 0.0, 1.0))
