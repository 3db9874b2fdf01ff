"""`infer`: the common entry to all solvers with a fixed dictionary; checks its input, then runs a jitted function."""

import dataclasses
import math
import operator
from collections.abc import Callable
from typing import Any, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from saejax.errors import UserError
from saejax.sparse_coding import basis_pursuit, one_step, proximal, pursuit
from saejax.sparse_coding.solution import Solution

UNIT_TOLERANCE = 1e-3
"""How far the norm of an atom may be from 1."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """One solver: its function and the options it takes."""

    run: Callable[..., Solution]
    """Pure and jitted: (y, dictionary, **options) -> Solution."""
    needs: str | None
    """Option without which it cannot run: k, l1_coef or threshold; None: none."""
    takes: frozenset[str] = frozenset()
    """Options it may be given: of warm_start, max_iterations, tolerance."""


_ITERATIVE = frozenset({"warm_start", "max_iterations", "tolerance"})
METHODS: dict[str, Method] = {
    "threshold": Method(run=one_step.threshold, needs="threshold"),
    "top_k": Method(run=one_step.top_k, needs="k"),
    "mp": Method(run=pursuit.mp, needs="k", takes=frozenset({"tolerance"})),
    "omp": Method(run=pursuit.omp, needs="k", takes=frozenset({"tolerance"})),
    "gradient_pursuit": Method(run=pursuit.gradient_pursuit, needs="k", takes=frozenset({"tolerance"})),
    "ista": Method(run=proximal.ista, needs="l1_coef", takes=_ITERATIVE),
    "fista": Method(run=proximal.fista, needs="l1_coef", takes=_ITERATIVE),
    "basis_pursuit": Method(run=basis_pursuit.basis_pursuit, needs=None, takes=_ITERATIVE),
}
"""Every solver by name."""


class Options(TypedDict, total=False):
    """Options of `infer` that some methods need or take; those of another method are refused."""

    k: int | None
    """For omp: atoms per signal, at most d (more are linearly dependent). For top_k: latents, at most n_atoms. For mp
    and gradient_pursuit: steps; a step may take an atom again, so the support has at most k."""
    l1_coef: float | None
    """Weight of the l1 norm against half the squared error; for ista and fista."""
    threshold: float | None
    """Level of the correlations to keep; for threshold."""
    max_iterations: int | None
    """Where ista, fista and basis_pursuit give up; None takes the method's own limit."""


def infer(
    y: Float[Array, "b d"],
    dictionary: Float[Array, "n_atoms d"],
    *,
    method: str = "omp",
    nonneg: bool = True,
    bias: Float[Array, " d"] | None = None,
    warm_start: Solution | Float[Array, "b n_atoms"] | None = None,
    tolerance: float = 1e-5,
    **options: Unpack[Options],
) -> Solution:
    """Returns the sparse codes of signals over a fixed dictionary.

    Args:
      y: Signals, real and finite.
      dictionary: One atom per row, of norm 1.
      method: A name in `METHODS`.
      nonneg: Whether codes must not fall below 0.
      bias: Subtracted from the signals first.
      warm_start: Codes to start from; for ista, fista and basis_pursuit.
      tolerance: When a row is done; relative to the norm of its signal for pursuits, and see the methods.
      **options: k, l1_coef, threshold, max_iterations, see `Options`.

    Returns:
      The codes with the solver's account: look at `converged`.

    Raises:
      UserError: An argument is missing, not used by the method, or cannot be right.

    Examples:
      >>> solution = infer(jnp.array([[0.0, 3.0, -1.0]]), jnp.eye(3), k=2)
      >>> solution.dense().tolist(), solution.converged.tolist()
      ([[0.0, 3.0, 0.0]], [True])
    """
    y, dictionary = _arrays(y, dictionary)
    if bias is not None:
        bias = jnp.asarray(bias, jnp.float32)
        _demand(bias.shape == y.shape[1:], "bias", f"must have shape {y.shape[1:]}", bias.shape)
        _demand_finite(bias, "bias")
        y = y - bias[None, :]
    check_values(y, dictionary)
    return run_method(y, dictionary, method, nonneg, tolerance, {"warm_start": warm_start, **options})


def run_method(
    y: Float[Array, "b d"],
    dictionary: Float[Array, "n_atoms d"],
    method: str,
    nonneg: bool,
    tolerance: float,
    options: dict[str, Any],
) -> Solution:
    """Runs a method on arrays that need no check (an atom of zeros is never chosen); checks the options."""
    _demand(method in METHODS, "method", f"must be one of {', '.join(METHODS)}", repr(method))
    if unknown := sorted(options.keys() - {"warm_start", *Options.__annotations__}):
        raise TypeError(f"unexpected keyword argument {unknown[0]!r}")
    chosen = METHODS[method]
    given = {name: _whole(value) for name, value in options.items() if value is not None}
    needs = {chosen.needs} if chosen.needs else set()
    for name in sorted(needs - set(given)):
        raise UserError(f"{name} must be given for method {method!r}")
    for name in sorted(set(given) - needs - chosen.takes):
        raise UserError(f"{name} must not be given, method {method!r} does not use it")
    _check_options(given, method, y.shape[0], *dictionary.shape)
    if "tolerance" in chosen.takes:
        _demand(_above(tolerance, 0), "tolerance", "must be a number above 0", tolerance)
        given["tolerance"] = tolerance
    if isinstance(given.get("warm_start"), Solution):
        given["warm_start"] = given["warm_start"].dense()
    return chosen.run(y, dictionary, nonneg=nonneg, **given)


def check_values(
    y: Float[Array, "b d"], dictionary: Float[Array, "n_atoms d"], unit: bool = True, name: str = "y"
) -> None:
    """Raises UserError for NaN, infinities, atoms of zeros or (if `unit`) of another norm; nothing while tracing."""
    if isinstance(y, Tracer) or isinstance(dictionary, Tracer):
        return
    finite_y, finite_dictionary, least, most = (float(value) for value in _look(y, dictionary))
    _demand(finite_y, name, "must be finite", "NaN or infinity")
    _demand(finite_dictionary, "dictionary", "must be finite", "NaN or infinity")
    if unit:
        _demand(least > 0, "dictionary", "must have no row of zeros", "a row of norm 0")
        wrong = least if abs(least - 1) > abs(most - 1) else most
        _demand(
            abs(wrong - 1) <= UNIT_TOLERANCE, "dictionary", "must have rows of norm 1", f"a row of norm {wrong:.6g}"
        )


@jax.jit
def _look(y, dictionary):
    norms = jnp.linalg.norm(dictionary, axis=1)
    return jnp.all(jnp.isfinite(y)), jnp.all(jnp.isfinite(dictionary)), jnp.min(norms), jnp.max(norms)


def _arrays(y: Any, dictionary: Any) -> tuple[jax.Array, jax.Array]:
    """Returns both as float32 after a look at their shapes."""
    y, dictionary = jnp.asarray(y), jnp.asarray(dictionary)
    for name, array in (("y", y), ("dictionary", dictionary)):
        _demand(jnp.isrealobj(array), name, "must be real", array.dtype)
        _demand(array.ndim == 2, name, "must have two dimensions", f"shape {array.shape}")
        _demand(array.size > 0, name, "must not be empty", f"shape {array.shape}")
    _demand(
        y.shape[1] == dictionary.shape[1], "y", f"must have d={dictionary.shape[1]} columns as dictionary", y.shape[1]
    )
    return y.astype(jnp.float32), dictionary.astype(jnp.float32)


def _check_options(given: dict[str, Any], method: str, b: int, n: int, d: int) -> None:
    k, warm_start = given.get("k"), given.get("warm_start")
    if k is not None:
        # More than d atoms are linearly dependent: no least-squares code of theirs is the only one. Steps are counted
        # in int32.
        bounds = {"omp": min((n, "n_atoms"), (d, "d")), "top_k": (n, "n_atoms")}
        most, name = bounds.get(method, (2**31 - 1, ""))
        limit = f"must be a whole number in [1, {name}{'=' if name else ''}{most}]"
        _demand(isinstance(k, int) and not isinstance(k, bool) and 1 <= k <= most, "k", limit, k)
    if "l1_coef" in given:
        _demand(_above(given["l1_coef"], 0), "l1_coef", "must be a number above 0", given["l1_coef"])
    if "threshold" in given:
        _demand(_above(given["threshold"], -1e-30), "threshold", "must be a number, at least 0", given["threshold"])
    if "max_iterations" in given:
        n_steps = given["max_iterations"]
        _demand(isinstance(n_steps, int) and n_steps >= 1, "max_iterations", "must be a whole number above 0", n_steps)
    if warm_start is not None:
        shape = (b, warm_start.n_atoms) if isinstance(warm_start, Solution) else jnp.shape(warm_start)
        _demand(shape == (b, n), "warm_start", f"must have shape {(b, n)}", shape)
        _demand_finite(warm_start.dense() if isinstance(warm_start, Solution) else warm_start, "warm_start")


def _whole(value: Any) -> Any:
    """A whole number of NumPy as a Python int; everything else as it is."""
    return operator.index(value) if isinstance(value, np.integer) else value


def _above(value: Any, bound: float) -> bool:
    """Whether a number, finite and above the bound; an array under trace is believed."""
    try:
        return isinstance(value, Tracer) or bound < float(value) < math.inf
    except (TypeError, ValueError):
        return False


def _demand_finite(array: Any, name: str) -> None:
    """Raises UserError for NaN and infinities; nothing while tracing."""
    if not isinstance(array, Tracer):
        _demand(jnp.all(jnp.isfinite(array)), name, "must be finite", "NaN or infinity")


def _demand(ok: Any, name: str, must: str, got: object) -> None:
    if not ok:
        raise UserError(f"{name} {must}, got {got}")
