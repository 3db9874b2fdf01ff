"""Rules of thumb side by side: dimensions needed, features that fit, active features that fit.

Each rule gives the dimensions that one decoder needs for n_atoms and k. Inverted, it gives the features that d
dimensions can hold. The rules disagree by tens of orders of magnitude: a bound for the best conceivable decoder says
little about a matched filter. Read the column of the decoder in use.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import cast

from scipy.optimize import brentq

from saejax.errors import UserError
from saejax.lab.codes import capacity, gaussian
from saejax.lab.codes.arguments import check_sizes

_LARGEST_LN = 700.0
"""Largest ln n_atoms whose n_atoms is a finite float64."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """Dimensions that one decoder needs."""

    name: str
    """Short name, unique."""
    formula: str
    """What is computed, in symbols: N atoms, k active, d dimensions."""
    dims: Callable[[float, float], float]
    """(ln n_atoms, k) -> dimensions; rising in both."""


def _basis_pursuit(ln_n: float, k: float, *, nonneg: bool) -> float:
    return capacity.statistical_dimension(math.exp(ln_n), k, nonneg=nonneg)


def _top_k(ln_n: float, k: float, *, probability: float) -> float:
    n_atoms = round(math.exp(ln_n))
    return gaussian.dims_for(lambda d: gaussian.top_k_success(n_atoms, round(k), d), probability)


def _threshold(ln_n: float, k: float, *, probability: float) -> float:
    n_atoms = round(math.exp(ln_n))
    return gaussian.dims_for(lambda d: gaussian.threshold_success(n_atoms, round(k), d), probability)


def _balanced(ln_n: float, k: float) -> float:
    return 2 * k * (math.sqrt(ln_n) + math.sqrt(math.log(k))) ** 2


RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule(name="storage", formula="log2(N) / 16", dims=lambda ln_n, k: ln_n / math.log(2) / 16),
        Rule(name="compressed_sensing_c1", formula="k ln(N/k)", dims=lambda ln_n, k: k * (ln_n - math.log(k))),
        Rule(name="compressed_sensing_c2", formula="2 k ln(N/k)", dims=lambda ln_n, k: 2 * k * (ln_n - math.log(k))),
        Rule(
            name="basis_pursuit_nonneg",
            formula="statistical dimension, z >= 0 (P = 1/2)",
            dims=partial(_basis_pursuit, nonneg=True),
        ),
        Rule(
            name="basis_pursuit_signed",
            formula="statistical dimension (P = 1/2)",
            dims=partial(_basis_pursuit, nonneg=False),
        ),
        Rule(
            name="integer_pursuit",
            formula="1.3 k log2(eN/k)",
            dims=lambda ln_n, k: 1.3 * k * (1 + ln_n - math.log(k)) / math.log(2),
        ),
        Rule(name="top_k_half", formula="Gaussian theory, P = 0.5", dims=partial(_top_k, probability=0.5)),
        Rule(name="top_k_ninety", formula="Gaussian theory, P = 0.9", dims=partial(_top_k, probability=0.9)),
        Rule(name="top_k", formula="4 k ln(kN)", dims=lambda ln_n, k: 4 * k * (math.log(k) + ln_n)),
        Rule(name="threshold_optimal", formula="2 k (sqrt(ln N) + sqrt(ln k))^2", dims=_balanced),
        Rule(name="threshold_half", formula="Gaussian theory, P = 0.5", dims=partial(_threshold, probability=0.5)),
        Rule(name="threshold_ninety", formula="Gaussian theory, P = 0.9", dims=partial(_threshold, probability=0.9)),
        Rule(name="threshold", formula="8 k ln(N)", dims=lambda ln_n, k: 8 * k * ln_n),
    )
}
"""Every rule by name, from the most to the least demanding of its decoder."""


def _rule(name: str) -> Rule:
    if name not in RULES:
        raise UserError(f"rule = {name!r}: one of {', '.join(RULES)} is needed")
    return RULES[name]


def dims_needed(n_atoms: int, k: int, rule: str) -> float:
    """Dimensions that a rule asks for.

    Args:
      n_atoms: number of atoms.
      k: active atoms.
      rule: a name of `RULES`.

    Returns:
      Dimensions.

    Raises:
      UserError: a size out of range or an unknown rule.

    Examples:
      >>> round(dims_needed(2**14, 16, "top_k"))
      799
    """
    check_sizes(n_atoms=n_atoms, k=k)
    return _rule(rule).dims(math.log(n_atoms), k)


def ln_max_features(d: int, k: int, rule: str) -> float:
    """Natural logarithm of the number of features that d dimensions hold with k of them active.

    Args:
      d: dimensions.
      k: active features.
      rule: a name of `RULES`.

    Returns:
      ln n_atoms; NaN where even n_atoms = k asks for more than d, infinity beyond e^700 where a rule needs
      n_atoms itself.

    Raises:
      UserError: a size below 1 or an unknown rule.

    Examples:
      >>> round(math.exp(ln_max_features(768, 10, "threshold")))
      14765
    """
    check_sizes(d=d, k=k)
    dims = _rule(rule).dims
    if rule == "storage":
        return d * 16 * math.log(2)
    lowest = math.log(k + 1)
    if dims(lowest, k) > d:
        return math.nan
    if dims(_LARGEST_LN, k) < d:
        return math.inf
    return cast(float, brentq(lambda ln_n: dims(ln_n, k) - d, lowest, _LARGEST_LN, xtol=1e-9))


def max_active(n_atoms: int, d: int, rule: str) -> int:
    """Largest number of active features that d dimensions carry.

    Args:
      n_atoms: number of atoms.
      d: dimensions.
      rule: a name of `RULES`.

    Returns:
      k, 0 where even one is too many. Searched up to n_atoms / 3: denser codes are outside every rule.

    Raises:
      UserError: a size below 1 or an unknown rule.

    Examples:
      >>> max_active(2**20, 768, "threshold"), max_active(2**20, 768, "integer_pursuit")
      (6, 36)
    """
    check_sizes(n_atoms=n_atoms, d=d)
    dims, ln_n = _rule(rule).dims, math.log(n_atoms)
    low, high = 0, max(n_atoms // 3, 1) + 1  # low fits, high does not
    while high - low > 1:
        middle = (low + high) // 2
        if dims(ln_n, middle) <= d:
            low = middle
        else:
            high = middle
    return low


def table(d: int, k: int, n_atoms: int | None = None) -> list[dict[str, float | str]]:
    """All rules at once: the capacity calculator.

    Args:
      d: dimensions.
      k: active features.
      n_atoms: number of features, where the question is whether they fit.

    Returns:
      One dict per rule: rule, formula, log10_features (log10 of the features that fit); with n_atoms also
      dims (needed), margin (d over dims; above 1 fits; metric M7) and active (largest k that fits).

    Raises:
      UserError: a size out of range.
    """
    check_sizes(d=d, k=k)
    if n_atoms is not None:
        check_sizes(n_atoms=n_atoms, k=k)
    rows = []
    for name, rule in RULES.items():
        row: dict[str, float | str] = {"rule": name, "formula": rule.formula}
        row["log10_features"] = ln_max_features(d, k, name) / math.log(10)
        if n_atoms is not None:
            dims = dims_needed(n_atoms, k, name)
            row |= {"dims": dims, "margin": d / dims if dims > 0 else math.inf}
            row["active"] = math.inf if name == "storage" else max_active(n_atoms, d, name)
        rows.append(row)
    return rows
