r"""Additivity of a representation: is f of two things together the sum of f of each?

.. math:: f(AB) - f_0 \overset{?}{=} (f(A) - f_0) + (f(B) - f_0), \qquad f_0 = f(\text{nothing})

A raw cosine near 0.9 says little: an untrained ReLU network gives it too. So each cosine stands beside two controls,
the mean over all wrong pairs (`_shuffled`) and the better of A and B alone (`_single`). R2 sees lengths, which cosines
do not. Retrieval asks whether the sum is closer to its own pair than to any other.

Sources:
  Klindt et al., From superposition to sparse codes, 2025: the test f(A) + f(B) = f(A + B).
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Float

from saejax.evals import metric
from saejax.evals.result import EvalResult
from saejax.lab.metrics import rows
from saejax.lab.metrics.over import over

_TIE = 1e-6
"""Cosines closer than this are ties: float32 networks give equal inputs equal outputs only up to rounding."""


@struct.dataclass
class PairBatch:
    """A network's outputs for A, for B, and for both together.

    Attributes:
      f_a: Of A alone, [b, m] float32.
      f_b: Of B alone, [b, m] float32.
      f_ab: Of both, [b, m] float32.
      row_id: Distinct for every row, [b] int32.
      weight: 1 for a real row, 0 for padding, [b] float32.
      f_blank: Of nothing, [m] float32.
    """

    shared: ClassVar[tuple[str, ...]] = ("f_blank",)

    f_a: rows.Rows
    f_b: rows.Rows
    f_ab: rows.Rows
    row_id: rows.Rows
    f_blank: rows.Rows
    weight: rows.Rows = None


@struct.dataclass
class CosineState:
    """Sums over rows for vectors as they are and without f_blank, in this order.

    Attributes:
      own: Of the cosine of the sum with its own pair, [2].
      single: Of the larger cosine of A or of B alone with the pair, [2].
      sums: Of the normalised sums, [2, m].
      pairs: Of the normalised pairs, [2, m].
      error: Of |(AB - 0) - (A - 0) - (B - 0)|^2.
      pair: Of AB - 0, [m].
      pair_pair: Of |AB - 0|^2.
      rows: Number of rows.
    """

    own: jax.Array
    single: jax.Array
    sums: jax.Array
    pairs: jax.Array
    error: jax.Array
    pair: jax.Array
    pair_pair: jax.Array
    rows: jax.Array


@metric.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Additivity(metric.Metric):
    """Cosines, raw and without f_blank, with their controls, and R2: sums over rows, on the devices."""

    name: ClassVar[str] = "additivity"
    batch_type: ClassVar[type] = PairBatch

    def init(self, batch: PairBatch) -> CosineState:
        metric.same_width(f_a=batch.f_a, f_b=batch.f_b, f_ab=batch.f_ab, f_blank=batch.f_blank[None])
        m = batch.f_a.shape[-1]
        two, wide, one = jnp.zeros(2), jnp.zeros((2, m)), jnp.zeros(())
        return CosineState(
            own=two, single=two, sums=wide, pairs=wide, error=one, pair=jnp.zeros(m), pair_pair=one, rows=one
        )

    def update(self, state: CosineState, batch: PairBatch) -> CosineState:
        real = batch.weight[:, None] > 0
        blank = batch.f_blank[None, :]
        a, b, ab = (jnp.where(real, f, blank) for f in (batch.f_a, batch.f_b, batch.f_ab))
        error = (ab - blank) - (a - blank) - (b - blank)
        own, single, sums, pairs = [], [], [], []
        for origin in (jnp.zeros_like(blank), blank):
            target = _unit(ab - origin) * real
            added = _unit((a - origin) + (b - origin)) * real
            alone = jnp.maximum(metric.dot(_unit(a - origin), target), metric.dot(_unit(b - origin), target))
            own.append(jnp.sum(metric.dot(added, target)))
            single.append(jnp.sum(alone))
            sums.append(jnp.sum(added, axis=0))
            pairs.append(jnp.sum(target, axis=0))
        this = CosineState(
            own=jnp.stack(own),
            single=jnp.stack(single),
            sums=jnp.stack(sums),
            pairs=jnp.stack(pairs),
            error=jnp.sum(error**2),
            pair=jnp.sum(ab - blank, axis=0),
            pair_pair=jnp.sum((ab - blank) ** 2),
            rows=jnp.sum(real.astype(jnp.float32)),
        )
        return self.merge(state, this)

    def merge(self, a: CosineState, b: CosineState) -> CosineState:
        return jax.tree.map(lambda p, q: p + q, a, b)

    def compute(self, state: CosineState) -> dict[str, float | np.ndarray]:
        n = float(state.rows)
        values: dict[str, float | np.ndarray] = {}
        for i, name in enumerate(("raw", "blank_centred")):
            everyone = float(np.sum(np.asarray(state.sums[i]) * np.asarray(state.pairs[i])))
            values[f"additivity_cos_{name}"] = metric.ratio(state.own[i], n)
            values[f"additivity_cos_{name}_shuffled"] = metric.ratio(everyone - float(state.own[i]), n * (n - 1))
            values[f"additivity_cos_{name}_single"] = metric.ratio(state.single[i], n)
        spread = float(state.pair_pair) - metric.ratio(np.sum(np.asarray(state.pair) ** 2), n)
        return {**values, "additivity_r2": 1.0 - metric.ratio(state.error, spread)}

    def definitions(self) -> dict[str, str]:
        texts = {}
        for name, how in {"raw": "the vectors as they are", "blank_centred": "f_blank taken from every vector"}.items():
            texts |= _cosine_texts(name, how)
        return texts | {
            "additivity_r2": "1 - sum of |(f_ab - f_blank) - (f_a - f_blank) - (f_b - f_blank)|^2 / sum of "
            "|f_ab - mean f_ab|^2; 1 for every affine map, 0 for predicting the mean, any negative number below.",
        }


@metric.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class AdditivityRetrieval(rows.Kept, metric.Metric):
    """Scores that need all pairs at once: the mean-centred cosine with its controls, and retrieval at 1.

    Keeps three vectors per row on the host; n rows cost n^2 m operations.
    """

    name: ClassVar[str] = "additivity_retrieval"
    batch_type: ClassVar[type] = PairBatch
    block: int = 1024
    """Sums compared to all pairs at once, in rows."""

    def kept(self, batch: PairBatch) -> dict[str, np.ndarray]:
        blank = np.asarray(batch.f_blank, np.float64)[None, :]
        vectors = {name: np.asarray(getattr(batch, name)) - blank for name in ("f_a", "f_b", "f_ab")}
        return {"row_id": np.asarray(batch.row_id), **vectors}

    def compute(self, state: dict[str, np.ndarray]) -> dict[str, float | np.ndarray]:
        state = rows.ordered(state)
        a, b, ab = state["f_a"], state["f_b"], state["f_ab"]
        n = len(ab)
        values: dict[str, float | np.ndarray] = {
            "additivity_retrieval": _retrieval(a + b, ab, self.block),
            "additivity_retrieval_single": max(_retrieval(a, ab, self.block), _retrieval(b, ab, self.block)),
            "additivity_retrieval_chance": 1.0 / n,
        }
        a, b, ab = (f - f.mean(axis=0, keepdims=True) for f in (a, b, ab))
        added, target = rows.unit(a + b), rows.unit(ab)
        own = float((added * target).sum())
        everyone = float(added.sum(axis=0) @ target.sum(axis=0))
        single = np.maximum(rows.cosine(a, ab), rows.cosine(b, ab))
        return values | {
            "additivity_cos_mean_centred": own / n,
            "additivity_cos_mean_centred_shuffled": metric.ratio(everyone - own, n * (n - 1)),
            "additivity_cos_mean_centred_single": float(single.mean()),
        }

    def definitions(self) -> dict[str, str]:
        return _cosine_texts("mean_centred", "each of f_a, f_b and f_ab without its own mean over rows") | {
            "additivity_retrieval": "Share of rows whose (f_a - f_blank) + (f_b - f_blank) has its largest cosine, of "
            "all rows, with its own f_ab - f_blank; t rows tied for the largest count 1/t.",
            "additivity_retrieval_single": "As additivity_retrieval with f_a alone or f_b alone in place of the sum, "
            "the better of both.",
            "additivity_retrieval_chance": "1 / number of rows.",
        }


def additivity(
    f_a: Float[np.ndarray, "n m"],
    f_b: Float[np.ndarray, "n m"],
    f_ab: Float[np.ndarray, "n m"],
    f_blank: Float[np.ndarray, "m"],
    *,
    mesh: Mesh | None = None,
) -> EvalResult:
    """Returns the whole report on one layer: `Additivity` and `AdditivityRetrieval`.

    Args:
      f_a: The layer on A alone.
      f_b: On B alone.
      f_ab: On both together, row by row.
      f_blank: On nothing.
      mesh: Splits the rows of the first metric; None for the default device.

    Returns:
      The keys of both metrics.

    Raises:
      UserError: no rows, different numbers of rows, or values that are not finite.
    """
    batch = PairBatch(f_a=f_a, f_b=f_b, f_ab=f_ab, row_id=np.arange(len(f_a)), f_blank=f_blank)
    return over(Additivity(), batch, mesh=mesh).joined(over(AdditivityRetrieval(), batch))


def _cosine_texts(name: str, how: str) -> dict[str, str]:
    """Definitions of one kind of cosine and of its controls."""
    key = f"additivity_cos_{name}"
    return {
        key: f"Mean over rows of cos(f_a + f_b, f_ab), {how}; 0 where either is zero.",
        f"{key}_shuffled": f"Control: as {key}, over all pairs of a sum with the f_ab of another row.",
        f"{key}_single": f"Control: mean over rows of max(cos(f_a, f_ab), cos(f_b, f_ab)), {how}.",
    }


def _unit(f: Float[Array, "b m"]) -> Float[Array, "b m"]:
    """Rows of length 1; rows of zeros stay zero."""
    length = jnp.linalg.norm(f, axis=-1, keepdims=True)
    return jnp.where(length > 0, f / jnp.where(length > 0, length, 1.0), 0.0)


def _retrieval(sums: np.ndarray, pairs: np.ndarray, block: int) -> float:
    """Share of sums nearest to their own pair, ties shared."""
    sums, pairs = rows.unit(sums), rows.unit(pairs)
    hits = 0.0
    for start in range(0, len(sums), block):
        cosines = sums[start : start + block] @ pairs.T
        own = np.diagonal(cosines, offset=start)
        tied = (cosines >= own[:, None] - _TIE).sum(axis=1)
        best = own >= cosines.max(axis=1) - _TIE
        hits += float((best / tied).sum())
    return hits / len(sums)
