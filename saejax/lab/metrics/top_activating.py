"""Top-activating rows of a latent, beside a fair sample of all strengths.

The strongest rows alone flatter a latent: at a tenth of its maximum it may respond to something else. So the table
also holds a uniform sample of the rows on which the latent fires, sorted and cut into ten groups of equal size. Row
ids lead back to the text. Row ids order equal activations, and a hash of them draws the sample, so the tables do not
depend on batches, order of rows or number of devices.

Sources:
  Bills et al., Language models can explain neurons in language models, 2023, for top and random excerpts; Cohen, Size-
  estimation framework with applications to transitive closure, 1997, for samples that merge.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from saejax.evals import metric
from saejax.lab.metrics import rows

_NOBODY = np.int32(2**31 - 1)
"""Row id of a place in the table that no row fills."""


@struct.dataclass
class LatentBatch:
    """Latents and the ids of their rows.

    Attributes:
      latents: [b, d_sae] float32.
      row_id: Distinct for every row, [b] int32 in [0, 2^31 - 1).
      weight: 1 for a real row, 0 for padding, [b] float32.
    """

    shared: ClassVar[tuple[str, ...]] = ()

    latents: rows.Rows
    row_id: rows.Rows
    weight: rows.Rows = None


@struct.dataclass
class TableState:
    """The rows kept for each latent, best first; a place that no row fills has id 2^31 - 1 and value -inf.

    Attributes:
      top_value: Activations, [n_top, d_sae] float32.
      top_id: Row ids, [n_top, d_sae] int32.
      sample_value: Activations of the sampled rows, [10 n_decile, d_sae] float32.
      sample_id: Row ids, [10 n_decile, d_sae] int32.
    """

    top_value: jax.Array
    top_id: jax.Array
    sample_value: jax.Array
    sample_id: jax.Array


@metric.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class TopActivating(metric.Metric):
    """Ids and activations of the strongest rows of every latent, and samples from the deciles of its activations."""

    name: ClassVar[str] = "top_activating"
    batch_type: ClassVar[type] = LatentBatch
    n_top: int = 20
    """Rows in the table of each latent; 1 or more."""
    n_decile: int = 5
    """Rows sampled from each tenth of the activations; 1 or more."""
    seed: int = 0
    """Of the sample, together with row ids."""

    def init(self, batch: LatentBatch) -> TableState:
        d_sae, n_sample = batch.latents.shape[-1], 10 * self.n_decile
        return TableState(
            top_value=jnp.full((self.n_top, d_sae), -jnp.inf),
            top_id=jnp.full((self.n_top, d_sae), _NOBODY),
            sample_value=jnp.full((n_sample, d_sae), -jnp.inf),
            sample_id=jnp.full((n_sample, d_sae), _NOBODY),
        )

    def update(self, state: TableState, batch: LatentBatch) -> TableState:
        row_id = jnp.asarray(batch.row_id, jnp.int32)
        order = jnp.argsort(row_id)
        row_id = row_id[order]
        fires = (batch.latents > 0) & (batch.weight > 0)[:, None]
        value = jnp.where(fires, batch.latents, -jnp.inf)[order].T
        # Of equals, top_k takes the first: the lowest id, and hashes of ids never tie.
        top = _best(value, value, row_id, self.n_top)
        chance = jnp.broadcast_to(_priority(row_id, self.seed)[None, :], value.shape)
        sample = _best(jnp.where(fires[order].T, chance, jnp.iinfo(jnp.int32).min), value, row_id, 10 * self.n_decile)
        return self.merge(state, TableState(*top, *sample))

    def merge(self, a: TableState, b: TableState) -> TableState:
        xp: Any = np if isinstance(a.top_id, np.ndarray) else jnp
        top_value, top_id = (xp.concatenate([getattr(a, n), getattr(b, n)]) for n in ("top_value", "top_id"))
        order = xp.lexsort((top_id, -top_value), axis=0)[: self.n_top]
        value, row_id = (xp.concatenate([getattr(a, n), getattr(b, n)]) for n in ("sample_value", "sample_id"))
        # Empty places go last: first by whether they are empty, then by the hash (~ reverses the order of integers).
        drawn = xp.lexsort((~_priority(row_id, self.seed), row_id == _NOBODY), axis=0)[: 10 * self.n_decile]
        return TableState(
            top_value=xp.take_along_axis(top_value, order, axis=0),
            top_id=xp.take_along_axis(top_id, order, axis=0),
            sample_value=xp.take_along_axis(value, drawn, axis=0),
            sample_id=xp.take_along_axis(row_id, drawn, axis=0),
        )

    def compute(self, state: TableState) -> dict[str, float | np.ndarray]:
        top_id, sample_id = np.asarray(state.top_id).T, np.asarray(state.sample_id).T
        top_value, sample_value = np.asarray(state.top_value).T, np.asarray(state.sample_value).T
        order = np.lexsort((sample_id, sample_value))
        sample_id, sample_value = (np.take_along_axis(a, order, axis=1) for a in (sample_id, sample_value))
        filled = sample_id[:, :1] != _NOBODY
        deciles = np.where(filled, sample_id, -1).reshape(-1, 10, self.n_decile)
        values = np.where(filled, sample_value, np.nan).reshape(-1, 10, self.n_decile)
        return {
            "top_row": np.where(top_id == _NOBODY, -1, top_id),
            "top_activation": np.where(top_id == _NOBODY, np.nan, top_value),
            "decile_row": deciles,
            "decile_activation": values,
            "top_latents": float((top_id[:, 0] != _NOBODY).sum()),
            "decile_latents": float(filled.sum()),
        }

    def definitions(self) -> dict[str, str]:
        n = 10 * self.n_decile
        return {
            "top_row": f"For each latent, ids of its {self.n_top} rows of largest activation, equal ones by id; -1 "
            "where it fires on fewer.",
            "top_activation": "The activations on those rows; undefined where there is none.",
            "decile_row": f"For each latent, ids of {n} rows drawn uniformly, by a hash of the id, from those on which "
            f"it fires, sorted by activation and cut into ten groups of {self.n_decile}, weakest first; -1 for a "
            f"latent that fires on fewer than {n} rows.",
            "decile_activation": "The activations on those rows; undefined where there is none.",
            "top_latents": "Number of latents that fire at all.",
            "decile_latents": f"Number of latents that fire on at least {n} rows, and so have deciles.",
        }


def _priority(row_id: Any, seed: int) -> Any:
    """A random int32 for each row, no two alike, the largest to be sampled first."""
    return rows.hashed(row_id, seed).astype(np.int32)


def _best(score: jax.Array, value: jax.Array, row_id: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    """Activations and ids, [n, d_sae], of the firing rows of highest score; short batches are filled up."""
    n_kept = min(n, len(row_id))
    at = jax.lax.top_k(score, n_kept)[1]
    kept = jnp.take_along_axis(value, at, axis=1).T
    ids = jnp.where(kept > -jnp.inf, row_id[at.T], _NOBODY)
    more = [(0, n - n_kept), (0, 0)]
    return jnp.pad(kept, more, constant_values=-jnp.inf), jnp.pad(ids, more, constant_values=_NOBODY)
