"""Closed forms of superposition codes: entropy, capacity, convex decoding, rules of thumb.

A code has n_atoms atoms in d dimensions; k of them are active with coefficient 1. Host arithmetic in float64.
`gaussian` holds the success probabilities of one-step decoders, `rules` the inverse questions. Where a source
misprints a formula, the code uses the corrected form and the docstring says so.
"""

import math

from scipy.optimize import minimize_scalar
from scipy.special import gammaln, log_ndtr

from saejax.errors import UserError
from saejax.lab.codes.arguments import check_positive, check_probability, check_sizes


def entropy_bits(n_atoms: int, k: int) -> float:
    """Information in a uniform k-subset: log2 C(n_atoms, k) (metric M4).

    Args:
      n_atoms: size of the whole set.
      k: size of the subset.

    Returns:
      Bits.

    Raises:
      UserError: a size below 1 or k > n_atoms.

    Examples:
      >>> round(entropy_bits(2**20, 2**8), 3)
      3435.959
    """
    check_sizes(n_atoms=n_atoms, k=k)
    return float(gammaln(n_atoms + 1) - gammaln(k + 1) - gammaln(n_atoms - k + 1)) / math.log(2)


def entropy_bits_approximate(n_atoms: float, k: float) -> float:
    """Upper bound k log2(e n_atoms / k) on the entropy, 0.16 % above it at n_atoms = 2^20, k = 2^8.

    Args:
      n_atoms: size of the whole set.
      k: size of the subset.

    Returns:
      Bits.

    Raises:
      UserError: a number that is not above 0, or k > n_atoms.

    Examples:
      >>> round(entropy_bits_approximate(2**20, 2**8), 2)
      3441.33
    """
    check_positive(n_atoms=n_atoms, k=k)
    if k > n_atoms:
        raise UserError(f"k = {k}: at most n_atoms = {n_atoms} atoms can be active")
    return k * math.log2(math.e * n_atoms / k)


def sparsity_exponent(n_atoms: int, k: int) -> float:
    """epsilon = ln k / ln n_atoms, the regime in which one-step capacities are stated; in [0, 1]."""
    check_sizes(n_atoms=n_atoms, k=k)
    return math.log(k) / math.log(n_atoms) if n_atoms > 1 else 0.0


def kappa(epsilon: float) -> float:
    """d / (k ln n_atoms) beyond which the best fixed threshold succeeds: 2 (1 + sqrt(epsilon))^2.

    Leading order for n_atoms -> infinity with ln k / ln n_atoms -> epsilon. Source: superposition codes,
    Proposition 5, whose hypothesis reads d >= kappa k ln n_atoms (the k is missing in print).

    Args:
      epsilon: ln k / ln n_atoms, in [0, 1).

    Returns:
      Dimensions per active atom and nat of ln n_atoms.

    Raises:
      UserError: epsilon out of range.

    Examples:
      >>> [round(kappa(e), 3) for e in (0, 0.1, 0.5)]
      [2.0, 3.465, 5.828]
    """
    if not 0 <= epsilon < 1:
        raise UserError(f"epsilon = {epsilon}: ln k / ln n_atoms in [0, 1) is needed")
    return 2 * (1 + math.sqrt(epsilon)) ** 2


def capacity(epsilon: float) -> float:
    """Nats per dimension that one-step decoding carries: C = (1 - epsilon) / kappa(epsilon) (metric M3).

    Args:
      epsilon: ln k / ln n_atoms, in [0, 1).

    Returns:
      Nats per dimension; divide by ln 2 for bits.

    Raises:
      UserError: epsilon out of range.

    Examples:
      >>> round(capacity(0.4) / math.log(2), 4)
      0.1624
    """
    return (1 - epsilon) / kappa(epsilon)


def optimal_threshold(n_atoms: int, k: int) -> float:
    """Threshold that balances misses and false alarms: sqrt(ln n_atoms) / (sqrt(ln n_atoms) + sqrt(ln k)).

    Args:
      n_atoms: number of atoms, at least 2.
      k: active atoms.

    Returns:
      A threshold in (1/2, 1]; 1/2 is reached at k = n_atoms.

    Raises:
      UserError: a size out of range.
    """
    check_sizes(n_atoms=n_atoms, k=k)
    if n_atoms < 2:
        raise UserError(f"n_atoms = {n_atoms}: a threshold needs at least 2 atoms")
    return math.sqrt(math.log(n_atoms)) / (math.sqrt(math.log(n_atoms)) + math.sqrt(math.log(k)))


def map_threshold(n_atoms: int, k: int, d: float) -> float:
    """Score above which an atom is more likely on than off: 1/2 + ln((1 - pi) / pi) / rho.

    pi = k / n_atoms, and interference is taken as isotropic, so rho = d / k (metric M2).

    Args:
      n_atoms: number of atoms.
      k: active atoms, below n_atoms.
      d: dimensions.

    Returns:
      The threshold on <f_i, x>.

    Raises:
      UserError: a size out of range or k = n_atoms.
    """
    check_sizes(n_atoms=n_atoms, k=k)
    check_positive(d=d)
    if k == n_atoms:
        raise UserError(f"k = {k}: below n_atoms = {n_atoms} is needed, else every atom is certain")
    return 0.5 + k / d * math.log((n_atoms - k) / k)


def statistical_dimension(n_atoms: float, k: float, *, nonneg: bool = True) -> float:
    """Dimensions at which basis pursuit recovers k-sparse codes half of the time.

    delta = min_t k (1 + t^2) + m (n_atoms - k) [(1 + t^2) Q(t) - t phi(t)], where Q is the upper tail and phi the
    density of N(0, 1); m = 1 for codes known to be non-negative, 2 for signed ones.
    Source: Amelunxen, Lotz, McCoy, Tropp 2014, "Living on the edge".

    Args:
      n_atoms: number of atoms.
      k: non-zero coefficients.
      nonneg: whether the decoder knows that coefficients are non-negative.

    Returns:
      delta (dimensions), at most n_atoms.

    Raises:
      UserError: a number that is not above 0, or k > n_atoms.

    Examples:
      >>> round(statistical_dimension(2**20, 2**8)), round(statistical_dimension(2**20, 2**8, nonneg=False))
      (2705, 2986)
    """
    check_positive(n_atoms=n_atoms, k=k)
    if k > n_atoms:
        raise UserError(f"k = {k}: at most n_atoms = {n_atoms} coefficients can be non-zero")
    sides = 1 if nonneg else 2

    def width(t: float) -> float:
        tail = math.exp(log_ndtr(-t))
        density = math.exp(-t * t / 2) / math.sqrt(2 * math.pi)
        return k * (1 + t * t) + sides * (n_atoms - k) * ((1 + t * t) * tail - t * density)

    best = minimize_scalar(width, bounds=(0.0, 40.0), method="bounded", options={"xatol": 1e-9})
    return float(min(best.fun, n_atoms))


def awgn_dim_lower_bound(n_codewords: int, noise: float, p: float) -> float:
    """Dimensions that any code of one unit-power codeword in white noise needs (metric M5, Fano).

    d >= 2 ((1 - p) ln n - ln 2) / ln(1 + 1/noise). Source: superposition codes, Proposition 2.

    Args:
      n_codewords: number of codewords, at least 2.
      noise: noise power over signal power, above 0.
      p: allowed probability of error, in (0, 1).

    Returns:
      The bound (dimensions), at least 0.

    Raises:
      UserError: a number out of its range.
    """
    check_sizes(n_codewords=n_codewords)
    check_positive(noise=noise)
    check_probability(p=p)
    return max(2 * ((1 - p) * math.log(n_codewords) - math.log(2)) / math.log1p(1 / noise), 0.0)


def awgn_dims_sufficient(n_codewords: int, noise: float, *, slack: float = 0.0) -> float:
    """Dimensions at which a random codebook succeeds as n grows: (2 / ln(1 + 1/noise) + slack) ln n.

    The printed Proposition 3, (2 + slack) noise ln n, contradicts the lower bound at finite noise: it is smaller.
    It agrees in the limit noise -> infinity only.

    Args:
      n_codewords: number of codewords.
      noise: noise power over signal power, above 0.
      slack: any number above 0 suffices asymptotically; 0 gives the Shannon limit itself.

    Returns:
      Dimensions.

    Raises:
      UserError: a number out of its range.

    Examples:
      >>> round(awgn_dims_sufficient(2**14, 1.0), 6)
      28.0
    """
    check_sizes(n_codewords=n_codewords)
    check_positive(noise=noise)
    if not 0 <= slack < math.inf:
        raise UserError(f"slack = {slack}: a finite number of at least 0 is needed")
    return (2 / math.log1p(1 / noise) + slack) * math.log(n_codewords)
