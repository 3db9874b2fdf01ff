r"""Basis pursuit: :math:`\min_z \|z\|_1` subject to :math:`zD = y`, signed or non-negative, by ADMM.

It alternates two steps: the projection onto the codes that reproduce the signal exactly, and the soft threshold. One
pseudo-inverse of the dictionary serves all rows and steps. The threshold's level follows the size of the row's codes.
The dictionary need not span the space: atoms may repeat or be zero, or be fewer than the dimensions.
"""

import functools
import math

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
_RANK = 2.0  # of eps sqrt(n) times the largest singular value: of dependent atoms rounding leaves less than 0.2 of that


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

    `Solution.gap` is the larger of the primal and dual residuals of ADMM, each relative to its own scale. It is
    infinite where the signal does not lie in the span of the atoms; the code is then that of its projection. A row has
    converged where the gap is within `tolerance` and the signal is reproduced.

    Source: Chen, Donoho and Saunders, Atomic decomposition by basis pursuit, 1998; Boyd et al., Distributed
    optimization and statistical learning via ADMM, 2011.
    """
    body = functools.partial(_block, nonneg=nonneg, max_iterations=max_iterations, tolerance=tolerance)
    shared = (dictionary, pseudo_inverse(dictionary))
    latents, residual_norm, iterations, gap, reproduced = row_blocks.over_blocks(
        body, (y, warm_start), shared, 4 * dictionary.shape[0]
    )
    converged = (gap <= tolerance) & reproduced
    return Solution(residual_norm, iterations, converged, gap, latents=latents, n_atoms=dictionary.shape[0])


def pseudo_inverse(dictionary: Float[Array, "n d"]) -> Float[Array, "d n"]:
    """Returns the pseudo-inverse: `y @ it` is the code of least l2 norm whose signal is nearest to y.

    Singular values that rounding alone could have left count as 0. Its error is that of the smallest other one, eps
    times their ratio; by way of the Gram matrix it would be the square of the ratio.
    """
    basis, triangle = jnp.linalg.qr(dictionary)
    left, values, right = jnp.linalg.svd(triangle, full_matrices=False)
    cut = _RANK * jnp.finfo(dictionary.dtype).eps * math.sqrt(max(dictionary.shape)) * values[0]
    inverted = jnp.where(values > cut, 1 / jnp.where(values > cut, values, 1), 0)
    left = jnp.matmul(basis, left, precision=lax.Precision.HIGHEST)
    return jnp.matmul(right.T * inverted[None, :], left.T, precision=lax.Precision.HIGHEST)


def _block(y, warm_start, dictionary, inverse, *, nonneg, max_iterations, tolerance):
    def project(v):
        return v + jnp.matmul(y - products.synthesise(v, dictionary), inverse, precision=lax.Precision.HIGHEST)

    least = project(jnp.zeros((y.shape[0], dictionary.shape[0])))  # the code of least l2 norm
    possible = products.norms(y - products.synthesise(least, dictionary)) <= _FEASIBLE * products.norms(y)
    level = _LEVEL * jnp.max(jnp.abs(least), axis=1, keepdims=True)

    def step(state):
        i, z, u, gap, iterations = state
        running = gap > tolerance
        x = project(z - u)
        relaxed = _RELAXATION * x + (1 - _RELAXATION) * z
        z_new = shrink(relaxed + u, level, nonneg)
        u_new = u + relaxed - z_new
        primal = products.quotient(products.norms(x - z_new), products.norms(x))
        dual = products.quotient(products.norms(z_new - z), products.norms(u_new))
        gap = jnp.where(running, jnp.maximum(primal, dual), gap)
        keep = running[:, None]
        return i + 1, jnp.where(keep, z_new, z), jnp.where(keep, u_new, u), gap, iterations + running

    def unfinished(state):
        return (state[0] < max_iterations) & jnp.any(state[3] > tolerance)

    z = jnp.zeros_like(least) if warm_start is None else warm_start
    gap = jnp.where(jnp.any(y != 0, axis=1), jnp.inf, 0.0)  # a signal of zeros, and no other, is done
    state = (0, jnp.where(level > 0, z, 0), jnp.zeros_like(z), gap, jnp.zeros(y.shape[0], jnp.int32))
    _, z, _, gap, iterations = lax.while_loop(unfinished, step, state)
    residual_norm = products.norms(y - products.synthesise(z, dictionary))
    reproduced = residual_norm <= _FEASIBLE * products.norms(y)
    return z, residual_norm, iterations, jnp.where(possible, gap, jnp.inf), reproduced
