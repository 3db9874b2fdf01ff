"""Working sets: the Lasso on the few atoms that matter, a head start for FISTA on large dictionaries.

A row's working set consists of its atoms in use and those that correlate most with the residual. On it the problem is
small and well conditioned. The caller's duality gap tells whether that solved the whole problem.

Source: Massias, Gramfort and Salmon, Celer: a fast solver for the Lasso with dual extrapolation, 2018.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from saejax.kernels.top_k import top_k
from saejax.sparse_coding import products

STEPS = 50
"""Proximal steps on a working set."""
_ROUNDS = 8
_WIDER = 16  # dictionaries of at least this many working sets are worth it


def size(n: int, d: int) -> int | None:
    """Returns the atoms of a working set, a quarter of the dimensions, or None where the dictionary is too small."""
    m = max(d // 4, 16)
    return m if n >= _WIDER * m else None


def steps(max_iterations: int | Int[Array, ""]) -> Int[Array, ""]:
    """Returns how many of the allowed iterations go into working sets, a multiple of `STEPS`."""
    return jnp.minimum(_ROUNDS, max_iterations // STEPS) * STEPS


def solve(
    y: Float[Array, "b d"],
    latents: Float[Array, "b n"],
    correlation: Float[Array, "b n"],
    dictionary: Float[Array, "n d"],
    l1_coef: Float[Array, ""],
    nonneg: bool,
    m: int,
) -> Float[Array, "b n"]:
    """Returns codes that are near optimal on the working sets. A row with more than m atoms in use is unchanged.

    Args:
      y: Signals.
      latents: Codes so far.
      correlation: Of their residuals with the atoms.
      dictionary: Atoms.
      l1_coef: Weight of the l1 norm.
      nonneg: Whether codes must not fall below 0.
      m: Atoms of a working set.
    """
    scores = correlation if nonneg else jnp.abs(correlation)
    _, indices = top_k(jnp.where(latents != 0, jnp.inf, scores), m)
    atoms = dictionary[indices]
    gram = jnp.einsum("bid,bjd->bij", atoms, atoms, precision=lax.Precision.HIGHEST)
    target = products.inner(atoms, y)
    steepest = jnp.max(jnp.sum(jnp.abs(gram), axis=2), axis=1, keepdims=True)  # row sums bound the eigenvalues
    rate = 1 / jnp.where(steepest > 0, steepest, 1)  # 0: atoms of zeros only

    def step(_, state):
        z, z_old, t = state
        t_new = (1 + jnp.sqrt(1 + 4 * t**2)) / 2
        ahead = z + ((t - 1) / t_new) * (z - z_old)
        gradient = jnp.einsum("bij,bj->bi", gram, ahead, precision=lax.Precision.HIGHEST) - target
        z_new = shrink(ahead - rate * gradient, rate * l1_coef, nonneg)
        uphill = jnp.sum((ahead - z_new) * (z_new - z), axis=1, keepdims=True) > 0
        return z_new, z, jnp.where(uphill, 1.0, t_new)

    start = jnp.take_along_axis(latents, indices, axis=1)
    z, _, _ = lax.fori_loop(0, STEPS, step, (start, start, jnp.ones((y.shape[0], 1))))
    solved = jnp.zeros_like(latents).at[jnp.arange(y.shape[0])[:, None], indices].set(z)
    fits = jnp.sum(latents != 0, axis=1, keepdims=True) <= m
    return jnp.where(fits, solved, latents)


def shrink(u: Float[Array, "*s"], amount: Float[Array, "*#s"], nonneg: bool) -> Float[Array, "*s"]:
    """Returns the soft threshold of u: what is left of its magnitude above `amount`."""
    return jnp.maximum(u - amount, 0) if nonneg else jnp.sign(u) * jnp.maximum(jnp.abs(u) - amount, 0)
