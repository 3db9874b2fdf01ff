r"""Proximal gradient for the Lasso: :math:`\min_z \frac12\|y - zD\|^2 + \lambda\|z\|_1`, signed or non-negative.

The dual point is the residual scaled into the dual's feasible set. So the gap bounds the distance from the optimum,
and a row stops when its own gap is small. Products are linear: one pair per step serves the gradient at the
extrapolated point and the gap at the iterate.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from saejax.sparse_coding import products, row_blocks, working_set
from saejax.sparse_coding.solution import Solution
from saejax.sparse_coding.working_set import shrink


@functools.partial(jax.jit, static_argnames="nonneg")
def ista(
    y: Float[Array, "b d"],
    dictionary: Float[Array, "n d"],
    l1_coef: float | Float[Array, ""],
    nonneg: bool = True,
    warm_start: Float[Array, "b n"] | None = None,
    max_iterations: int = 10_000,
    tolerance: float = 1e-5,
) -> Solution:
    r"""Iterative soft-thresholding: :math:`z \leftarrow S_{\lambda/L}(z + (y - zD) D^T / L)`.

    Stops where the duality gap is within `tolerance` of :math:`\frac12\|y\|^2`; `Solution.gap` is that ratio.
    """
    return _descend(y, dictionary, l1_coef, nonneg, warm_start, _Until(max_iterations, tolerance), accelerate=False)


@functools.partial(jax.jit, static_argnames="nonneg")
def fista(
    y: Float[Array, "b d"],
    dictionary: Float[Array, "n d"],
    l1_coef: float | Float[Array, ""],
    nonneg: bool = True,
    warm_start: Float[Array, "b n"] | None = None,
    max_iterations: int = 2_000,
    tolerance: float = 1e-5,
) -> Solution:
    r"""ISTA with Nesterov's momentum, restarted per row where it points uphill.

    With many more atoms than dimensions, working sets come first; their steps count as iterations. The gap is always
    that of the whole problem. Plain FISTA continues where working sets do not close it.

    Stops where the duality gap is within `tolerance` of :math:`\frac12\|y\|^2`; `Solution.gap` is that ratio.

    Source: Beck and Teboulle, A fast iterative shrinkage-thresholding algorithm, 2009; O'Donoghue and Candes,
    Adaptive restart for accelerated gradient schemes, 2015.
    """
    return _descend(y, dictionary, l1_coef, nonneg, warm_start, _Until(max_iterations, tolerance), accelerate=True)


def lipschitz(dictionary: Float[Array, "n d"]) -> Float[Array, ""]:
    """Returns the largest squared singular value by power iteration, times 1.01 because it comes from below."""
    n, d = dictionary.shape
    small = dictionary if n < d else dictionary.T
    gram = jnp.matmul(small, small.T, precision=lax.Precision.HIGHEST)
    start = jax.random.normal(jax.random.key(0), (min(n, d),))

    def step(_, v):
        v = jnp.matmul(gram, v, precision=lax.Precision.HIGHEST)
        return v / jnp.linalg.norm(v)

    v = lax.fori_loop(0, 100, step, start / jnp.linalg.norm(start))
    return 1.01 * jnp.linalg.norm(jnp.matmul(gram, v, precision=lax.Precision.HIGHEST))


def relative_gap(
    y: Float[Array, "b d"],
    latents: Float[Array, "b n"],
    residual: Float[Array, "b d"],
    correlation: Float[Array, "b n"],
    l1_coef: Float[Array, ""],
    nonneg: bool,
) -> Float[Array, "b"]:
    r"""Returns the duality gap of the Lasso over :math:`\frac12\|y\|^2`.

    With the dual point :math:`\theta = s r` it is :math:`\frac12(1-s)^2\|r\|^2 + \sum_j(\lambda|z_j| - s z_j d_j^T r)`:
    a sum of terms that are not negative, so nothing cancels in float32.
    """
    size = products.norms(y)
    unit = jnp.where(size > 0, size, 1)  # in units of the signal no square overflows or vanishes
    energy = (products.norms(residual) / unit) ** 2
    steepest = jnp.max(correlation if nonneg else jnp.abs(correlation), axis=1)
    scale = jnp.minimum(1.0, l1_coef / jnp.where(steepest > 0, steepest, l1_coef))
    level, slope = (l1_coef / unit)[:, None], (scale / unit)[:, None]
    slack = jnp.sum(level * jnp.abs(latents) - slope * correlation * latents, axis=1) / unit
    return ((1 - scale) ** 2 * energy + 2 * jnp.maximum(slack, 0)) / jnp.where(size > 0, 1, 2)


class _Until(NamedTuple):
    """When rows are done."""

    max_iterations: Any
    tolerance: Any


def _descend(y, dictionary, l1_coef, nonneg, warm_start, until: _Until, accelerate) -> Solution:
    shared = (dictionary, jnp.asarray(l1_coef, jnp.float32), lipschitz(dictionary))
    body = functools.partial(_block, nonneg=nonneg, until=until, accelerate=accelerate)
    latents, residual_norm, iterations, gap = row_blocks.over_blocks(
        body, (y, warm_start), shared, 4 * dictionary.shape[0]
    )
    return Solution(
        residual_norm, iterations, gap <= until.tolerance, gap, latents=latents, n_atoms=dictionary.shape[0]
    )


def _block(y, warm_start, dictionary, l1_coef, lip, *, nonneg, until: _Until, accelerate):
    max_iterations, tolerance = until

    def measure(latents):
        residual = y - products.synthesise(latents, dictionary)
        correlation = products.correlate(residual, dictionary)
        return correlation, relative_gap(y, latents, residual, correlation, l1_coef, nonneg)

    def step(state):
        i, z, z_old, c, c_old, t, gap, iterations = state
        t_new = (1 + jnp.sqrt(1 + 4 * t**2)) / 2
        momentum = ((t - 1) / t_new)[:, None] if accelerate else jnp.zeros((1, 1))
        ahead = z + momentum * (z - z_old)
        z_new = shrink(ahead + (c + momentum * (c - c_old)) / lip, l1_coef / lip, nonneg)
        running = gap > tolerance
        z_new = jnp.where(running[:, None], z_new, z)
        uphill = jnp.sum((ahead - z_new) * (z_new - z), axis=1) > 0
        c_new, gap = measure(z_new)
        return i + 1, z_new, z, c_new, c, jnp.where(uphill, 1.0, t_new), gap, iterations + running

    def unfinished(state):
        return (state[0] < max_iterations) & jnp.any(state[6] > tolerance)

    z = jnp.zeros((y.shape[0], dictionary.shape[0])) if warm_start is None else warm_start
    z = jnp.maximum(z, 0) if nonneg else z
    c, gap = measure(z)
    iterations, i = jnp.zeros(y.shape[0], jnp.int32), 0
    m = working_set.size(*dictionary.shape) if accelerate else None
    if m is not None:

        def head_start(state):
            i, z, c, gap, iterations = state
            running = gap > tolerance
            z_new = working_set.solve(y, z, c, dictionary, l1_coef, nonneg, m)
            c_new, gap_new = measure(z_new)
            better = gap_new < gap
            z, c = jnp.where(better[:, None], z_new, z), jnp.where(better[:, None], c_new, c)
            iterations = iterations + running * working_set.STEPS
            return i + working_set.STEPS, z, c, jnp.where(better, gap_new, gap), iterations

        last = working_set.steps(max_iterations)
        start = (i, z, c, gap, iterations)
        i, z, c, gap, iterations = lax.while_loop(
            lambda state: (state[0] < last) & jnp.any(state[3] > tolerance), head_start, start
        )
    state = (i, z, z, c, c, jnp.ones(y.shape[0]), gap, iterations)
    _, z, _, _, _, _, gap, iterations = lax.while_loop(unfinished, step, state)
    return z, products.norms(y - products.synthesise(z, dictionary)), iterations, gap
