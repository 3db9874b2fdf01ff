"""Normalisation of single rows: layer normalisation without weights, for training and for the finished SAE."""

import enum

import jax.numpy as jnp
from jaxtyping import Array, Float

EPS = 1e-5
"""Added to the variance (or deviation) of a row: a constant row becomes 0."""


class RowNorm(enum.Enum):
    """Divisor of a row; `variance` is saejax's, the others belong to SAEs that were trained elsewhere."""

    variance = "variance"
    """The root of EPS plus the variance over its d entries, after its mean is taken off."""
    deviation = "deviation"
    """EPS plus the standard deviation with d - 1 in it, after its mean is taken off; undone without EPS."""
    length = "length"
    """Its norm over the root of d; the mean stays."""


def normalized(
    x: Float[Array, "... d_in"], kind: RowNorm = RowNorm.variance
) -> tuple[Float[Array, "... d_in"], Float[Array, "... 1"], Float[Array, "... 1"]]:
    """Returns normalised rows, and the means and scales that undo it (rows * scale + mean).

    Examples:
      >>> rows, mean, scale = normalized(jnp.array([[1.0, 3.0]]))
      >>> [round(float(v), 3) for v in (*rows[0], mean[0, 0], scale[0, 0])]
      [-1.0, 1.0, 2.0, 1.0]
    """
    x = jnp.asarray(x, jnp.float32)
    if kind is RowNorm.length:
        scale = jnp.linalg.norm(x, axis=-1, keepdims=True) / x.shape[-1] ** 0.5
        return x / jnp.where(scale > 0, scale, 1), jnp.zeros_like(scale), scale
    mean = jnp.mean(x, axis=-1, keepdims=True)
    squares = (x - mean) ** 2
    if kind is RowNorm.deviation:
        scale = jnp.sqrt(jnp.sum(squares, axis=-1, keepdims=True) / (x.shape[-1] - 1))
        return (x - mean) / (scale + EPS), mean, scale
    scale = jnp.sqrt(jnp.mean(squares, axis=-1, keepdims=True) + EPS)
    return (x - mean) / scale, mean, scale
