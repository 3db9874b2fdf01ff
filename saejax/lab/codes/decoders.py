"""Decoders of superposition codes: a signal x = sum of k atoms to the count of each atom.

Every decoder returns integer counts `[b, n_atoms]`, so success means the same for all: the counts equal the 0/1 code.
`DECODERS` holds the decoders of this package; the solvers of `saejax.sparse_coding` join them through a rounding rule,
under their own names.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from saejax.errors import UserError
from saejax.lab.codes import capacity
from saejax.lab.codes.arguments import check_choice, check_sizes
from saejax.sparse_coding.infer import METHODS, check_values, infer

_HIGHEST = jax.lax.Precision.HIGHEST

ROUNDING = ("half", "largest")
"""Rules from real codes to sets: `half` takes every value above 1/2, `largest` the k largest values."""


def matched_filter(
    x: Float[Array, "b d"], dictionary: Float[Array, "n_atoms d"], covariance: Float[Array, "d d"] | None = None
) -> tuple[Float[Array, "b n_atoms"], Float[Array, "n_atoms"]]:
    """Scores lambda_i = <f_i, x>_S / <f_i, f_i>_S with <v, w>_S = v^T S^-1 w, and rho_i = <f_i, f_i>_S (metric M2).

    Given noise of covariance S, an atom's log-odds of being on are rho_i (lambda_i - 1/2) + ln(pi / (1 - pi)).
    (Source: superposition codes, equation 2; the factor 1/2 printed in the definition of <,>_S is a slip.)

    Args:
      x: signals.
      dictionary: rows f_i.
      covariance: S, positive definite; None means the identity, and rho is then ||f_i||^2.

    Returns:
      (scores lambda, signal-to-noise ratios rho in nats).

    Raises:
      UserError: a covariance of less than full rank, as far as float32 can tell; not while tracing.
    """
    if covariance is None:
        whitened = dictionary
    else:
        _check_definite(covariance)
        whitened = jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(covariance), dictionary.T).T
    rho = jnp.sum(whitened * dictionary, axis=1)
    return jnp.matmul(x, whitened.T, precision=_HIGHEST) / rho[None, :], rho


def _check_definite(covariance: Float[Array, "d d"]) -> None:
    """Refuse what has no inverse: its Cholesky factor is NaN, NaN exceeds no threshold, and no atom would be on."""
    if isinstance(covariance, Tracer):
        return
    values = np.linalg.eigvalsh(np.asarray(covariance, np.float64))
    if not values[0] > len(values) * np.finfo(np.float32).eps * values[-1]:
        raise UserError(
            f"covariance with eigenvalues {values[0]:.3g} to {values[-1]:.3g}: a positive definite one is needed; for "
            "map_full more atoms than dimensions, whose differences span the space"
        )


def interference_covariance(dictionary: Float[Array, "n_atoms d"], k: int) -> Float[Array, "d d"]:
    """Covariance of the signal of a uniform k-subset, close to that of what disturbs one atom.

    pi (1 - pi) n/(n-1) (F^T F - n m m^T) with pi = k/n and m the mean row: exact for sampling without replacement.

    Args:
      dictionary: rows.
      k: active atoms, below n_atoms.

    Returns:
      [d, d], positive definite where the centred rows span the space.
    """
    n_atoms = dictionary.shape[0]
    centred = dictionary - dictionary.mean(axis=0, keepdims=True)
    rate = k / n_atoms
    factor = rate * (1 - rate) * n_atoms / max(n_atoms - 1, 1)
    return factor * jnp.matmul(centred.T, centred, precision=_HIGHEST)


def above(scores: Float[Array, "b n_atoms"], threshold: Float[Array, ""] | float) -> Int[Array, "b n_atoms"]:
    """Counts 1 where the score exceeds the threshold."""
    return (scores > threshold).astype(jnp.int32)


def largest(scores: Float[Array, "b n_atoms"], k: int) -> Int[Array, "b n_atoms"]:
    """Counts 1 at the k largest scores; ties go to the smaller index."""
    rows = jnp.arange(scores.shape[0])[:, None]
    return jnp.zeros(scores.shape, jnp.int32).at[rows, jax.lax.top_k(scores, k)[1]].set(1)


@partial(jax.jit, static_argnames=("k",))
def integer_pursuit(x: Float[Array, "b d"], dictionary: Float[Array, "n_atoms d"], k: int) -> Int[Array, "b n_atoms"]:
    """Matching pursuit with known amplitude: k times, add 1 to the atom most aligned with what is left.

    Starts from counts 0; each step takes j = argmax_j <f_j, x - F counts> (signed, not its magnitude) and adds 1 to
    counts_j, so an atom may repeat and a wrong choice is never taken back. Ties go to the smaller index.
    (Source: superposition codes, section 3.)

    Args:
      x: signals, sums of unit rows.
      dictionary: unit rows.
      k: steps.

    Returns:
      Counts, int32, summing to k in every row.
    """
    rows = jnp.arange(x.shape[0])

    def step(_: int, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        counts, residual = state
        best = jnp.argmax(jnp.matmul(residual, dictionary.T, precision=_HIGHEST), axis=1)
        return counts.at[rows, best].add(1), residual - dictionary[best]

    counts = jnp.zeros((x.shape[0], dictionary.shape[0]), jnp.int32)
    return jax.lax.fori_loop(0, k, step, (counts, x))[0]


def round_code(values: Float[Array, "b n_atoms"], k: int, rounding: str) -> Int[Array, "b n_atoms"]:
    """Counts of a real-valued code.

    Args:
      values: as from a solver.
      k: active atoms, used by `largest`.
      rounding: a name of `ROUNDING`.

    Returns:
      0/1 counts.

    Raises:
      UserError: an unknown rounding rule.
    """
    check_choice("rounding", rounding, ROUNDING)
    return above(values, 0.5) if rounding == "half" else largest(values, k)


@partial(jax.jit, static_argnames=("k",))
def _top_k(x: jax.Array, dictionary: jax.Array, k: int) -> jax.Array:
    return largest(matched_filter(x, dictionary)[0], k)


@jax.jit
def _threshold(x: jax.Array, dictionary: jax.Array, threshold: float) -> jax.Array:
    return above(matched_filter(x, dictionary)[0], threshold)


@jax.jit
def _full_map(x: jax.Array, dictionary: jax.Array, covariance: jax.Array, prior: float) -> jax.Array:
    scores, rho = matched_filter(x, dictionary, covariance)
    return above(log_odds(scores, rho, prior), 0.0)


def log_odds(
    scores: Float[Array, "b n_atoms"], rho: Float[Array, "n_atoms"], prior: Float[Array, ""] | float
) -> Float[Array, "b n_atoms"]:
    """ln P(on | x) / P(off | x) of each atom by itself, in nats: rho (lambda - 1/2) + ln(pi / (1 - pi)).

    Args:
      scores: lambda of `matched_filter`.
      rho: signal-to-noise ratios of `matched_filter`.
      prior: pi, in (0, 1).

    Returns:
      Log-odds (nats).
    """
    return rho[None, :] * (scores - 0.5) + jnp.log(prior / (1 - prior))


def _half(x: jax.Array, dictionary: jax.Array, k: int) -> jax.Array:
    return _threshold(x, dictionary, 0.5)


def _optimal(x: jax.Array, dictionary: jax.Array, k: int) -> jax.Array:
    return _threshold(x, dictionary, capacity.optimal_threshold(dictionary.shape[0], k))


def _map_isotropic(x: jax.Array, dictionary: jax.Array, k: int) -> jax.Array:
    n_atoms, d = dictionary.shape
    return _threshold(x, dictionary, capacity.map_threshold(n_atoms, k, d))


def _map_full(x: jax.Array, dictionary: jax.Array, k: int) -> jax.Array:
    covariance = interference_covariance(dictionary, k)
    _check_definite(covariance)
    return _full_map(x, dictionary, covariance, k / dictionary.shape[0])


DECODERS: dict[str, Callable[[jax.Array, jax.Array, int], jax.Array]] = {
    "threshold_half": _half,
    "threshold_optimal": _optimal,
    "top_k": _top_k,
    "map": _map_isotropic,
    "map_full": _map_full,
    "integer_pursuit": integer_pursuit,
}
"""Decoders of this package by name: (x, dictionary, k) -> counts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoder:
    """A decoder by name, with its choices: what `decode` and the success curves take."""

    method: str
    """A name of `DECODERS`, "threshold" with `threshold`, or a solver of `saejax.sparse_coding`."""
    threshold: float | None = None
    """Score above which an atom counts as on, for method="threshold" (a number)."""
    rounding: str = "half"
    """From a solver's real code to a set: "half" (above 1/2) or "largest" (the k largest)."""
    nonneg: bool = True
    """Whether a solver knows that coefficients are non-negative."""
    options: tuple[tuple[str, Any], ...] = ()
    """Further (name, value) options of the solver, e.g. (("max_iterations", 400),)."""

    def __post_init__(self) -> None:
        check_choice("method", self.method, {"threshold", *DECODERS, *METHODS})
        check_choice("rounding", self.rounding, ROUNDING)
        if (self.method == "threshold") != (self.threshold is not None):
            raise UserError(
                f"threshold = {self.threshold}: a number goes with method = 'threshold', and only with it "
                f"(method = {self.method!r})"
            )
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise UserError(f"threshold = {self.threshold}: a finite number is needed")


def decode(
    x: Float[Array, "b d"], dictionary: Float[Array, "n_atoms d"], k: int, decoder: Decoder | str
) -> Int[Array, "b n_atoms"]:
    """Decodes signals: the atoms of each, by any decoder.

    Args:
      x: signals, sums of k unit rows.
      dictionary: unit rows.
      k: active atoms per signal, known to the decoder.
      decoder: a `Decoder`, or the name of one that needs no further choice.

    Returns:
      Counts, int32; the signal was decoded if they equal its 0/1 code. Warns (RuntimeWarning) of rows on which a
      solver ran out of iterations; `attempt` returns which.

    Raises:
      UserError: shapes that do not fit, NaN or infinity, rows not of norm 1, k out of range, an unknown decoder.

    Examples:
      >>> decode(jnp.eye(3)[:1] + jnp.eye(3)[2:], jnp.eye(3), 2, "top_k").tolist()
      [[1, 0, 1]]
    """
    counts, converged = attempt(x, dictionary, k, decoder)
    if share := float(1 - jnp.mean(converged)):
        warnings.warn(f"the solver did not converge on {share:.1%} of {len(converged)} rows", RuntimeWarning, 2)
    return counts


def attempt(
    x: Float[Array, "b d"], dictionary: Float[Array, "n_atoms d"], k: int, decoder: Decoder | str
) -> tuple[Int[Array, "b n_atoms"], Bool[Array, "b"]]:
    """As `decode`, without a warning.

    Args:
      x: signals, sums of k unit rows.
      dictionary: unit rows.
      k: active atoms per signal, known to the decoder.
      decoder: a `Decoder`, or the name of one that needs no further choice.

    Returns:
      (counts, whether the solver converged on each row: always, for decoders that iterate a fixed number of times).

    Raises:
      UserError: as `decode`.
    """
    x, dictionary = jnp.asarray(x), jnp.asarray(dictionary)
    if x.ndim != 2 or dictionary.ndim != 2 or x.shape[1] != dictionary.shape[1]:
        raise UserError(f"x = {x.shape}, dictionary = {dictionary.shape}: [b, d] and [n_atoms, d] are needed")
    check_sizes(b=x.shape[0], n_atoms=dictionary.shape[0], d=x.shape[1], k=k)
    check_values(x, dictionary, name="x")
    decoder = Decoder(method=decoder) if isinstance(decoder, str) else decoder
    always = jnp.ones(x.shape[0], bool)
    if decoder.threshold is not None:
        return _threshold(x, dictionary, decoder.threshold), always
    if decoder.method in DECODERS:
        return DECODERS[decoder.method](x, dictionary, k), always
    options: dict[str, Any] = dict(decoder.options) | ({"k": k} if METHODS[decoder.method].needs == "k" else {})
    solution = infer(x, dictionary, method=decoder.method, nonneg=decoder.nonneg, **options)
    return round_code(solution.dense(), k, decoder.rounding), solution.converged


def exact(counts: Int[Array, "b n_atoms"], code: Bool[Array, "b n_atoms"]) -> Bool[Array, "b"]:
    """Whether the counts equal the 0/1 code, row by row: the one criterion of success."""
    return jnp.all(counts == code, axis=1)
