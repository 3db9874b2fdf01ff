"""Liveness of latents: tokens since each one last fired."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool

# Counting stops here, far above any threshold and far below int32's overflow.
MAX_TOKENS = 2**30


@struct.dataclass
class Liveness:
    """Tokens since each latent last fired.

    Attributes:
      tokens_since_fired: [d_sae] int32, saturating at `MAX_TOKENS`.
    """

    tokens_since_fired: jax.Array


def init(d_sae: int) -> Liveness:
    """Every latent counts as having just fired, so none is dead before a whole window has passed."""
    return Liveness(tokens_since_fired=jnp.zeros(d_sae, jnp.int32))


def update(liveness: Liveness, fired: Bool[Array, " d_sae"], n_tokens: int) -> Liveness:
    """Count one batch.

    Args:
      liveness: state before the batch.
      fired: [d_sae], whether any row of the batch made the latent active.
      n_tokens: rows of the batch.

    Returns:
      State after the batch: 0 where fired, else n_tokens more.

    Examples:
      >>> update(init(2), jnp.array([True, False]), 8).tokens_since_fired.tolist()
      [0, 8]
    """
    older = jnp.minimum(liveness.tokens_since_fired + n_tokens, MAX_TOKENS)
    return Liveness(tokens_since_fired=jnp.where(fired, 0, older))


def dead(liveness: Liveness, dead_after_tokens: int) -> Bool[Array, " d_sae"]:
    """Latents that did not fire for at least `dead_after_tokens` tokens.

    Args:
      liveness: the counters.
      dead_after_tokens: window in tokens, below `MAX_TOKENS`.

    Returns:
      [d_sae] bool.
    """
    return liveness.tokens_since_fired >= dead_after_tokens
