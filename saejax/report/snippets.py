"""Text around given rows, with the activation of one latent on every token.

It follows search.py (which rows) and precedes page.py (how they look).
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from saejax.report import search
from saejax.report.corpus import Corpus, Window
from saejax.sae import base
from saejax.sae.model import SAE

Decode = Callable[[Sequence[int]], str]
"""Token ids to text, as a tokenizer's `decode`."""

_MAX_TOKENS_PER_CHARACTER = 4


@dataclasses.dataclass(frozen=True)
class Snippet:
    """A stretch of text and how strongly one latent reacts to it.

    Attributes:
      pieces: Text and activation of each token, in order; None where the token was masked.
      activation: At the row that the snippet is about.
      peak: Which piece holds that row.
      row: Its number in the corpus.
      document: Its document.
    """

    pieces: list[tuple[str, float | None]]
    activation: float
    peak: int
    row: int
    document: int


def cut(
    sae: SAE,
    corpus: Corpus,
    decode: Decode,
    latent: int,
    rows: Int[np.ndarray, "n"],
    *,
    n: int,
    before: int,
    after: int,
) -> list[Snippet]:
    """Cuts snippets around `n` of `rows`, the first of each document before any second one.

    Args:
      sae: The SAE.
      corpus: The rows and their text.
      decode: Token ids to text.
      latent: Whose activations are shown.
      rows: Candidates, best first; below 0 are none.
      n: Snippets at most; they do not overlap.
      before: Tokens shown to the left.
      after: Tokens shown to the right.

    Returns:
      The snippets in the order of `rows`.
    """
    chosen = choose(corpus, rows[rows >= 0].tolist(), n, before, after)
    if not chosen:
        return []
    acts = _activations(sae, corpus, latent, [window for _, window in chosen])
    snippets = []
    for (row, window), act in zip(chosen, acts, strict=True):
        text, peak = pieces(window.tokens, act, decode, window.centre)
        snippets.append(Snippet(text, float(act[window.centre]), peak, row, window.document))
    return snippets


def choose(corpus: Corpus, rows: Sequence[int], n: int, before: int, after: int) -> list[tuple[int, Window]]:
    """Returns `n` of `rows` with the text around them: no two overlap, the first of each document before any second."""
    windows = {row: corpus.window(row, before, after) for row in rows}
    chosen: list[int] = []
    for per_document in (1, n):
        for row in rows:
            same = [other for other in chosen if windows[other].document == windows[row].document]
            apart = all(abs(row - other) > before + after for other in same)
            if len(chosen) < n and len(same) < per_document and apart:
                chosen.append(row)
    return [(row, windows[row]) for row in rows if row in chosen]


def pieces(
    tokens: Int[np.ndarray, "w"], acts: Float[np.ndarray, "w"], decode: Decode, centre: int
) -> tuple[list[tuple[str, float | None]], int]:
    """Cuts the decoded text at the tokens; tokens that hold only a part of a character are joined.

    A token's text is what it adds to the text before it: many tokenizers drop the space before a lone token.

    Args:
      tokens: Token ids.
      acts: Activation on each; NaN where masked.
      decode: Token ids to text.
      centre: Place of the token that the text is about.

    Returns:
      (text, largest activation or None) of each piece, and the number of the piece that holds `centre`.
    """
    out: list[tuple[str, float | None]] = []
    before, start, peak = "", 0, 0
    for place in range(len(tokens)):
        so_far = decode(tokens[: place + 1].tolist())
        whole = not so_far.endswith("\N{REPLACEMENT CHARACTER}")
        if whole or place + 1 - start == _MAX_TOKENS_PER_CHARACTER or place + 1 == len(tokens):
            known = acts[start : place + 1][~np.isnan(acts[start : place + 1])]
            if start <= centre <= place:
                peak = len(out)
            out.append((so_far[len(before) :], float(known.max()) if len(known) else None))
            before, start = so_far, place + 1
    return out, peak


def _activations(sae: SAE, corpus: Corpus, latent: int, windows: Sequence[Window]) -> list[np.ndarray]:
    """Activation of one latent on every token of every window, NaN where there is no row."""
    rows = []
    for window in windows:
        known = window.rows[window.rows >= 0]
        rows.append(corpus.read(int(known.min()), int(known.max()) + 1)[known - known.min()])
    x = search.filled(np.concatenate(rows).astype(np.float32))
    column = np.asarray(_column(sae.sparsifier, sae.params, x, jnp.asarray(latent)))
    acts, start = [], 0
    for window, own in zip(windows, rows, strict=True):
        act = np.full(len(window.tokens), np.nan)
        act[window.rows >= 0] = column[start : start + len(own)]
        acts.append(act)
        start += len(own)
    return acts


@jax.jit(static_argnums=0)
def _column(
    sparsifier: base.Sparsifier, params: base.SAEParams, x: Float[Array, "b d_in"], latent: Int[Array, ""]
) -> Float[Array, "b"]:
    return sparsifier.encode(params, x).dense()[:, latent]
