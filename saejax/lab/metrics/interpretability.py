r"""Interpretability without people: does a unit mean one thing? Intruder and two-alternative tests.

Both scores read a descriptor of every row (labels, pixels, another model). It must be independent of the layer under
test: if the layer's own activations describe the rows, neurons, random directions and latents look alike.

Intruder: take `n_top` of a unit's strongest rows and one on which it is silent; the row least similar to the others is
the guess. Two-alternative choice: take reference rows from both ends and one query from each end,

.. math:: \mathrm{evidence} = \overline{s}(\mathrm{top}, q^+) + \overline{s}(\mathrm{bottom}, q^-)
   - \overline{s}(\mathrm{top}, q^-) - \overline{s}(\mathrm{bottom}, q^+)

with s the cosines of descriptors standardised within the trial, and the score the logistic function of it: .5 by
chance, near .9 for a perfect unit whose bottom rows have nothing in common, never above .983. It is not the rate of a
human observer.

Sources:
  Klindt et al., Identifying interpretable visual features in artificial and biological neural systems, 2023
  (arXiv:2310.11431); Zimmermann et al., Scale alone does not improve mechanistic interpretability in vision models,
  2023 (arXiv:2307.05471); Paulo et al., Automatically interpreting millions of features, 2024 (arXiv:2410.13928).
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from flax import struct
from jaxtyping import Float

from saejax.errors import UserError
from saejax.evals import metric
from saejax.lab.metrics import rows


@struct.dataclass
class DescribedBatch:
    """Activations of units and an independent description of the same rows.

    Attributes:
      latents: Activations of the units to judge, [b, n_units].
      descriptor: Description of each row, [b, p].
      row_id: Distinct for every row, [b] integers.
      weight: 1 for a real row, 0 for padding, [b] float32.
    """

    shared: ClassVar[tuple[str, ...]] = ()

    latents: rows.Rows
    descriptor: rows.Rows
    row_id: rows.Rows
    weight: rows.Rows = None


class _Described(rows.Kept):
    """Keeps activations and descriptors; rows are compared by the cosine of their descriptors."""

    def kept(self, batch: DescribedBatch) -> dict[str, np.ndarray]:
        return {name: np.asarray(getattr(batch, name)) for name in ("row_id", "latents", "descriptor")}


@metric.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Intruder(_Described, metric.Metric):
    """Rate at which a row where a unit is silent stands out from its strong rows; chance 1 / (n_top + 1)."""

    name: ClassVar[str] = "intruder"
    batch_type: ClassVar[type] = DescribedBatch
    n_top: int = 4
    """Rows beside the intruder; 2 or more."""
    top_share: float = 0.01
    """Share of all rows that count as a unit's strongest, in (0, 1]; at least `n_top`, and only rows where it fires."""
    trials: int = 50
    """Draws per unit; 1 or more."""
    seed: int = 0
    """Of the draws, together with row ids, unit and trial."""

    def compute(self, state: dict[str, np.ndarray]) -> dict[str, float | np.ndarray]:
        state = rows.ordered(state)
        described = rows.unit(state["descriptor"])
        scores = np.array([self._unit(u, a, state["row_id"], described) for u, a in enumerate(state["latents"].T)])
        return {
            "intruder_accuracy": rows.known_mean(scores),
            "intruder_accuracy_chance": 1.0 / (self.n_top + 1),
            "intruder_units": float(np.sum(~np.isnan(scores))),
            "intruder_per_unit": scores,
        }

    def _unit(self, unit: int, activation: np.ndarray, row_id: np.ndarray, described: np.ndarray) -> float:
        """Share of trials won by one unit; NaN if it fires on fewer than n_top rows."""
        firing = np.flatnonzero(activation > 0)
        if len(firing) < self.n_top:
            return float("nan")
        ties = rows.hashed(row_id, self.seed, unit)
        size = max(self.n_top, int(np.ceil(self.top_share * len(row_id))))
        top = firing[np.lexsort((ties[firing], -activation[firing]))[:size]]
        low = activation <= max(0.0, float(np.quantile(activation, 0.01)))
        low[top] = False
        low = np.flatnonzero(low)
        if not len(low):
            return float("nan")
        chosen = np.empty((self.trials, self.n_top + 1), np.int64)
        for trial in range(self.trials):
            draw = rows.hashed(row_id[top], self.seed, unit, trial, 1)
            chosen[trial, 1:] = top[np.argsort(draw)[: self.n_top]]
            chosen[trial, 0] = low[np.argmin(rows.hashed(row_id[low], self.seed, unit, trial, 2))]
        similar = described[chosen] @ described[chosen].transpose(0, 2, 1)
        others = similar.sum(axis=2) - np.diagonal(similar, axis1=1, axis2=2)
        return float(_share_of_lowest(others).mean())

    def definitions(self) -> dict[str, str]:
        n = self.n_top
        return {
            "intruder_accuracy": f"Mean over units of the share of {self.trials} trials in which, among {n} rows drawn "
            f"from the strongest {self.top_share:g} of all rows, those where the unit is silent left out, and one row "
            "where it is silent, the latter has the lowest summed cosine of descriptors with the others; t rows tied "
            "for the lowest count 1/t. A unit that is never silent is taken to be on its lowest 0.01.",
            "intruder_accuracy_chance": f"1 / {n + 1}: all rows alike.",
            "intruder_units": f"Units that fire on at least {n} rows; others are left out.",
            "intruder_per_unit": "For each unit, the term of intruder_accuracy; undefined where left out.",
        }


@metric.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoAlternatives(_Described, metric.Metric):
    """Whether a query row from the top of a unit looks like other top rows rather than like bottom rows."""

    name: ClassVar[str] = "two_alternatives"
    batch_type: ClassVar[type] = DescribedBatch
    references: int = 9
    """Reference rows from each end in a trial; 1 or more."""
    trials: int = 20
    """Trials per unit; each end needs trials * (references + 1) rows."""
    seed: int = 0
    """Of the order among rows of equal activation."""

    def compute(self, state: dict[str, np.ndarray]) -> dict[str, float | np.ndarray]:
        state = rows.ordered(state)
        needed = 2 * self.trials * (self.references + 1)
        if len(state["row_id"]) < needed:
            raise UserError(
                f"rows must number at least 2 * trials * (references + 1) = {needed}, got {len(state['row_id'])}"
            )
        described = rows.unit(state["descriptor"])
        evidence = np.stack([self._unit(u, a, state["row_id"], described) for u, a in enumerate(state["latents"].T)])
        soft = (1 / (1 + np.exp(-evidence))).mean(axis=1)
        hard = ((evidence > _TIE) + 0.5 * (np.abs(evidence) <= _TIE)).mean(axis=1)
        alive = state["latents"].max(axis=0) > state["latents"].min(axis=0)
        soft, hard = np.where(alive, soft, np.nan), np.where(alive, hard, np.nan)
        return {
            "mis": rows.known_mean(soft),
            "mis_chance": 0.5,
            "mis_accuracy": rows.known_mean(hard),
            "mis_accuracy_chance": 0.5,
            "mis_units": float(alive.sum()),
            "mis_per_unit": soft,
        }

    def _unit(self, unit: int, activation: np.ndarray, row_id: np.ndarray, described: np.ndarray) -> np.ndarray:
        """Evidence for the right answer in each trial, [trials]."""
        # Equal activations are ordered at random: the bottom of a sparse unit is a sample of its zeros.
        top = np.lexsort((rows.hashed(row_id, self.seed, unit, 1), -activation))
        bottom = np.lexsort((rows.hashed(row_id, self.seed, unit, 2), activation))
        count = self.trials * (self.references + 1)
        # Rank t is the query of trial t; its references are every trials-th rank after the queries.
        ends = np.stack([top[:count], bottom[:count]]).reshape(2, self.references + 1, self.trials)
        vectors = described[ends.transpose(2, 0, 1)]
        queries, references = vectors[:, :, 0], vectors[:, :, 1:].reshape(self.trials, -1, described.shape[1])
        similar = references @ queries.transpose(0, 2, 1)
        spread = similar.std(axis=(1, 2), keepdims=True)
        similar = (similar - similar.mean(axis=(1, 2), keepdims=True)) / np.where(spread > _TIE, spread, np.inf)
        from_top, from_bottom = similar[:, : self.references].mean(axis=1), similar[:, self.references :].mean(axis=1)
        return from_top[:, 0] + from_bottom[:, 1] - from_top[:, 1] - from_bottom[:, 0]

    def definitions(self) -> dict[str, str]:
        k, t = self.references, self.trials
        return {
            "mis": f"Mean over units and {t} trials of the logistic function of the evidence: {k} references and one "
            "query from the top and from the bottom of the unit, ranks interleaved over trials; cosines of descriptors "
            "between references and queries are standardised over the trial; evidence is mean top to top + mean bottom "
            "to bottom - mean bottom to top - mean top to bottom.",
            "mis_chance": "0.5: the descriptor says nothing about the unit.",
            "mis_accuracy": "As mis, with the share of trials of positive evidence, ties counting one half.",
            "mis_accuracy_chance": "0.5.",
            "mis_units": "Units whose activation varies; others are left out.",
            "mis_per_unit": "For each unit, the term of mis; undefined where left out.",
        }


def contrast(
    scores: Mapping[str, Float[np.ndarray, "_"]],
    against: str,
    *,
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, float]:
    """Compares kinds of units by one score: differences of means with bootstrap intervals.

    Args:
      scores: Score of each unit for every kind (`latents`, `neurons`, `random_directions`); NaN is left out, and every
        kind is cut, at random, to the size of the smallest.
      against: The kind that the others are compared to.
      draws: Bootstrap resamples of units.
      level: Coverage of the interval.
      seed: Of the cut and of the resamples.

    Returns:
      For every other kind X: `X_minus_AGAINST`, `..._low`, `..._high`; and `units`, the number of each kind.

    Raises:
      UserError: `against` is not among the kinds, or a kind has no score.
    """
    if against not in scores:
        raise UserError(f"against must be one of {', '.join(scores)}, got {against!r}")
    known = {kind: np.asarray(s, np.float64)[~np.isnan(s)] for kind, s in scores.items()}
    n = min(len(s) for s in known.values())
    if not n:
        raise UserError(f"every kind of unit needs scores, got none for {[k for k, s in known.items() if not len(s)]}")
    rng = np.random.default_rng(seed)
    known = {kind: rng.permutation(s)[:n] for kind, s in known.items()}
    means = {kind: s[rng.integers(n, size=(draws, n))].mean(axis=1) for kind, s in known.items()}
    values = {"units": float(n)}
    for kind in (k for k in scores if k != against):
        low, high = np.quantile(means[kind] - means[against], [(1 - level) / 2, (1 + level) / 2])
        name = f"{kind}_minus_{against}"
        values[name] = float(known[kind].mean() - known[against].mean())
        values |= {f"{name}_low": float(low), f"{name}_high": float(high)}
    return values


_TIE = 1e-9
"""Similarities closer than this are equal."""


def _share_of_lowest(sums: np.ndarray) -> np.ndarray:
    """For each trial, whether column 0 is the lowest, shared among ties; [trials]."""
    lowest = sums <= sums.min(axis=1, keepdims=True) + _TIE
    return lowest[:, 0] / lowest.sum(axis=1)
