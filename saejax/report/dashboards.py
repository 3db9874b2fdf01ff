"""Neuronpedia dashboards of every latent: `batch-N.json` files as SAEDashboard writes them.

It makes two passes over a corpus for a few thousand latents at a time. The first finds the rows (search.py), the
second reads the activations around them and their histograms. The format's correlations with neurons and other latents
stay empty, which its readers allow.

Source:
  SAEDashboard (Lin, Bloom, Chanin), `neuronpedia_dashboard.py`, for the names; Neuronpedia's converter reads them all.
"""

import dataclasses
import functools
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from saejax.errors import UserError
from saejax.fields import numeric, paths
from saejax.report import search, snippets
from saejax.report.corpus import Corpus, Window
from saejax.sae import base
from saejax.sae.model import SAE
from saejax.storage import atomic

_CHUNK = 2048
"""Latents looked at together; bounds the memory for their texts."""
Text = Callable[..., str]
"""The text of one token, or of a few."""
_BINS, _INTERVALS, _N_LOGITS, _N_ALIGNED = 50, 5, 10, 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class DashboardConfig:
    """Number of latents with a dashboard, and the amount of text for each."""

    n_latents: int | None = None
    """Latents, from number 0 on, at least 1; null takes all of them."""
    per_file: int = 128
    """Latents in one batch file; at least 1."""
    n_top: int = 20
    """Strongest texts of each latent; at least 1."""
    n_random: int = 20
    """Texts drawn at random among all rows where a latent is active, shown by interval of activation; at least 1."""
    before: int = 63
    """Tokens to the left of the one that a text is about; at least 0."""
    after: int = 64
    """Tokens to its right; at least 0."""
    max_rows: int = 1_000_000
    """Rows searched; at least 1."""
    seed: int = 0
    """Draw of the random texts."""

    def __post_init__(self) -> None:
        numeric.check(self, "dashboards.")
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), 0 if field.name in ("before", "after", "seed") else 1
            if value is not None and value < least:
                raise UserError(f"dashboards.{field.name} must be at least {least}, got {value}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Header:
    """Header of a batch of latents, and the common part of each."""

    model_id: str
    """Neuronpedia's name of the model."""
    layer: int
    """Layer of the hook."""
    sae_set: str
    """Neuronpedia's name of the set of SAEs."""
    n_prompts: int
    """Sequences searched."""
    n_tokens_in_prompt: int
    """Tokens in a sequence."""
    dataset: str
    """Where the text is from."""


def write(
    sae: SAE,
    corpus: Corpus,
    decode: snippets.Decode,
    folder: str | os.PathLike,
    header: Header,
    *,
    settings: DashboardConfig | None = None,
    unembedding: Float[Array, "d_in vocab"] | None = None,
) -> tuple[int, int]:
    """Writes batch-0.json, batch-1.json, ... and skipped_indexes.json, the latents that are never active.

    Args:
      sae: The exported SAE, whose latents are shown.
      corpus: Rows with text.
      decode: Token ids to text.
      folder: Where to write; made where missing. Batches that are there already are replaced.
      header: Names and facts of the whole.
      settings: How many of what; None takes the defaults.
      unembedding: Matrix from the activations to the logits; None leaves the lists of logits empty.

    Returns:
      (latents written, latents skipped).
    """
    settings, folder = settings or DashboardConfig(), paths.local(folder, "folder")
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("batch-*.json"):
        old.unlink()
    text = functools.cache(functools.partial(text_of, decode))
    skipped: list[int] = []
    waiting: list[dict[str, Any]] = []
    written = files = 0
    n = min(settings.n_latents or sae.sparsifier.d_sae, sae.sparsifier.d_sae)
    for start in range(0, n, _CHUNK):
        ids = np.arange(start, min(start + _CHUNK, n))
        for latent, found in zip(ids.tolist(), _features(sae, corpus, text, ids, settings, unembedding), strict=True):
            if found is None:
                skipped.append(latent)
                continue
            facts = {"n_prompts_total": header.n_prompts, "n_tokens_in_prompt": header.n_tokens_in_prompt}
            waiting.append(found | facts | {"dataset": header.dataset})
            written += 1
            if len(waiting) == settings.per_file:
                files, waiting = _batch(folder, files, header, waiting), []
    if waiting:
        _batch(folder, files, header, waiting)
    rate = -math.log10(max(min(corpus.n_rows, settings.max_rows), 1))
    names = {"model_id": header.model_id, "layer": str(header.layer), "sae_set": header.sae_set}
    _dump(folder / "skipped_indexes.json", names | {"log_sparsity": rate, "skipped_indexes": skipped})
    return written, len(skipped)


def text_of(decode: snippets.Decode, *tokens: int) -> str:
    """Returns what tokens add to a text before them: many tokenizers drop the space before a lone token."""
    return decode([*tokens, *tokens])[len(decode([*tokens])) :]


def _batch(folder: pathlib.Path, number: int, header: Header, features: list[dict[str, Any]]) -> int:
    """Writes one file; returns the number of the next."""
    names = {"model_id": header.model_id, "layer": header.layer, "sae_set": header.sae_set, "sae_id_suffix": None}
    _dump(folder / f"batch-{number}.json", names | {"features": features})
    return number + 1


def _dump(file: pathlib.Path, tree: dict[str, Any]) -> None:
    atomic.write(file, json.dumps(tree, ensure_ascii=False, allow_nan=False))


def _features(
    sae: SAE,
    corpus: Corpus,
    text: Text,
    ids: Int[np.ndarray, "n"],
    settings: DashboardConfig,
    unembedding: Float[Array, "d_in vocab"] | None,
) -> Iterator[dict[str, Any] | None]:
    """Dashboard entries of `ids`; None for a latent that is never active."""
    keep = 2 * max(settings.n_top, settings.n_random)
    found = search.search(sae, corpus, ids, keep=keep, max_rows=settings.max_rows, seed=settings.seed)
    around = settings.before, settings.after
    top, drawn = (
        [[window for _, window in snippets.choose(corpus, row[row >= 0].tolist(), n, *around)] for row in rows]
        for rows, n in ((found.top_rows, settings.n_top), (found.draw_rows, settings.n_random))
    )
    windows = [(n, window) for lists in (top, drawn) for n, own in enumerate(lists) for window in own]
    values, counts = _second_pass(sae, corpus, ids, windows, np.asarray(found.top[:, 0]), settings.max_rows)
    shown = iter(values)
    texts = [[(w, next(shown)) for w in own] for lists in (top, drawn) for own in lists]
    n_rows = min(corpus.n_rows, settings.max_rows)
    for n, latent in enumerate(ids.tolist()):
        if not found.count[n]:
            yield None
            continue
        largest = float(found.top[n, 0])
        direction = np.asarray(sae.params.W_dec[latent], np.float64)
        yield {
            "feature_index": latent,
            **_aligned(direction),
            **{f"correlated_{what}": [] for what in _CORRELATED},
            **_logits(direction, unembedding, text),
            "frac_nonzero": int(found.count[n]) / n_rows,
            "freq_hist_data_bar_values": _rounded((np.arange(_BINS) + 0.5) * largest / _BINS),
            "freq_hist_data_bar_heights": counts[n].tolist(),
            "decoder_weights_dist": [],
            "activations": [
                *(_activation(*pair, -1, largest, -1, text) for pair in texts[n]),
                *_by_interval(texts[len(ids) + n], counts[n], largest, n_rows, text),
            ],
            "vector": [],
        }


_CORRELATED = [f"{a}_{b}" for a in ("neurons", "features") for b in ("indices", "l1", "pearson")]


def _second_pass(
    sae: SAE,
    corpus: Corpus,
    ids: Int[np.ndarray, "n"],
    windows: list[tuple[int, Window]],
    largest: Float[np.ndarray, "n"],
    max_rows: int,
) -> tuple[list[Float[np.ndarray, "w"]], Int[np.ndarray, "n 50"]]:
    """Activations on every token of `windows` (of which latent, where), 0 where masked; and the histograms."""
    lengths = [len(window.tokens) for _, window in windows]
    row = np.concatenate([window.rows for _, window in windows] or [np.zeros(0, np.int64)])
    which = np.repeat([n for n, _ in windows], lengths).astype(np.int64)
    value, order = np.zeros(len(row), np.float32), np.argsort(row, kind="stable")
    row, which = row[order], which[order]
    counts = np.zeros((len(ids), _BINS), np.int64)
    n_rows = max(min(corpus.n_rows, max_rows), int(row.max(initial=-1)) + 1)  # a window may look beyond the search
    for start in range(0, n_rows, search.BATCH):
        stop = min(start + search.BATCH, n_rows)
        x = np.asarray(corpus.read(start, stop), np.float32)
        acts = np.asarray(_acts(sae.sparsifier, sae.params, search.filled(x), jnp.asarray(ids)))
        at = slice(*np.searchsorted(row, (start, stop)))
        value[order[at]] = acts[row[at] - start, which[at]]
        searched = acts[: max(min(stop, max_rows) - start, 0)]
        r, n = np.nonzero(searched > 0)
        np.add.at(counts, (n, np.minimum(searched[r, n] * (_BINS / largest[n]), _BINS - 1).astype(np.int64)), 1)
    return np.split(value, np.cumsum(lengths)[:-1]), counts


@jax.jit(static_argnums=0)
def _acts(
    sparsifier: base.Sparsifier, params: base.SAEParams, x: Float[Array, "b d_in"], ids: Int[Array, "n"]
) -> Float[Array, "b n"]:
    return sparsifier.encode(params, x).dense()[:, ids]


def _activation(
    window: Window, values: Float[np.ndarray, "w"], low: float, high: float, share: float, text: Text
) -> dict[str, Any]:
    """One text; tokens that hold only a part of a character are joined, at their largest activation."""
    pieces: list[str] = []
    strengths: list[float] = []
    start = centre = 0
    tokens = window.tokens.tolist()
    for place in range(len(tokens)):
        piece = text(*tokens[start : place + 1])
        if piece.endswith("\N{REPLACEMENT CHARACTER}") and place - start < 3 and place + 1 < len(tokens):
            continue
        if start <= window.centre <= place:
            centre = len(pieces)
        pieces.append(piece)
        strengths.append(float(values[start : place + 1].max()))
        start = place + 1
    return {
        "bin_min": low,
        "bin_max": high,
        "bin_contains": share,
        "tokens": pieces,
        "values": _rounded(np.asarray(strengths)),
        "qualifying_token_index": centre,
    }


def _by_interval(
    texts: list[tuple[Window, np.ndarray]], counts: Int[np.ndarray, "50"], largest: float, n_rows: int, text: Text
) -> Iterator[dict[str, Any]]:
    """The random texts, strongest interval first, with the share of all rows in it; rows of 0 are in the lowest."""
    share = counts.reshape(_INTERVALS, -1).sum(axis=1) / n_rows
    share[0] += 1 - share.sum()
    width = largest / _INTERVALS
    for interval in reversed(range(_INTERVALS)):
        for window, values in texts:
            if min(int(values[window.centre] / width), _INTERVALS - 1) == interval:
                yield _activation(
                    window, values, interval * width, (interval + 1) * width, float(share[interval]), text
                )


def _aligned(direction: Float[np.ndarray, "d_in"]) -> dict[str, list[Any]]:
    """The coordinates of the activations that a decoder row has most of."""
    top = np.argsort(-direction, kind="stable")[:_N_ALIGNED]
    share = np.abs(direction[top]) / np.abs(direction).sum()
    return {
        "neuron_alignment_indices": top.tolist(),
        "neuron_alignment_values": _rounded(direction[top]),
        "neuron_alignment_l1": _rounded(share),
    }


def _logits(direction: Float[np.ndarray, "d_in"], unembedding: Array | None, text: Text) -> dict[str, list[Any]]:
    """Tokens promoted and suppressed by the direct path, less the mean over the vocabulary, which no softmax sees."""
    names = [f"{sign}_{what}" for sign in ("pos", "neg") for what in ("str", "values")]
    if unembedding is None:
        return {name: [] for name in (*names, "logits_hist_data_bar_heights", "logits_hist_data_bar_values")}
    effect = np.asarray(jnp.matmul(jnp.asarray(direction, jnp.float32), unembedding, precision="highest"))
    effect = effect - effect.mean()
    order = np.argsort(effect, kind="stable")
    ends = order[::-1][:_N_LOGITS], order[:_N_LOGITS]
    lists = [part for end in ends for part in ([text(token) for token in end.tolist()], _rounded(effect[end]))]
    heights, edges = np.histogram(effect, bins=_BINS)
    return dict(zip(names, lists, strict=True)) | {
        "logits_hist_data_bar_heights": heights.tolist(),
        "logits_hist_data_bar_values": _rounded((edges[1:] + edges[:-1]) / 2),
    }


def _rounded(values: np.ndarray) -> list[float]:
    return np.round(np.asarray(values, np.float64), 5).tolist()
