"""Views of single latents: text, decoder neighbours, effect on the logits.

Part of a report: SAE, and a corpus where the run has one -> Examples -> page.py. A few dozen latents represent all:
one from each stretch of the range of firing rates.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from saejax.errors import UserError
from saejax.fields import numeric
from saejax.report import decoder, search, snippets
from saejax.report.corpus import Corpus
from saejax.sae.layout import Family
from saejax.sae.model import SAE

_CANDIDATES = 8
"""Rows kept per snippet shown, for the best ones often lie side by side."""
_NEIGHBOURS = 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentPage:
    """Number of latents in the report, and the amount shown of each."""

    n_latents: int = 40
    """Latents on the page, spread over the range of firing rates; at least 1."""
    n_top: int = 6
    """Strongest snippets per latent, from different documents first; at least 1."""
    n_random: int = 3
    """Snippets drawn at random among all rows where the latent is active; 0 shows none."""
    before: int = 20
    """Tokens shown before the peak; at least 0."""
    after: int = 10
    """Tokens shown after the peak; at least 0."""
    n_tokens: int = 8
    """Tokens listed as most promoted and as most suppressed; at least 1."""
    max_rows: int = 200_000
    """Rows searched for snippets; at least 1."""
    seed: int = 0
    """Draw of the latents and of the random snippets."""

    def __post_init__(self):
        numeric.check(self, "latents.")
        least = {"n_random": 0, "before": 0, "after": 0, "seed": 0}
        for field in dataclasses.fields(self):
            value, low = getattr(self, field.name), least.get(field.name, 1)
            if value < low:
                raise UserError(f"latents.{field.name} must be at least {low}, got {value}")


@dataclasses.dataclass(frozen=True)
class Latent:
    """One latent as the page shows it.

    Attributes:
      id: Its number.
      rate: Share of rows on which it is active.
      mean: Mean activation over the active rows that were searched; None without any.
      largest: Largest activation among them; None without any.
      top: Text where it is strongest.
      random: Text drawn at random among the active rows.
      neighbours: (latent, decoder cosine) of the nearest other latents.
      promoted: (token, logit per unit of activation) of the tokens whose logits it raises most.
      suppressed: The same for those that it lowers most.
    """

    id: int
    rate: float
    mean: float | None
    largest: float | None
    top: list[snippets.Snippet]
    random: list[snippets.Snippet]
    neighbours: list[tuple[int, float]]
    promoted: list[tuple[str, float]]
    suppressed: list[tuple[str, float]]


@dataclasses.dataclass(frozen=True)
class Examples:
    """All that the page of latents shows; `n_rows` is how many rows were searched, 0 without text."""

    latents: list[Latent]
    n_rows: int


def collect(
    sae: SAE,
    corpus: Corpus | None = None,
    decode: snippets.Decode | None = None,
    *,
    settings: LatentPage | None = None,
    firing_rate: Float[np.ndarray, "d_sae"] | None = None,
    unembedding: Float[Array, "d_in vocab"] | None = None,
) -> Examples:
    """Gathers the content of the page of latents.

    Args:
      sae: The trained SAE, in the data's own scale.
      corpus: Rows with text (`corpus.StoreCorpus(path)`); None shows latents without snippets.
      decode: Token ids to text; None shows neither snippets nor logit effects.
      settings: How many of what; None takes the defaults.
      firing_rate: Share of rows on which each latent is active, as in eval.json; None counts on `corpus`.
      unembedding: Matrix from the activations to the logits of the vocabulary; None shows no logit effect.

    Raises:
      UserError: there is neither `corpus` nor `firing_rate` to choose latents by, or a width does not fit.
    """
    settings = settings or LatentPage()
    _check(sae, corpus, firing_rate, unembedding)
    if firing_rate is None and corpus is not None:
        firing_rate = search.firing_rate(sae, corpus, max_rows=settings.max_rows)
    assert firing_rate is not None  # `_check` made sure of one or the other
    ids = choose(firing_rate, settings.n_latents, settings.seed)
    if not len(ids):
        return Examples([], 0)
    near = decoder.neighbours(sae.params.W_dec, ids, top=_NEIGHBOURS)
    texts = _texts(sae, corpus, decode, ids, settings)
    logits = _logit_effects(sae, ids, unembedding, decode, settings.n_tokens)
    latents = [
        Latent(
            int(latent),
            float(firing_rate[latent]),
            *texts[n],
            list(zip(near.index[n].tolist(), near.cosine[n].tolist(), strict=True)),
            *logits[n],
        )
        for n, latent in enumerate(ids)
    ]
    return Examples(latents, 0 if corpus is None else min(corpus.n_rows, settings.max_rows))


def shows(sae: SAE) -> bool:
    """Returns whether latents can be shown: of an SAE that reads and writes one site."""
    return sae.sparsifier.family is Family.sae


def choose(rate: Float[np.ndarray, "d_sae"], n: int, seed: int) -> Int[np.ndarray, "m"]:
    """Draws up to `n` living latents, one from each of `n` equal groups by firing rate, densest first."""
    rng = np.random.default_rng(seed)
    alive = np.flatnonzero(rate > 0)
    alive = alive[np.argsort(-rate[alive], kind="stable")]
    groups = np.array_split(alive, min(n, len(alive))) if len(alive) else []
    return np.asarray([rng.choice(group) for group in groups], np.int64)


def _check(sae: SAE, corpus: Corpus | None, rate: np.ndarray | None, unembedding: Array | None) -> None:
    d_in, d_sae = sae.sparsifier.d_in, sae.sparsifier.d_sae
    if not shows(sae):
        raise UserError(f"report: the page of latents needs family=sae, got family={sae.sparsifier.family.name}")
    if corpus is None and rate is None:
        raise UserError("report: latents need rows or firing rates; `saejax evaluate run=...` measures the rates")
    if rate is not None and rate.shape != (d_sae,):
        raise UserError(f"report: firing_rate has shape {rate.shape}, the SAE has d_sae={d_sae} latents")
    if unembedding is not None and unembedding.shape[0] != d_in:
        raise UserError(f"report: unembedding has {unembedding.shape[0]} rows, the SAE has d_in={d_in}")


def _texts(
    sae: SAE, corpus: Corpus | None, decode: snippets.Decode | None, ids: np.ndarray, settings: LatentPage
) -> list[tuple[float | None, float | None, list[snippets.Snippet], list[snippets.Snippet]]]:
    """Mean and largest activation, strongest and random snippets of each latent."""
    if corpus is None:
        return [(None, None, [], [])] * len(ids)
    keep = _CANDIDATES * max(settings.n_top, settings.n_random)
    found = search.search(sae, corpus, ids, keep=keep, max_rows=settings.max_rows, seed=settings.seed)
    around = {"before": settings.before, "after": settings.after}
    texts = []
    for n, latent in enumerate(ids.tolist()):
        count = int(found.count[n])
        mean, largest = (float(found.total[n]) / count, float(found.top[n, 0])) if count else (None, None)
        boards = (found.top_rows[n], settings.n_top), (found.draw_rows[n], settings.n_random)
        top, random = (
            snippets.cut(sae, corpus, decode, latent, np.asarray(rows), n=many, **around)
            if decode is not None and many
            else []
            for rows, many in boards
        )
        texts.append((mean, largest, top, random))
    return texts


def _logit_effects(
    sae: SAE, ids: np.ndarray, unembedding: Array | None, decode: snippets.Decode | None, n_tokens: int
) -> list[tuple[list[tuple[str, float]], list[tuple[str, float]]]]:
    """Tokens that each latent promotes and suppresses most.

    The direct path only, W_dec @ unembedding, less its mean over the vocabulary, which no softmax sees.
    """
    if unembedding is None or decode is None:
        return [([], [])] * len(ids)
    directions = jnp.asarray(sae.params.W_dec, jnp.float32)[ids]
    effect = np.asarray(jnp.matmul(directions, jnp.asarray(unembedding, jnp.float32), precision="highest"))
    effect = effect - effect.mean(axis=1, keepdims=True)
    effects = []
    for row in effect:
        order = np.argsort(row, kind="stable")
        ends = order[::-1][:n_tokens], order[:n_tokens]
        promoted, suppressed = ([(decode([int(t)]), float(row[t])) for t in tokens] for tokens in ends)
        effects.append((promoted, suppressed))
    return effects
