"""Least squares on a given support, signed or non-negative: small Gram systems, one per row.

Unused slots of a support are masked: their rows and columns of an inverse are 0. Keeping inverses instead of factors
makes a new atom an update of rank one, and all steps products over the rows of a block. The inverse loses precision in
float32, because the Gram matrix squares the condition number. One refinement step in signal space restores it.

LAPACK is avoided: XLA's batched Cholesky inside a loop deadlocks the thread pool of a machine with two cores (jaxlib
0.10.2). Sweeps over the whole block are as fast.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from saejax.sparse_coding import products

DEPENDENT = 1e-5
"""Share of an atom's energy outside the span of the others below which float32 cannot add it."""
_EPS = 1e-6  # of the largest correlation: what float32 cannot tell from 0
_PATIENCE = 3  # full exchanges that may fail to reduce the violations, before single ones


def multiply(matrix: Float[Array, "b k k"], vector: Float[Array, "b k"]) -> Float[Array, "b k"]:
    """Returns the product of each row's matrix with its vector."""
    return jnp.einsum("bij,bj->bi", matrix, vector, precision=lax.Precision.HIGHEST)


def inverse(gram: Float[Array, "b k k"], used: Bool[Array, "b k"]) -> Float[Array, "b k k"]:
    """Returns the inverses of positive definite matrices restricted to the used slots; 0 elsewhere.

    Sweeps: k updates of rank one. A slot that depends on those before it gives infinities or NaN.
    """
    k = gram.shape[1]
    both = used[:, :, None] & used[:, None, :]
    tableau = jnp.moveaxis(jnp.where(both, gram, jnp.eye(k)[None]), 0, -1)  # rows of the block last: they vectorise

    def sweep(i, a):
        row = lax.dynamic_index_in_dim(a, i, 0, keepdims=False)
        pivot = lax.dynamic_index_in_dim(row, i, 0, keepdims=True)
        scaled = row / pivot
        at_row = (jnp.arange(k) == i)[:, None, None]
        at_column = (jnp.arange(k) == i)[None, :, None]
        swept = jnp.where(at_column, scaled[:, None], a - row[:, None] * scaled[None])
        return jnp.where(at_row, jnp.where(at_column, -1 / pivot[None], scaled[None]), swept)

    swept = -jnp.moveaxis(lax.fori_loop(0, k, sweep, tableau), -1, 0)
    return jnp.where(both, swept, 0)


def extend(
    inverse: Float[Array, "b k k"], column: Float[Array, "b k"], slot: Array
) -> tuple[Float[Array, "b k k"], Float[Array, "b"]]:
    """Returns the inverses with one more atom, of norm 1, and what of its energy the others do not span.

    Args:
      inverse: Of the Gram matrix of the atoms so far; 0 in all other slots.
      column: Inner products of the new atom with all atoms.
      slot: Where it goes.
    """
    spanned = multiply(inverse, column)
    rest = 1 - jnp.sum(column * spanned, axis=1)
    border = spanned - (jnp.arange(column.shape[1]) == slot)[None, :]
    safe = jnp.where(rest > 0, rest, 1)
    return inverse + border[:, :, None] * (border / safe[:, None])[:, None, :], rest


def nonneg_least_squares(
    gram: Float[Array, "b k k"],
    target: Float[Array, "b k"],
    used: Bool[Array, "b k"],
    passive: Bool[Array, "b k"],
    inverse_passive: Float[Array, "b k k"],
) -> tuple[Float[Array, "b k"], Bool[Array, "b k"], Float[Array, "b k k"], Bool[Array, "b"]]:
    r"""Returns argmin over w >= 0 of :math:`\frac12 w^T G w - t^T w` on the used slots.

    Block principal pivoting: solve on the passive slots, exchange all that violate `w >= 0` or `G w >= t`; when that
    stops helping, exchange the last violator only, which is finite.

    Args:
      gram: Inner products of the atoms.
      target: Inner products of the atoms with the signal.
      used: Slots that hold an atom.
      passive: First guess of the slots above 0.
      inverse_passive: Inverse of `gram` on that guess.

    Returns:
      The weights, the slots above 0, the inverse on them, and whether the row was solved.

    Source: Kim and Park, Fast nonnegative matrix factorization: an active-set-like method, 2011.
    """
    b, k = target.shape
    scale = _EPS * jnp.maximum(jnp.max(jnp.abs(jnp.where(used, target, 0)), axis=1, keepdims=True), 1e-30)

    def violators(w, passive):
        return used & jnp.where(passive, w < -scale, multiply(gram, w) - target < -scale)

    def step(state):
        i, passive, inv, _, bad, fewest, patience = state
        n_bad = jnp.sum(bad, axis=1)
        patience = jnp.where(n_bad < fewest, _PATIENCE, patience - 1)
        last = jnp.max(jnp.where(bad, jnp.arange(k)[None, :], -1), axis=1, keepdims=True)
        passive = passive ^ jnp.where(patience[:, None] >= 0, bad, jnp.arange(k)[None, :] == last)
        changed = jnp.any(bad, axis=1)[:, None, None]
        inv = jnp.where(changed, inverse(gram, passive), inv)
        w = multiply(inv, target)
        return i + 1, passive, inv, w, violators(w, passive), jnp.minimum(fewest, n_bad), patience

    def unfinished(state):
        return (state[0] < 8 * k + 16) & jnp.any(state[4])

    w = multiply(inverse_passive, target)
    start = (0, passive, inverse_passive, w, violators(w, passive), jnp.full(b, k + 1), jnp.full(b, _PATIENCE))
    _, passive, inv, w, bad, _, _ = lax.while_loop(unfinished, step, start)
    # NaN violates nothing, and solves nothing.
    return jnp.maximum(w, 0), passive, inv, ~jnp.any(bad, axis=1) & jnp.all(jnp.isfinite(w), axis=1)


def refine(
    w: Float[Array, "b k"],
    inverse: Float[Array, "b k k"],
    atoms: Float[Array, "b k d"],
    y: Float[Array, "b d"],
    nonneg: bool,
) -> tuple[Float[Array, "b k"], Float[Array, "b d"]]:
    """Returns better weights, from the residual in signal space, and their residual."""
    w = w + multiply(inverse, products.inner(atoms, y - products.combine(w, atoms)))
    w = jnp.maximum(w, 0) if nonneg else w
    return w, y - products.combine(w, atoms)


def fit(
    y: Float[Array, "b d"], atoms: Float[Array, "b k d"], used: Bool[Array, "b k"], nonneg: bool
) -> tuple[Float[Array, "b k"], Float[Array, "b d"], Bool[Array, "b"]]:
    """Returns the least-squares weights of each row's atoms, the residual, and whether the row was solved.

    Dependent atoms have no unique weights: such a row is not solved and may hold NaN.
    """
    gram = jnp.einsum("bid,bjd->bij", atoms, atoms, precision=lax.Precision.HIGHEST)
    target = products.inner(atoms, y)
    inv, passive, solved = inverse(gram, used), used, jnp.ones(y.shape[0], bool)
    w = multiply(inv, target)
    if nonneg:
        w, passive, inv, solved = nonneg_least_squares(gram, target, used, used, inv)
    w, residual = refine(w, inv, atoms, y, nonneg)
    return w, residual, solved & independent(gram, inv, passive) & jnp.all(jnp.isfinite(w), axis=1)


def independent(
    gram: Float[Array, "b k k"], inverse: Float[Array, "b k k"], used: Bool[Array, "b k"]
) -> Bool[Array, "b"]:
    """Returns whether each used atom has energy outside the span of the others that float32 can tell from 0.

    That energy is one over the atom's diagonal entry of the inverse. Rounding leaves dependent atoms a few 1e-7 of
    theirs, of either sign, and then weights that mean nothing.
    """
    shares = jnp.diagonal(gram, axis1=1, axis2=2) * jnp.diagonal(inverse, axis1=1, axis2=2)
    return jnp.all(~used | ((shares > 0) & (shares < 1 / DEPENDENT)), axis=1)
