"""Logistic regression by L-BFGS: convex, so the fit is the same for any order of rows.

Columns are standardised on the train rows, so that the penalty means the same for every probe.
"""

import numpy as np
from jaxtyping import Bool, Float
from scipy.optimize import minimize
from scipy.special import expit


def fit(
    x: Float[np.ndarray, "n p"], y: Bool[np.ndarray, "n"], *, l2: float = 1e-3, max_iterations: int = 500
) -> tuple[Float[np.ndarray, "p"], float]:
    r"""Minimises mean log(1 + exp(-s (x w + b))) + l2 / 2 * |w * deviation|^2, s = 1 with the label and -1 without.

    Args:
      x: Rows, of any scale.
      y: Labels; both must occur.
      l2: Penalty for columns of unit variance, above 0.
      max_iterations: Of L-BFGS.

    Returns:
      (weights [p], bias) on the columns as given; columns that do not vary have weight 0.
    """
    x = np.asarray(x, np.float64)
    mean, deviation = x.mean(axis=0), x.std(axis=0)
    varies = deviation > 1e-12 * (1.0 + np.abs(mean))
    scale = np.where(varies, 1.0 / np.where(varies, deviation, 1.0), 0.0)
    standard = (x - mean[None, :]) * scale[None, :]
    sign = np.where(y, 1.0, -1.0)

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        weights, bias = parameters[:-1], parameters[-1]
        margin = sign * (standard @ weights + bias)
        pull = -sign * expit(-margin) / len(sign)
        gradient = np.append(standard.T @ pull + l2 * weights, pull.sum())
        return float(np.logaddexp(0.0, -margin).mean() + l2 / 2 * weights @ weights), gradient

    start = np.zeros(x.shape[1] + 1)
    options = {"maxiter": max_iterations, "ftol": 1e-12, "gtol": 1e-8}
    solution = minimize(loss, start, jac=True, method="L-BFGS-B", options=options).x
    weights = solution[:-1] * scale
    return weights, float(solution[-1] - weights @ mean)


def accuracy(
    x: Float[np.ndarray, "n p"],
    y: Bool[np.ndarray, "n"],
    x_test: Float[np.ndarray, "t p"],
    y_test: Bool[np.ndarray, "t"],
    *,
    l2: float = 1e-3,
) -> float:
    """Share of test rows answered rightly by a classifier of the train rows; NaN if those hold one answer only."""
    if y.all() or not y.any():
        return float("nan")
    weights, bias = fit(x, y, l2=l2)
    return float(((x_test @ weights + bias > 0) == y_test).mean())
