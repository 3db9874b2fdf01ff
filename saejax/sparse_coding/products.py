"""The two products of every solver, in full float32 on every device, and the choice of the best atom."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

_EXACT = lax.Precision.HIGHEST  # accelerators would round the operands otherwise


def correlate(residual: Float[Array, "b d"], dictionary: Float[Array, "n d"]) -> Float[Array, "b n"]:
    """Returns the inner product of every residual with every atom."""
    return jnp.matmul(residual, dictionary.T, precision=_EXACT)


def synthesise(latents: Float[Array, "b n"], dictionary: Float[Array, "n d"]) -> Float[Array, "b d"]:
    """Returns the signals that dense codes stand for."""
    return jnp.matmul(latents, dictionary, precision=_EXACT)


def combine(values: Float[Array, "b k"], atoms: Float[Array, "b k d"]) -> Float[Array, "b d"]:
    """Returns the signals that k-sparse codes stand for, from their own atoms."""
    return jnp.einsum("bk,bkd->bd", values, atoms, precision=_EXACT)


def inner(atoms: Float[Array, "b k d"], vectors: Float[Array, "b d"]) -> Float[Array, "b k"]:
    """Returns the inner product of each row's atoms with its vector."""
    return jnp.einsum("bkd,bd->bk", atoms, vectors, precision=_EXACT)


def best(scores: Float[Array, "b n"]) -> tuple[Float[Array, "b"], Int[Array, "b"]]:
    """Returns the largest score of each row and its lowest index.

    Two plain reductions: `argmax` carries pairs, which XLA does not vectorise on CPU (6 times slower).
    """
    top = jnp.max(scores, axis=1)
    n = scores.shape[1]
    index = jnp.min(jnp.where(scores >= top[:, None], jnp.arange(n)[None, :], n - 1), axis=1)
    return top, index.astype(jnp.int32)


def norms(rows: Float[Array, "b d"]) -> Float[Array, "b"]:
    """Returns the norm of each row, of any scale: no square overflows or vanishes. NaN where a row is not finite."""
    largest = jnp.max(jnp.abs(rows), axis=1)
    unit = jnp.where(largest > 0, largest, 1)
    return largest * jnp.sqrt(jnp.sum((rows / unit[:, None]) ** 2, axis=1))


def quotient(above: Float[Array, "b"], below: Float[Array, "b"]) -> Float[Array, "b"]:
    """Returns above / below, and above itself where below is 0."""
    return above / jnp.where(below == 0, 1, below)
