"""Matching of two dictionaries: unit rows, |cos| in blocks, the best one-to-one assignment. No metric.

Two dictionaries of 16,384 rows give a matrix of 1 GB in float32, computed in blocks of rows and solved in place.
Random directions are the hard case; learnt dictionaries that agree are 10 to 20 times faster.
"""

import numpy as np
from jaxtyping import Float, Int

from saejax.errors import UserError

_CHANCE_STREAM = 0x6D6363
_HARD_SIZE = 4096
"""Number of directions from which one random dictionary is chance enough: its mcc varies by less than 0.001."""


def unit_rows(directions: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    """Returns the rows at length 1, in float64; rows of zeros stay zeros.

    Examples:
      >>> unit_rows(np.array([[3.0, 4.0], [0.0, 0.0]])).tolist()
      [[0.6, 0.8], [0.0, 0.0]]
    """
    directions = np.asarray(directions, np.float64)
    norm = np.linalg.norm(directions, axis=-1, keepdims=True)
    return directions / np.where(norm > 0, norm, 1.0)


def abs_cos(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"], *, block: int = 1024) -> Float[np.ndarray, "n m"]:
    r"""Returns \(|\cos(a_i, b_j)|\) of all pairs in float32, `block` rows at a time.

    Args:
      a: One direction per row, of any length; a row of zeros has |cos| 0 to all.
      b: The same, of the same width.
      block: Rows of `a` per product.

    Raises:
      UserError: the widths differ, one is empty, or a value is not finite.
    """
    a, b = checked(a, "a"), checked(b, "b")
    if a.shape[1] != b.shape[1]:
        raise UserError(f"both dictionaries must have the same width, got {a.shape[1]} and {b.shape[1]}")
    units = unit_rows(b).astype(np.float32).T
    out = np.empty((len(a), len(b)), np.float32)
    for start in range(0, len(a), block):
        rows = slice(start, start + block)
        np.abs(unit_rows(a[rows]).astype(np.float32) @ units, out=out[rows])
    return np.minimum(out, 1.0, out=out)


def matched(similarity: Float[np.ndarray, "n m"]) -> Int[np.ndarray, "m"]:
    """The row matched to each column by the one-to-one assignment of largest total, or -1 (Hungarian, exact).

    Args:
      similarity: Finite, any float type. Takes one further copy in float64: 2 GB for 16,384 x 16,384.

    Returns:
      [m] int64; as many entries are >= 0 as the smaller side has.

    Examples:
      >>> matched(np.array([[0.9, 0.8, 0.0], [0.8, 0.1, 0.0]])).tolist()
      [1, 0, -1]
    """
    import scipy.optimize  # slow to import, and only some metrics need it

    cost = np.asarray(similarity).astype(np.float64)
    rows, columns = scipy.optimize.linear_sum_assignment(np.negative(cost, out=cost))
    match = np.full(cost.shape[1], -1)
    match[columns] = rows
    return match


def matched_mean(similarity: Float[np.ndarray, "n m"]) -> float:
    """Mean similarity of the pairs of `matched`."""
    match = matched(similarity)
    found = np.flatnonzero(match >= 0)
    return float(np.mean(similarity[match[found], found], dtype=np.float64))


def random_directions(shape: tuple[int, int], n_draws: int | None = None, seed: int = 0) -> list[np.ndarray]:
    """Returns Gaussian dictionaries [n, d] float32, the level of chance of a comparison.

    Args:
      shape: (n, d).
      n_draws: None for 3, or 1 from 4,096 directions on, where one draw tells chance to 0.001.
      seed: Of the draws; no stream of it meets that of `np.random.default_rng(seed)`, which may have made the features.
    """
    rng = np.random.default_rng((seed, _CHANCE_STREAM))
    n_draws = (3 if shape[0] < _HARD_SIZE else 1) if n_draws is None else n_draws
    return [rng.standard_normal(shape, dtype=np.float32) for _ in range(n_draws)]


def checked(dictionary: np.ndarray, name: str) -> np.ndarray:
    """The array [n, d] of a dictionary, or one line that says what is wrong with it."""
    dictionary = np.asarray(dictionary)
    if dictionary.ndim != 2 or not dictionary.size:
        raise UserError(f"{name} must be [n, d] with at least one row, got shape {list(dictionary.shape)}")
    if not np.isfinite(dictionary).all():
        raise UserError(f"{name} must be finite, got NaN or infinity")
    return dictionary
