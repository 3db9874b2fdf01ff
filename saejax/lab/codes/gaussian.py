"""Success probabilities of one-step decoders when interference is Gaussian, and their inverses.

With random unit atoms the score <f_i, x> of an active atom is about N(1, (k-1)/d), that of an inactive one about
N(0, k/d), nearly independent. Measured probabilities agree to 3 % in d for k >= 16; at k = 4 top-k needs up to
8 % fewer dimensions than these formulas say, because sums of four signs have lighter tails.
"""

import math
from collections.abc import Callable
from typing import cast

import numpy as np
from scipy.optimize import brentq
from scipy.special import log_ndtr

from saejax.errors import UserError
from saejax.lab.codes.arguments import check_positive, check_probability, check_sizes


def threshold_success(n_atoms: int, k: int, d: float, threshold: float = 0.5) -> float:
    """P(the atoms with score above the threshold are exactly the active ones).

    Phi((1 - t) sqrt(d / (k-1)))^k Phi(t sqrt(d / k))^(n_atoms - k).

    Args:
      n_atoms: number of atoms.
      k: active atoms.
      d: dimensions.
      threshold: t, in (0, 1); 1 for k = 1.

    Returns:
      Probability.

    Raises:
      UserError: a number out of its range.
    """
    check_sizes(n_atoms=n_atoms, k=k)
    check_positive(d=d, threshold=threshold)
    if threshold > 1 or threshold == 1 and k > 1:
        raise UserError(f"threshold = {threshold}: a number in (0, 1) is needed")
    misses = k * log_ndtr((1 - threshold) * math.sqrt(d / (k - 1))) if k > 1 else 0.0
    return math.exp(misses + (n_atoms - k) * log_ndtr(threshold * math.sqrt(d / k)))


def top_k_success(n_atoms: int, k: int, d: float) -> float:
    """P(every active score exceeds every inactive score).

    The integral over the smallest active score s of P(all n_atoms - k inactive scores lie below s).

    Args:
      n_atoms: number of atoms.
      k: active atoms.
      d: dimensions.

    Returns:
      Probability.

    Raises:
      UserError: a number out of its range.
    """
    check_sizes(n_atoms=n_atoms, k=k)
    check_positive(d=d)
    if k == 1:
        return math.exp((n_atoms - 1) * log_ndtr(math.sqrt(d)))
    u = np.linspace(-12.0, 6.0, 6001)  # of the smallest active score, in its own standard deviations
    log_density = math.log(k) - u**2 / 2 - math.log(2 * math.pi) / 2 + (k - 1) * log_ndtr(-u)
    log_inactive_below = (n_atoms - k) * log_ndtr((1 + u * math.sqrt((k - 1) / d)) * math.sqrt(d / k))
    return float(min(np.trapezoid(np.exp(log_density + log_inactive_below), u), 1.0))


def dims_for(success: Callable[[float], float], probability: float) -> float:
    """Dimensions at which a success formula reaches a probability: the inverse of a rising function of d.

    Args:
      success: d -> probability, rising.
      probability: to reach, in (0, 1).

    Returns:
      d, as a real number; 0 where guessing is enough.

    Raises:
      UserError: probability out of range, or never reached.

    Examples:
      >>> round(dims_for(lambda d: top_k_success(2**14, 16, d), 0.9))
      671
    """
    check_probability(probability=probability)
    if success(1e-9) >= probability:
        return 0.0
    high = 1.0
    while not success(high) >= probability:  # NaN reaches nothing
        high *= 2
        if high > 1e30:
            raise UserError(f"probability = {probability}: never reached, success is {success(high):.4g} at d = 1e30")
    return cast(float, brentq(lambda d: success(d) - probability, 1e-9, high, xtol=1e-6))
