"""Random codebooks in white Gaussian noise: the dimensions that one codeword needs in practice."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Key
from scipy import special, stats

from saejax.errors import UserError
from saejax.lab.codes.arguments import check_positive, check_sizes
from saejax.lab.codes.dictionaries import spherical


def success(
    key: Key[Array, ""], n_codewords: int, d: int, noise: float, trials: int, *, n_codebooks: int = 4
) -> Bool[Array, "trials"]:
    """Whether the nearest codeword is the sent one.

    A codeword c uniform on the unit sphere is sent as c + sqrt(noise / d) g with g white, and read as the codeword
    of largest <c_i, x>, which is maximum likelihood. `exact_success` is its expectation.

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
    return _send(keys, noise, n_codewords=n_codewords, d=d, trials=-(-trials // n_codebooks)).reshape(-1)


@partial(jax.jit, static_argnames=("n_codewords", "d", "trials"))
def _send(keys: jax.Array, noise: float, *, n_codewords: int, d: int, trials: int) -> jax.Array:
    """One codebook per key, one after another, [codebooks, trials]."""
    one = partial(_send_from, noise=noise, n_codewords=n_codewords, d=d, trials=trials)
    return jax.lax.map(one, keys)


def _send_from(key: jax.Array, *, noise: float, n_codewords: int, d: int, trials: int) -> jax.Array:
    codebook_key, message_key, noise_key = jax.random.split(key, 3)
    codebook = spherical(codebook_key, n_codewords, d)
    sent = jax.random.randint(message_key, (trials,), 0, n_codewords)
    received = codebook[sent] + jnp.sqrt(noise / d) * jax.random.normal(noise_key, (trials, d))
    scores = jnp.matmul(received, codebook.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.argmax(scores, axis=1) == sent


def exact_success(n_codewords: int, d: int, noise: float) -> float:
    """Probability that the sent one of n random unit codewords is the nearest to what was received.

    Given the cosine r between the received vector and the sent codeword, another codeword is nearer with probability
    q(r), the area of a spherical cap; the answer is E[(1 - q(r))^(n - 1)]. The noise along the codeword and the
    chi-square across it are integrated at 400 equally likely values each.

    Args:
      n_codewords: codewords.
      d: dimensions, at least 2.
      noise: noise power over signal power, above 0.

    Returns:
      Probability, to about 0.001.

    Raises:
      UserError: a number out of its range.

    Examples:
      >>> round(exact_success(2**14, 38, 1.0), 2)
      0.92
    """
    check_sizes(n_codewords=n_codewords, d=d)
    check_positive(noise=noise)
    if d < 2:
        raise UserError(f"d = {d}: a sphere needs at least 2 dimensions")
    levels = (np.arange(400) + 0.5) / 400
    along = 1 + np.sqrt(noise / d) * special.ndtri(levels)[:, None]
    across = noise / d * stats.chi2.ppf(levels, d - 1)[None, :]
    cosine = along / np.sqrt(along**2 + across)
    # Cosines r of random directions: (r + 1) / 2 follows a symmetric Beta law.
    nearer = special.betainc((d - 1) / 2, (d - 1) / 2, (1 - cosine) / 2)
    return float(np.exp((n_codewords - 1) * np.log1p(-nearer)).mean())
