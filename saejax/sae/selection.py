"""Selection of latents in a batch: the best of each row, or the best of all rows together.

In training, architectures of the BatchTopK family keep k latents per row on average. At inference they keep those
above a threshold, so a row's code does not depend on its neighbours. The threshold (parameter `threshold`) is a
running mean of the smallest activation kept in a batch, 0 before the first step.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from saejax.kernels import kth_largest
from saejax.sae import base

RATE = 0.01
"""Weight of the newest batch in the running mean."""


def of_batch(pre_acts: Float[Array, "b d_sae"], k: int) -> base.Encoding:
    """Returns the k b largest positive latents of b rows; latents that tie with the last one are kept as well."""
    acts = jax.nn.relu(pre_acts)
    last = _last_kept(acts, k)
    return base.Encoding(latents=jnp.where(acts >= last, acts, 0), d_sae=acts.shape[1])


def above(pre_acts: Float[Array, "b d_sae"], threshold: Float[Array, ""], k: int) -> base.Encoding:
    """Returns the latents above the threshold; before any step, when it is 0, those of `of_batch`."""
    acts = jax.nn.relu(pre_acts)
    last = lax.cond(threshold > 0, lambda: jnp.zeros(()), lambda: _last_kept(acts, k))
    kept = jnp.where(threshold > 0, acts > threshold, acts >= last)
    return base.Encoding(latents=jnp.where(kept, acts, 0), d_sae=acts.shape[1])


def track(params: base.SAEParams, encoding: base.Encoding) -> base.SAEParams:
    """Returns parameters whose threshold has seen one more batch; the first batch is taken whole."""
    latents = encoding.dense()
    smallest = jnp.min(jnp.where(latents > 0, latents, jnp.inf))
    old = params.extra["threshold"]
    new = jnp.where(old > 0, old + RATE * (smallest - old), smallest)
    # A batch in which nothing fired says nothing.
    return dataclasses.replace(params, extra=params.extra | {"threshold": jnp.where(jnp.isfinite(smallest), new, old)})


def _last_kept(acts, k):
    """The smallest of the k b largest; 0 for an empty batch."""
    return kth_largest.kth_largest(acts, k * len(acts)) if len(acts) else jnp.zeros(())
