"""Rows normalised one by one, as layer normalisation without weights: training reads it, and the finished SAE."""

import jax.numpy as jnp
from jaxtyping import Array, Float

EPS = 1e-5
"""Added to the variance of a row: a constant row becomes 0."""


def normalized(
    x: Float[Array, "... d_in"],
) -> tuple[Float[Array, "... d_in"], Float[Array, "... 1"], Float[Array, "... 1"]]:
    """Returns normalised rows, their means and their scales.

    Example:
      >>> rows, mean, scale = normalized(jnp.array([[1.0, 3.0]]))
      >>> [round(float(v), 3) for v in (*rows[0], mean[0, 0], scale[0, 0])]
      [-1.0, 1.0, 2.0, 1.0]
    """
    x = jnp.asarray(x, jnp.float32)
    mean = jnp.mean(x, axis=-1, keepdims=True)
    scale = jnp.sqrt(jnp.mean((x - mean) ** 2, axis=-1, keepdims=True) + EPS)
    return (x - mean) / scale, mean, scale
