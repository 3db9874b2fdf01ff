"""How parameters start: random directions, with an encoder that mirrors the decoder or is drawn alone."""

import enum

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from saejax.sae.base import SAEParams


class EncoderInit(enum.Enum):
    """Where the encoder starts."""

    transpose = "transpose"
    """W_enc = W_dec.T: a latent first reads the direction that it writes; far fewer latents die."""
    independent = "independent"
    """Directions of its own, with the decoder's norm."""


def random(key: Key[Array, ""], *, d_in: int, d_sae: int, decoder_norm: float, encoder: EncoderInit) -> SAEParams:
    """Returns parameters with random decoder rows of the given norm and zero biases."""
    key_dec, key_enc = jax.random.split(key)
    W_dec = directions(key_dec, d_sae, d_in) * decoder_norm
    if encoder is EncoderInit.transpose:
        W_enc = W_dec.T
    else:
        W_enc = (directions(key_enc, d_sae, d_in) * decoder_norm).T
    return SAEParams(W_enc=W_enc, b_enc=jnp.zeros(d_sae), W_dec=W_dec, b_dec=jnp.zeros(d_in))


def directions(key: Key[Array, ""], n: int, d: int) -> Float[Array, "n d"]:
    """Returns n random unit vectors, uniform on the sphere."""
    rows = jax.random.normal(key, (n, d), jnp.float32)
    return rows / jnp.linalg.norm(rows, axis=1, keepdims=True)
