"""Diagnosis of the data before the first step, with advice."""

from __future__ import annotations

import logging
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from saejax.activations import normalize

logger = logging.getLogger(__name__)

LARGE = 1.0
"""Mean over spread from which centring is advised: the mean then holds half of E||x||^2."""


@jax.jit
def mean_over_std(rows: Float[Array, "n d_in"]) -> Float[Array, ""]:
    r"""Returns :math:`\|\mu\| / \sqrt{E\|x - \mu\|^2}` of some rows.

    Examples:
      >>> float(mean_over_std(jnp.array([[3.0, 1.0], [3.0, -1.0]])))
      3.0
    """
    x = rows.astype(jnp.float32)
    mean = jnp.mean(x, axis=0)
    return jnp.linalg.norm(mean) / jnp.sqrt(jnp.mean(jnp.sum((x - mean[None, :]) ** 2, axis=1)))


def report(rows: Float[Array, "n d_in"], config: normalize.NormalizeConfig) -> float:
    """Log how far the data are from centred; where that is far and they stay so, say what helps.

    Args:
      rows: a sample in the data's own scale.
      config: how rows are going to be normalised.

    Returns:
      `mean_over_std`; not finite where the rows are not, or too large to be squared.
    """
    ratio = float(mean_over_std(rows))
    centred = config.center or config.mode is normalize.NormMode.whiten
    if not math.isfinite(ratio):
        return ratio
    if ratio > LARGE and not centred:
        logger.warning(
            "||mean|| / ||std|| of the data is %.3g: the mean dominates, latents would learn it and many would die; "
            "normalize.center=true removes it",
            ratio,
        )
    else:
        logger.info("||mean|| / ||std|| of the data is %.3g%s", ratio, " (taken out)" if centred else "")
    return ratio
