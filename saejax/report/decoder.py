"""Decoder geometry: the cosine of each latent's direction to its nearest neighbour, against chance.

page.py (histogram) and latents.py (neighbours of one latent) read it.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

_MAX_QUERIES = 4096
"""Latents whose neighbours are looked up for the histogram; a seeded sample where there are more."""


@dataclasses.dataclass(frozen=True)
class Neighbours:
    """Nearest other latents of some latents by decoder cosine, nearest first: both [n, top]."""

    cosine: np.ndarray
    index: np.ndarray


def neighbours(W_dec: Float[Array, "d_sae d_in"], ids: Int[np.ndarray, "n"], *, top: int) -> Neighbours:
    """Finds the `top` other latents with the largest decoder cosine to each of `ids`.

    Args:
      W_dec: Decoder, one row per latent, any norms.
      ids: Latents to look up.
      top: Neighbours per latent; at most d_sae - 1 are returned.
    """
    unit = _unit(jnp.asarray(W_dec, jnp.float32))
    top = min(top, unit.shape[0] - 1)
    cosine, index = [], []
    for block in np.array_split(ids, max(1, -(-len(ids) // 512))):
        c, i = _nearest(unit, jnp.asarray(block), top)
        cosine.append(np.asarray(c))
        index.append(np.asarray(i))
    return Neighbours(np.concatenate(cosine), np.concatenate(index))


def nearest_cosines(
    W_dec: Float[Array, "d_sae d_in"], *, seed: int = 0
) -> tuple[Float[np.ndarray, "n"], Float[np.ndarray, "n"]]:
    """Largest cosine to another latent: of the decoder, and of as many random directions (chance).

    Random directions are independent Gaussian rows of the same shape, looked up in the same way.
    """
    d_sae, d_in = W_dec.shape
    rng = np.random.default_rng(seed)
    ids = np.sort(rng.choice(d_sae, min(d_sae, _MAX_QUERIES), replace=False))
    control = jax.random.normal(jax.random.key(seed), (d_sae, d_in))
    found = (neighbours(W, ids, top=1).cosine.reshape(-1) for W in (W_dec, control))
    return next(found), next(found)


def _unit(W: jax.Array) -> jax.Array:
    return W / jnp.maximum(jnp.linalg.norm(W, axis=-1, keepdims=True), 1e-12)


@jax.jit(static_argnums=2)
def _nearest(unit: jax.Array, ids: jax.Array, top: int) -> tuple[jax.Array, jax.Array]:
    cosine = jnp.matmul(unit[ids], unit.T, precision="highest")
    cosine = cosine.at[jnp.arange(len(ids)), ids].set(-jnp.inf)
    return jax.lax.top_k(cosine, top)
