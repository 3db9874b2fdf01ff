r"""What an L1 penalty does to sparse codes over an orthonormal dictionary: closed forms and quadrature.

With loss \(\|y - \hat y\|^2 + \lambda \|\hat z\|_1\) every code is soft-thresholded at \(t = \lambda / 2\), and the
relative reconstruction bias is \(\gamma = E\|\hat y\|^2 / E\langle y, \hat y\rangle\): 1 without bias, below 1 for
shrinkage. A trainable decoder bias changes it: the optimum is a constant \(\beta\) in every feature's direction.

Source: Rajamanoharan et al., Improving dictionary learning with gated sparse autoencoders, 2024 (the ratio);
the forms follow from the optimality conditions.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy.special
from jaxtyping import Float

QUANTILES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "constant 1": lambda u: np.ones_like(u),
    "Exp(1)": lambda u: -np.log1p(-u),
    "U[0, 1]": lambda u: u,
    "U[1/2, 3/2]": lambda u: 0.5 + u,
    "half-normal": lambda u: np.sqrt(2) * scipy.special.erfinv(u),
}
"""Quantile function of each distribution of amplitudes: turns uniform draws into amplitudes."""

_FORMS: dict[str, Callable[[float], float]] = {
    "constant 1": lambda t: 1 - t,
    "Exp(1)": lambda t: 2 / (2 + t),
    "U[0, 1]": lambda t: 2 * (1 - t) / (2 + t),
}


def oracle_bias(amplitudes: str, t: float) -> float:
    """Gamma of the true dictionary soft-thresholded at t, no decoder bias; t below the largest amplitude.

    Examples:
      >>> [round(oracle_bias("U[1/2, 3/2]", t), 5) for t in (0.05, 0.1, 0.2, 0.4)]
      [0.95403, 0.90847, 0.81887, 0.64878]
    """
    if amplitudes in _FORMS:
        return _FORMS[amplitudes](t)
    z = _grid(amplitudes)
    kept = np.maximum(z - t, 0)
    return float(np.sum(kept**2) / np.sum(z * kept))


def decoder_bias(amplitudes: str, t: float, p: float) -> float:
    r"""The constant that training puts into `b_dec` along each feature: \(\beta = p\,E[\min(z, \beta + t)]\).

    For amplitudes that never fall below the threshold \(\beta + t\) this is \(\beta = t p / (1 - p)\), and an active
    latent lies \(\beta + t = t / (1 - p)\) below its true code, not t.

    Args:
      amplitudes: a key of QUANTILES.
      t: half the penalty's weight.
      p: probability that a feature fires.

    Examples:
      >>> round(decoder_bias("constant 1", 0.1, 0.05), 6), round(0.1 * 0.05 / 0.95, 6)
      (0.005263, 0.005263)
    """
    z, beta = _grid(amplitudes), 0.0
    for _ in range(200):  # a contraction of factor p
        beta = p * float(np.mean(np.minimum(z, beta + t)))
    return beta


def trained_bias(amplitudes: str, t: float, p: float) -> float:
    """Gamma at the optimum of an L1 SAE with a trainable decoder bias; arguments as `decoder_bias`.

    Examples:
      >>> round(trained_bias("constant 1", 0.1, 0.05), 5)
      0.90058
    """
    z, beta = _grid(amplitudes), decoder_bias(amplitudes, t, p)
    active = np.maximum(z - beta - t, 0) + beta
    return float((p * np.mean(active**2) + (1 - p) * beta**2) / (p * np.mean(z * active)))


def rows(
    amplitudes: str, basis: Float[np.ndarray, "n d"], n_rows: int, p: float, seed: int
) -> tuple[Float[np.ndarray, "rows d"], Float[np.ndarray, "rows n"]]:
    """Signals over an orthonormal dictionary, and their codes: each feature fires with probability p.

    Args:
      amplitudes: a key of QUANTILES.
      basis: orthonormal rows.
      n_rows: how many.
      p: probability that a feature fires.
      seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    shape = (n_rows, len(basis))
    codes = QUANTILES[amplitudes](rng.random(shape)) * (rng.random(shape) < p)
    return (codes @ basis).astype(np.float32), codes.astype(np.float32)


def _grid(amplitudes: str, n: int = 200_000) -> np.ndarray:
    """Amplitudes at the midpoints of n equal shares of probability."""
    return QUANTILES[amplitudes]((np.arange(n) + 0.5) / n)
