"""Least squares from mergeable moments: a line fitted to some rows and judged on others.

Moments are kept about the mean (Chan's merging), in float64. Most networks have a constant part; in uncentred sums it
would consume the digits that the fit needs.
"""

import numpy as np
from flax import struct


@struct.dataclass
class Moments:
    """First and second moments of rows.

    Attributes:
      rows: Number of rows, scalar.
      mean: [p].
      scatter: Sum of outer products of the rows about `mean`, [p, p].
    """

    rows: np.ndarray
    mean: np.ndarray
    scatter: np.ndarray


def none(p: int) -> Moments:
    """Returns the moments of no rows of width p."""
    return Moments(rows=np.zeros(()), mean=np.zeros(p), scatter=np.zeros((p, p)))


def moments(x: np.ndarray) -> Moments:
    """Returns the moments of rows [n, p], in float64."""
    if not len(x):
        return none(x.shape[1])
    x = np.asarray(x, np.float64)
    mean = x.mean(axis=0)
    centred = x - mean[None, :]
    return Moments(rows=np.asarray(float(len(x))), mean=mean, scatter=centred.T @ centred)


def merge(a: Moments, b: Moments) -> Moments:
    """Returns the moments of the rows of both."""
    n = a.rows + b.rows
    share = b.rows / np.maximum(n, 1.0)
    apart = b.mean - a.mean
    scatter = a.scatter + b.scatter + np.outer(apart, apart) * (a.rows * share)
    return Moments(rows=n, mean=a.mean + apart * share, scatter=scatter)


def fit(train: Moments, m: int, *, ridge: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Fits columns m.. of the rows to columns ..m with an intercept.

    Args:
      train: Moments of rows [h, z] of width m + q.
      m: Width of h.
      ridge: Penalty on the squared map, in units of the mean variance of h times the rows.

    Returns:
      (map [m, q], intercept [q]); the shortest map where h does not determine it.
    """
    hh, hz = train.scatter[:m, :m], train.scatter[:m, m:]
    if ridge:
        hh = hh + ridge * np.trace(hh) / m * np.eye(m)
    weights = np.linalg.pinv(hh, rcond=1e-12, hermitian=True) @ hz
    return weights, train.mean[m:] - train.mean[:m] @ weights


def fit_through_origin(train: Moments, m: int) -> np.ndarray:
    """The same without an intercept: the map [m, q]."""
    raw = train.scatter + train.rows * np.outer(train.mean, train.mean)
    return np.linalg.pinv(raw[:m, :m], rcond=1e-12, hermitian=True) @ raw[:m, m:]


def r2(test: Moments, weights: np.ndarray, intercept: np.ndarray) -> np.ndarray:
    """Scores a map on the moments of other rows, without looking at the rows again.

    Args:
      test: Moments of rows [h, z].
      weights: [m, q].
      intercept: [q].

    Returns:
      1 - squared error / squared deviation from the mean of the test rows, [q]; NaN where z does not vary.
    """
    m = len(weights)
    both = np.concatenate([-weights, np.eye(weights.shape[1])])
    bias = test.mean[m:] - test.mean[:m] @ weights - intercept
    error = np.einsum("pq,pr,rq->q", both, test.scatter, both, optimize=True) + test.rows * bias**2
    spread = np.diagonal(test.scatter)[m:]
    # A column that does not vary leaves rounding errors of its mean: about rows * eps^2 * mean^2.
    varies = spread > 1e-24 * test.rows * (1.0 + test.mean[m:] ** 2)
    return np.where(varies, 1.0 - error / np.where(varies, spread, 1.0), np.nan)
