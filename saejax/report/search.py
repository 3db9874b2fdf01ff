"""Search for the rows that show a latent's meaning: one jitted pass over a corpus.

Between corpus.py and snippets.py. For each chosen latent it keeps the strongest rows and a random draw of the rows
where it is active, because the strongest alone flatter a latent.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from saejax.report.corpus import Corpus
from saejax.sae import base
from saejax.sae.model import SAE

BATCH = 1024
"""Rows encoded at once."""


@struct.dataclass
class Boards:
    """Running winners of each chosen latent, best first, and sums over its active rows.

    Attributes:
      top: Largest activations, [n, keep]; 0 where there are fewer active rows.
      top_rows: Their rows, [n, keep] int32; -1 where there are fewer.
      draw: Largest random numbers among active rows, [n, keep].
      draw_rows: Their rows, [n, keep] int32: a draw without replacement.
      count: Active rows, [n] int32.
      total: Sum of activations, [n].
    """

    top: jax.Array
    top_rows: jax.Array
    draw: jax.Array
    draw_rows: jax.Array
    count: jax.Array
    total: jax.Array


def search(sae: SAE, corpus: Corpus, ids: Int[np.ndarray, "n"], *, keep: int, max_rows: int, seed: int) -> Boards:
    """Streams up to `max_rows` rows once and returns the winners, as NumPy arrays.

    Args:
      sae: The SAE.
      corpus: The rows.
      ids: Latents to watch.
      keep: Rows kept per latent and board.
      max_rows: Rows read, from the start.
      seed: Random draw.
    """
    empty, nowhere = jnp.zeros((len(ids), keep)), jnp.full((len(ids), keep), -1, jnp.int32)
    none = jnp.zeros(len(ids))
    boards = Boards(empty, nowhere, empty, nowhere, none.astype(jnp.int32), none)
    watched, key = jnp.asarray(ids), jax.random.key(seed)
    for start, rows in _batches(corpus, max_rows):
        real = jnp.arange(BATCH) < len(rows)
        number = start + jnp.arange(BATCH, dtype=jnp.int32)
        draw_key = jax.random.fold_in(key, start)
        boards = _update(sae.sparsifier, sae.params, watched, boards, filled(rows), number, real, draw_key)
    return jax.tree.map(np.asarray, boards)


def firing_rate(sae: SAE, corpus: Corpus, *, max_rows: int) -> Float[np.ndarray, "d_sae"]:
    """Share of up to `max_rows` rows on which each latent is above zero."""
    counts, n = np.zeros(sae.sparsifier.d_sae), 0
    for _, rows in _batches(corpus, max_rows):
        counts += np.asarray(_active(sae.sparsifier, sae.params, filled(rows), jnp.arange(BATCH) < len(rows)))
        n += len(rows)
    return counts / max(n, 1)


def filled(rows: Float[np.ndarray, "n d_in"]) -> Float[np.ndarray, "m d_in"]:
    """Fills up to whole batches with rows of zeros: one shape, one compilation."""
    return np.pad(rows, ((0, -len(rows) % BATCH), (0, 0)))


def _batches(corpus: Corpus, max_rows: int) -> Iterator[tuple[int, np.ndarray]]:
    n = min(corpus.n_rows, max_rows)
    for start in range(0, n, BATCH):
        yield start, np.asarray(corpus.read(start, min(start + BATCH, n)), np.float32)


@jax.jit(static_argnums=0)
def _update(
    sparsifier: base.Sparsifier,
    params: base.SAEParams,
    ids: Int[Array, "n"],
    boards: Boards,
    x: Float[Array, "b d_in"],
    number: Int[Array, "b"],
    real: Bool[Array, "b"],
    key: Key[Array, ""],
) -> Boards:
    acts = sparsifier.encode(params, x).dense()[:, ids].T * real[None, :]
    draws = jnp.where(acts > 0, jax.random.uniform(key, acts.shape, minval=1e-6), 0.0)
    count = boards.count + jnp.sum(acts > 0, axis=1, dtype=jnp.int32)
    return Boards(
        *_merge(boards.top, boards.top_rows, acts, number),
        *_merge(boards.draw, boards.draw_rows, draws, number),
        count=count,
        total=boards.total + jnp.sum(acts, axis=1),
    )


def _merge(best: jax.Array, rows: jax.Array, new: jax.Array, number: jax.Array) -> tuple[jax.Array, jax.Array]:
    values = jnp.concatenate([best, new], axis=1)
    where = jnp.concatenate([rows, jnp.broadcast_to(number[None, :], new.shape)], axis=1)
    values, at = jax.lax.top_k(values, best.shape[1])  # ties: the earlier row, as it stands further left
    return values, jnp.where(values > 0, jnp.take_along_axis(where, at, axis=1), -1)


@jax.jit(static_argnums=0)
def _active(
    sparsifier: base.Sparsifier, params: base.SAEParams, x: Float[Array, "b d_in"], real: Bool[Array, "b"]
) -> Int[Array, "d_sae"]:
    return jnp.sum((sparsifier.encode(params, x).dense() > 0) & real[:, None], axis=0)
