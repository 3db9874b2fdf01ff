"""One codeword in white Gaussian noise: how many dimensions a random codebook needs in practice."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Key

from saejax.codes.arguments import check_positive, check_sizes
from saejax.codes.dictionaries import gaussian


def success(
    key: Key[Array, ""], n_codewords: int, d: int, noise: float, trials: int, *, n_codebooks: int = 4
) -> Bool[Array, "trials"]:
    """Whether the nearest codeword is the sent one.

    A random Gaussian codeword c of mean power 1 (entries N(0, 1/d)) is sent as c + sqrt(noise / d) g with g white, and
    read as argmin_i ||x - c_i||, which is maximum likelihood.

    Args:
      key: of `jax.random`.
      n_codewords: codewords.
      d: dimensions.
      noise: noise power over signal power, above 0.
      trials: messages sent in all, rounded up to a multiple of n_codebooks.
      n_codebooks: independent codebooks that share the trials.

    Returns:
      One flag per trial.

    Raises:
      UserError: a number out of its range.
    """
    check_sizes(n_codewords=n_codewords, d=d, trials=trials, n_codebooks=n_codebooks)
    check_positive(noise=noise)
    keys = jax.random.split(key, n_codebooks)
    return jax.lax.map(partial(_send, n_codewords, d, noise, -(-trials // n_codebooks)), keys).reshape(-1)


@partial(jax.jit, static_argnums=(0, 1, 3))
def _send(n_codewords: int, d: int, noise: float, trials: int, key: jax.Array) -> jax.Array:
    codebook_key, message_key, noise_key = jax.random.split(key, 3)
    codebook = gaussian(codebook_key, n_codewords, d)
    sent = jax.random.randint(message_key, (trials,), 0, n_codewords)
    received = codebook[sent] + jnp.sqrt(noise / d) * jax.random.normal(noise_key, (trials, d))
    scores = jnp.matmul(received, codebook.T, precision=jax.lax.Precision.HIGHEST)
    half_norms = jnp.sum(codebook**2, axis=1) / 2
    return jnp.argmax(scores - half_norms[None, :], axis=1) == sent
