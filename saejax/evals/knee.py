r"""Knee of a trade-off curve, such as FVU against L0 in a sweep, with its uncertainty.

The curve is made monotone (its lower envelope along the direction in which it falls), and both axes are scaled to [0,
1]. The knee is the point farthest below the straight line between the ends.

Source: Satopaa et al., Finding a "kneedle" in a haystack, 2011.
"""

import numpy as np
from jaxtyping import Float

from saejax.errors import UserError

DEFINITIONS: dict[str, str] = {
    "knee_index": "Index, in the order given, of the point of the sweep farthest below the chord; -1 where none is "
    "below.",
    "knee_x": "x of that point.",
    "knee_y": "y of that point, before the curve was made monotone.",
    "knee_depth": "How far it lies below the chord, both axes scaled to [0, 1]; 0 for a straight line, which has no "
    "knee.",
    "knee_x_low": "2.5% quantile of knee_x over the bootstrap.",
    "knee_x_high": "97.5% quantile of knee_x over the bootstrap.",
    "knee_found_share": "Share of bootstrap draws that have a knee at all.",
}


def knee(
    x: Float[np.ndarray, "n"], y: Float[np.ndarray, "*runs n"], *, bootstrap: int = 200, seed: int = 0
) -> dict[str, float]:
    """Finds the knee of a sweep and its confidence interval.

    Args:
      x: Settings or measured L0, [n], n >= 3 of them distinct, in any order. Give logarithms where the sweep is
        geometric: the knee depends on the scale of x.
      y: The loss there, [n], or [n_runs, n] with one row per seed, whose mean is the curve. Falls or rises with x.
      bootstrap: Draws: of runs where there are at least two, else of points, both ends kept.
      seed: Of those.

    Returns:
      The keys of DEFINITIONS.

    Raises:
      UserError: shapes that do not fit, fewer than 3 distinct x, values that are not finite, or no draws.

    Examples:
      >>> found = knee(np.arange(5.0), np.array([1.0, 0.2, 0.1, 0.05, 0.0]))
      >>> found["knee_index"], found["knee_x"]
      (1.0, 1.0)
    """
    x, runs = np.asarray(x, np.float64), np.atleast_2d(np.asarray(y, np.float64))
    if x.ndim != 1 or runs.ndim != 2 or runs.shape[1] != len(x):
        raise UserError(f"y must be [n] or [n_runs, n] for x [n], got {list(np.shape(y))} for {list(x.shape)}")
    if not (np.isfinite(x).all() and np.isfinite(runs).all()):
        raise UserError("x and y must be finite, got NaN or infinity")
    if len(np.unique(x)) < 3:
        raise UserError(f"x must have at least 3 different values, got {len(np.unique(x))}")
    if bootstrap < 1:
        raise UserError(f"bootstrap must be at least 1, got {bootstrap}")
    order = np.argsort(x, kind="stable")
    x, runs = x[order], runs[:, order]
    mean = runs.mean(axis=0)
    index, depth = _knee(x, mean)
    rng = np.random.default_rng(seed)
    draws = np.array([_drawn(x, runs, rng) for _ in range(bootstrap)])
    known = draws[~np.isnan(draws)]
    low, high = np.quantile(known, (0.025, 0.975)) if known.size else (np.nan, np.nan)
    return {
        "knee_index": float(order[index]) if index >= 0 else -1.0,
        "knee_x": float(x[index]) if index >= 0 else float("nan"),
        "knee_y": float(mean[index]) if index >= 0 else float("nan"),
        "knee_depth": depth,
        "knee_x_low": float(low),
        "knee_x_high": float(high),
        "knee_found_share": known.size / bootstrap,
    }


def _knee(x: np.ndarray, y: np.ndarray) -> tuple[int, float]:
    """Index of the knee of a curve sorted by x, or -1, and its depth below the chord."""
    falls = y[0] >= y[-1]
    # The lower envelope: the best loss at no more (falling) or no less (rising) than this x.
    hull = np.minimum.accumulate(y) if falls else np.minimum.accumulate(y[::-1])[::-1]
    span = abs(hull[0] - hull[-1])
    if span == 0 or x[0] == x[-1]:
        return -1, 0.0
    across = (x - x[0]) / (x[-1] - x[0])
    chord = 1 - across if falls else across
    depth = chord - (hull - hull.min()) / span
    best = int(np.argmax(depth))
    return (best, float(depth[best])) if depth[best] > 1e-12 else (-1, 0.0)


def _drawn(x: np.ndarray, runs: np.ndarray, rng: np.random.Generator) -> float:
    """x of the knee of one bootstrap draw, NaN where it has none."""
    if len(runs) > 1:
        index, _ = _knee(x, runs[rng.integers(len(runs), size=len(runs))].mean(axis=0))
    else:
        inner = rng.integers(1, len(x) - 1, size=len(x) - 2)
        kept = np.unique([0, *inner, len(x) - 1])
        index, _ = _knee(x[kept], runs[0, kept])
        return float(x[kept][index]) if index >= 0 else float("nan")
    return float(x[index]) if index >= 0 else float("nan")
