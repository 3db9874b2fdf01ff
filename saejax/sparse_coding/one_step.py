"""One-step decoders: one product and a selection, no iteration.

An encoder with tied weights does the same. They are the baseline of every iterative solver.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from saejax.kernels import top_k as kernel
from saejax.sparse_coding import products, row_blocks
from saejax.sparse_coding.solution import Solution


@functools.partial(jax.jit, static_argnames="nonneg")
def threshold(
    y: Float[Array, "b d"], dictionary: Float[Array, "n d"], threshold: float | Float[Array, ""], nonneg: bool = True
) -> Solution:
    r"""Keeps every correlation that reaches the threshold: :math:`z_j = s_j 1[s_j \ge \tau]`, :math:`s = D y`.

    Args:
      y: Signals, float32.
      dictionary: Unit rows.
      threshold: The level, in the unit of the signals.
      nonneg: Compare s (True) or its magnitude (False) with the level.
    """

    def block(y, dictionary, level):
        scores = products.correlate(y, dictionary)
        kept = (scores >= level) & (scores > 0) if nonneg else jnp.abs(scores) >= level
        latents = jnp.where(kept, scores, 0)
        return latents, products.norms(y - products.synthesise(latents, dictionary))

    shared = (dictionary, jnp.asarray(threshold, jnp.float32))
    latents, residual_norm = row_blocks.over_blocks(block, (y,), shared, dictionary.shape[0])
    return _account(residual_norm, latents=latents, n_atoms=dictionary.shape[0])


@functools.partial(jax.jit, static_argnames=("k", "nonneg"))
def top_k(y: Float[Array, "b d"], dictionary: Float[Array, "n d"], k: int, nonneg: bool = True) -> Solution:
    """Keeps the k largest correlations (signed: of largest magnitude); nonneg leaves a slot empty if not above 0."""

    def block(y, dictionary):
        scores = products.correlate(y, dictionary)
        ranked = scores if nonneg else jnp.abs(scores)
        _, indices = kernel.top_k(ranked, k)
        values = jnp.take_along_axis(scores, indices, axis=1)
        values = jnp.maximum(values, 0) if nonneg else values
        return values, indices, products.norms(y - products.combine(values, dictionary[indices]))

    values, indices, residual_norm = row_blocks.over_blocks(block, (y,), (dictionary,), dictionary.shape[0])
    return _account(residual_norm, values=values, indices=indices, n_atoms=dictionary.shape[0])


def _account(residual_norm, **code) -> Solution:
    return Solution(
        residual_norm=residual_norm,
        iterations=jnp.ones(residual_norm.shape, jnp.int32),
        converged=jnp.isfinite(residual_norm),
        gap=jnp.full(residual_norm.shape, jnp.nan),
        **code,
    )
