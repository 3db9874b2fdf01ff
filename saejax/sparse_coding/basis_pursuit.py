r"""Basis pursuit: :math:`\min_z \|z\|_1` subject to :math:`zD = y`, signed or non-negative, by ADMM.

Alternates the projection onto the codes that reproduce the signal exactly (one Cholesky factor of the small Gram
matrix serves all rows and steps) with the soft threshold, whose level follows the size of the row's codes.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from saejax.sparse_coding import products, row_blocks
from saejax.sparse_coding.solution import Solution
from saejax.sparse_coding.working_set import shrink

_RELAXATION = 1.6
_LEVEL = 0.1  # threshold over the largest entry of the least-squares code: of 0.03 to 1 the fastest by a little
_FEASIBLE = 1e-3  # relative residual above which the constraints have no solution in float32


@functools.partial(jax.jit, static_argnames="nonneg")
def basis_pursuit(
    y: Float[Array, "b d"],
    dictionary: Float[Array, "n d"],
    nonneg: bool = True,
    warm_start: Float[Array, "b n"] | None = None,
    max_iterations: int = 5_000,
    tolerance: float = 1e-5,
) -> Solution:
    r"""Returns the exact code of least l1 norm (non-negative: with no entry below 0).

    `Solution.gap` is the larger of the primal and dual residuals of ADMM, each relative to its own scale; a row has
    converged where it is within `tolerance` and the signal is reproduced.

    Source: Chen, Donoho and Saunders, Atomic decomposition by basis pursuit, 1998; Boyd et al., Distributed
    optimization and statistical learning via ADMM, 2011.
    """
    gram = jnp.matmul(dictionary.T, dictionary, precision=lax.Precision.HIGHEST)
    ridge = 1e-7 * jnp.trace(gram) / gram.shape[0]
    inverse = jax.scipy.linalg.cho_solve(
        (jnp.linalg.cholesky(gram + ridge * jnp.eye(gram.shape[0])), True), dictionary.T
    )  # [d, n]: the pseudo-inverse, so that a projection is two products
    body = functools.partial(_block, nonneg=nonneg, max_iterations=max_iterations, tolerance=tolerance)
    shared = (dictionary, inverse)
    latents, residual_norm, iterations, gap, feasible = row_blocks.over_blocks(
        body, (y, warm_start), shared, 4 * dictionary.shape[0]
    )
    converged = (gap <= tolerance) & feasible
    return Solution(residual_norm, iterations, converged, gap, latents=latents, n_atoms=dictionary.shape[0])


def _block(y, warm_start, dictionary, inverse, *, nonneg, max_iterations, tolerance):
    def project(v):
        return v + jnp.matmul(y - products.synthesise(v, dictionary), inverse, precision=lax.Precision.HIGHEST)

    least = project(jnp.zeros((y.shape[0], dictionary.shape[0])))  # the code of least l2 norm
    level = _LEVEL * jnp.max(jnp.abs(least), axis=1, keepdims=True)

    def step(state):
        i, z, u, gap, iterations = state
        running = gap > tolerance
        x = project(z - u)
        relaxed = _RELAXATION * x + (1 - _RELAXATION) * z
        z_new = shrink(relaxed + u, level, nonneg)
        u_new = u + relaxed - z_new
        primal = products.norms(x - z_new) / jnp.maximum(products.norms(x), 1e-30)
        dual = products.norms(z_new - z) / jnp.maximum(products.norms(u_new), 1e-30)
        gap = jnp.where(running, jnp.maximum(primal, dual), gap)
        keep = running[:, None]
        return i + 1, jnp.where(keep, z_new, z), jnp.where(keep, u_new, u), gap, iterations + running

    def unfinished(state):
        return (state[0] < max_iterations) & jnp.any(state[3] > tolerance)

    z = jnp.zeros_like(least) if warm_start is None else warm_start
    gap = jnp.where(level[:, 0] > 0, jnp.inf, 0.0)  # a signal of zeros is done
    state = (0, jnp.where(level > 0, z, 0), jnp.zeros_like(z), gap, jnp.zeros(y.shape[0], jnp.int32))
    _, z, _, gap, iterations = lax.while_loop(unfinished, step, state)
    residual_norm = products.norms(y - products.synthesise(z, dictionary))
    return z, residual_norm, iterations, gap, residual_norm <= _FEASIBLE * products.norms(y)
