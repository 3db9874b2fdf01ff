"""The k largest pre-activations among candidates that a cheap bfloat16 product selects; proves its own exactness.

An error bound is added to each entry of the cheap product. Entries outside the 2 k largest bounds lie below the last
of those bounds. If the k-th largest exact value of the candidates lies above it, no winner is missing. With x = c + z,
where c is the mean of a block of rows and hats mark values rounded to bfloat16,

    x . w <= c . w + z^ . w^ + (|z - z^| + e (|x| + |c|)) |w| + |z| |w - w^|,

by Cauchy and Schwarz; e bounds the rounding of float32 sums. Rows that agree have a small z and a small bound.
"""

import functools
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Bool, Float, Int

from saejax.kernels import matmul, top_k

_LATENTS = 512  # latents per kept one from which it pays (2 cores, d_in 768, k 32): 1.0 times at 8,192, 1.2 at 16,384
_CANDIDATES = 2  # per kept one; with 1.5 in 200 rows of a trained SAE one was uncertain, with 2 none
_ROWS = 16  # rows whose candidates' directions stay near the core


def pays(n: int, k: int, dtype: str) -> bool:
    """Whether the detour is the faster way to k of n latents in this dtype on this CPU."""
    return dtype == "float32" and n >= _LATENTS * k and _multiplies_bfloat16()


@functools.cache
def _multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for it; without them the cheap product is no cheaper."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def candidates(
    W_enc: Float[Array, "d_in d_sae"], b_enc: Float[Array, "d_sae"], k: int
) -> Callable[[Float[Array, "b d_in"]], tuple[Bool[Array, ""], Float[Array, "b k"], Int[Array, "b k"]]]:
    """Returns what finds the k largest entries of `rows @ W_enc + b_enc`, in float32, and whether that is certain.

    Args:
      W_enc, b_enc: The encoder.
      k: How many to keep, in [1, d_sae / 2).
    """
    rounded = W_enc.astype(jnp.bfloat16)
    width, off = _norms(W_enc, 0), _norms(W_enc - _rounded(W_enc), 0)
    e = W_enc.shape[0] * 2.0**-23
    # Latent by latent in memory: a transpose alone would be another way to read columns, one number at a time.
    directions = with_layout_constraint(W_enc.T, Layout((0, 1)))

    def of_block(rows):
        centre = jnp.mean(rows, axis=0)
        z = rows - centre[None, :]
        z_rounded = z.astype(jnp.bfloat16)
        error = _norms(z - _rounded(z), 1) + e * (_norms(rows, 1) + _norms(centre, 0))
        at_centre = centre @ W_enc + b_enc
        slack = error[:, None] * width[None, :] + _norms(z, 1)[:, None] * off[None, :]
        bounds = matmul.matmul(z_rounded, rounded, "bfloat16") + (at_centre[None, :] + slack)
        bound, named = top_k.on_device(bounds, _CANDIDATES * k)
        named = jnp.sort(named, axis=1)  # so that of equal values the lowest index comes first

        def exact(row):
            return jnp.take(directions, row[1], axis=0, mode="clip") @ row[0]

        values = lax.map(exact, (rows, named), batch_size=_ROWS) + b_enc[named]
        values, best = top_k.on_device(values, k)
        return jnp.all(values[:, -1] > bound[:, -1]), values, jnp.take_along_axis(named, best, axis=1)

    return of_block


def _norms(a: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
    return jnp.sqrt(jnp.sum(a**2, axis=axis))


def _rounded(a: Float[Array, "..."]) -> Float[Array, "..."]:
    """To bfloat16 and back; a pair of casts is one that XLA may leave out."""
    return lax.reduce_precision(a, exponent_bits=8, mantissa_bits=7)
