"""How parameters start: random directions, and where an encoder begins."""

import enum

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key


class EncoderInit(enum.Enum):
    """Where the encoder starts."""

    transpose = "transpose"
    """W_enc = W_dec.T: a latent first reads the direction that it writes; far fewer latents die."""
    independent = "independent"
    """Directions of its own, with the decoder's norm."""


def directions(key: Key[Array, ""], n: int, d: int) -> Float[Array, "n d"]:
    """Returns n random unit vectors, uniform on the sphere."""
    rows = jax.random.normal(key, (n, d), jnp.float32)
    return rows / jnp.linalg.norm(rows, axis=1, keepdims=True)
