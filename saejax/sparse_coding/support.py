"""Least squares on a given support, signed or non-negative: small Gram systems, one per row.

Unused slots of a support are masked: their row and column of the Gram matrix are those of the identity.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from saejax.sparse_coding import products

_EPS = 1e-6  # of the largest correlation: what float32 cannot tell from 0
_PATIENCE = 3  # full exchanges that may fail to reduce the violations, before single ones


def least_squares(
    gram: Float[Array, "b k k"], target: Float[Array, "b k"], used: Bool[Array, "b k"]
) -> Float[Array, "b k"]:
    """Returns `w` with `gram w = target` on the used slots, 0 elsewhere, by Cholesky."""
    both = used[:, :, None] & used[:, None, :]
    eye = jnp.eye(gram.shape[1])[None]
    factor = jnp.linalg.cholesky(jnp.where(both, gram, eye), symmetrize_input=False)
    w = jax.scipy.linalg.cho_solve((factor, True), jnp.where(used, target, 0)[..., None])[..., 0]
    return jnp.where(used, w, 0)


def nonneg_least_squares(
    gram: Float[Array, "b k k"], target: Float[Array, "b k"], used: Bool[Array, "b k"], passive: Bool[Array, "b k"]
) -> tuple[Float[Array, "b k"], Bool[Array, "b k"], Bool[Array, "b"]]:
    r"""Returns argmin over w >= 0 of :math:`\frac12 w^T G w - t^T w` on the used slots.

    Block principal pivoting: solve on the passive slots, exchange all that violate `w >= 0` or `G w >= t`; when that
    stops helping, exchange the last violator only, which is finite.

    Args:
      gram: Inner products of the atoms.
      target: Inner products of the atoms with the signal.
      used: Slots that hold an atom.
      passive: First guess of the slots above 0.

    Returns:
      The weights, the slots above 0, and whether the row was solved.

    Source: Kim and Park, Fast nonnegative matrix factorization: an active-set-like method, 2011.
    """
    k = gram.shape[1]
    scale = _EPS * jnp.maximum(jnp.max(jnp.abs(jnp.where(used, target, 0)), axis=1, keepdims=True), 1e-30)

    def violators(w, passive):
        dual = jnp.einsum("bij,bj->bi", gram, w, precision=lax.Precision.HIGHEST) - target
        return used & jnp.where(passive, w < -scale, dual < -scale)

    def step(state):
        i, passive, w, bad, fewest, patience = state
        n_bad = jnp.sum(bad, axis=1)
        better = n_bad < fewest
        patience = jnp.where(better, _PATIENCE, patience - 1)
        last = jnp.max(jnp.where(bad, jnp.arange(k)[None, :], -1), axis=1)
        exchanged = jnp.where((patience >= 0)[:, None], bad, jnp.arange(k)[None, :] == last[:, None])
        passive = passive ^ exchanged
        w = least_squares(gram, target, passive)
        return i + 1, passive, w, violators(w, passive), jnp.minimum(fewest, n_bad), patience

    def unfinished(state):
        return (state[0] < 8 * k + 16) & jnp.any(state[3])

    passive = passive & used
    w = least_squares(gram, target, passive)
    n = jnp.full(gram.shape[0], k + 1)
    state = (0, passive, w, violators(w, passive), n, jnp.full(gram.shape[0], _PATIENCE))
    _, passive, w, bad, _, _ = lax.while_loop(unfinished, step, state)
    return jnp.maximum(w, 0), passive, ~jnp.any(bad, axis=1)


def fit(
    y: Float[Array, "b d"], atoms: Float[Array, "b k d"], used: Bool[Array, "b k"], nonneg: bool
) -> tuple[Float[Array, "b k"], Bool[Array, "b"]]:
    """Returns the least-squares weights of each row's atoms, and whether the row was solved."""
    gram = jnp.einsum("bid,bjd->bij", atoms, atoms, precision=lax.Precision.HIGHEST)
    target = products.inner(atoms, y)
    if nonneg:
        w, passive, solved = nonneg_least_squares(gram, target, used, used)
    else:
        w, passive, solved = least_squares(gram, target, used), used, jnp.ones(y.shape[0], bool)
    # One step of refinement with the residual taken in signal space: the Gram matrix squares the condition.
    error = products.inner(atoms, y - products.combine(w, atoms))
    w = w + least_squares(gram, error, passive)
    return (jnp.maximum(w, 0) if nonneg else w), solved & jnp.all(jnp.isfinite(w), axis=1)
