r"""Probes of latents against labels: AUROC of a unit, and how many latents a label needs.

A unit of one meaning has AUROC near 1 for one label and near 1/2 for all others:

.. math:: \mathrm{AUROC} = P(f_i > f_j) + \tfrac12 P(f_i = f_j), \qquad i \text{ with the label}, j \text{ without}

If one latent holds a label, that latent alone predicts it. A logistic classifier on the k latents of largest mean
difference is compared with the same on the k best coordinates of the activations, and on all of them.

Sources:
  Gurnee et al., Finding neurons in a haystack: case studies with sparse probing, 2023 (arXiv:2305.01610); Karvonen et
  al., SAEBench, 2025 (arXiv:2503.09532).
"""

import dataclasses
from typing import ClassVar

import numpy as np
from flax import struct
from jaxtyping import Bool, Float
from scipy.stats import rankdata

from saejax.errors import UserError
from saejax.evals import metric
from saejax.lab.metrics import logistic, rows


@struct.dataclass
class LabelBatch:
    """Latents and activations of labelled rows.

    Attributes:
      latents: [b, d_sae].
      x: Activations that the latents describe, [b, d_in].
      labels: Whether the row has each label, [b, n_labels] of 0 and 1.
      test: Whether the row judges (1) or trains (0) a probe, [b] bool or integers.
      row_id: Distinct for every row, [b] integers.
      weight: 1 for a real row, 0 for padding, [b] float32.
    """

    shared: ClassVar[tuple[str, ...]] = ()

    latents: rows.Rows
    x: rows.Rows
    labels: rows.Rows
    test: rows.Rows
    row_id: rows.Rows
    weight: rows.Rows = None


class _Labelled(rows.Kept):
    """Keeps rows and labels."""

    def kept(self, batch: LabelBatch) -> dict[str, np.ndarray]:
        labels = np.asarray(batch.labels)
        if not np.isin(labels, (0, 1)).all():
            raise UserError("labels must be 0 or 1, one column for each label")
        return {
            "row_id": np.asarray(batch.row_id),
            "latents": np.asarray(batch.latents),
            "x": np.asarray(batch.x),
            "labels": labels.astype(np.int64),
            "test": np.asarray(batch.test).astype(np.int64),
        }


def auroc(
    scores: Float[np.ndarray, "n units"], labels: Bool[np.ndarray, "n labels"]
) -> Float[np.ndarray, "units labels"]:
    """Exact area under the ROC curve of every unit for every label, equal scores counting one half.

    Args:
      scores: The larger, the more likely the label.
      labels: True where the row has it.

    Returns:
      In [0, 1], .5 by chance; NaN for a label that all rows or none have.

    Examples:
      >>> auroc(np.array([[0.0], [1.0], [1.0], [2.0]]), np.array([[False], [False], [True], [True]])).tolist()
      [[0.875]]
    """
    labels = np.asarray(labels, np.float64)
    positive = labels.sum(axis=0)
    negative = len(labels) - positive
    # One unit at a time: all ranks at once would be a second copy of the scores in float64.
    sums = np.stack([rankdata(column) @ labels for column in np.asarray(scores).T])
    pairs = positive * negative
    wins = sums - (positive * (positive + 1) / 2)[None, :]
    return np.where(pairs > 0, wins / np.where(pairs > 0, pairs, 1.0)[None, :], np.nan)


@metric.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Polysemanticity(_Labelled, metric.Metric):
    """Number of labels that each latent tells, and how mixed the labels of its strongest rows are."""

    name: ClassVar[str] = "polysemanticity"
    batch_type: ClassVar[type] = LabelBatch
    threshold: float = 0.75
    """AUROC above which a latent tells a label, in [0.5, 1)."""
    n_top: int = 50
    """Strongest rows of a latent whose labels are counted; 1 or more."""
    seed: int = 0
    """Of the control's pairing and of the order among equal activations."""

    def compute(self, state: dict[str, np.ndarray]) -> dict[str, float | np.ndarray]:
        state = rows.ordered(state)
        latents, labels, row_id = state["latents"], state["labels"], state["row_id"]
        other = labels[rows.shuffled(row_id, self.seed)]
        areas = auroc(latents, labels > 0)
        told = (areas > self.threshold).sum(axis=1).astype(np.float64)
        fires = (latents > 0).any(axis=0)
        told_by_chance = (auroc(latents, other > 0) > self.threshold).sum(axis=1)
        entropies = np.array([self._entropies(u, a, labels, other, row_id) for u, a in enumerate(latents.T)])
        told[~fires], entropies[~fires] = np.nan, np.nan
        return {
            "labels_per_latent": rows.known_mean(told),
            "labels_per_latent_chance": rows.known_mean(np.where(fires, told_by_chance, np.nan)),
            "label_entropy_top": rows.known_mean(entropies[:, 0]),
            "label_entropy_top_chance": rows.known_mean(entropies[:, 1]),
            "best_auroc": rows.known_mean(np.where(fires, np.nanmax(areas, axis=1), np.nan)),
            "auroc": areas,
            "labels_of_latent": told,
            "label_entropy_of_latent": entropies[:, 0],
        }

    def _entropies(
        self, unit: int, activation: np.ndarray, labels: np.ndarray, other: np.ndarray, row_id: np.ndarray
    ) -> tuple[float, float]:
        """Entropy of the labels in the strongest rows where the latent fires, and of other rows' labels, in bits."""
        ties = rows.hashed(row_id, self.seed, unit)
        top = np.lexsort((ties, -activation))[: self.n_top]
        top = top[activation[top] > 0]
        return _entropy(labels[top].sum(axis=0)), _entropy(other[top].sum(axis=0))

    def definitions(self) -> dict[str, str]:
        top = f"the {self.n_top} rows of largest activation, those where it is silent left out"
        return {
            "labels_per_latent": f"Mean over latents that fire of the number of labels with AUROC above "
            f"{self.threshold:g}; 1 is one meaning, if the labels exclude each other.",
            "labels_per_latent_chance": "Control: as labels_per_latent, with the labels of another row.",
            "label_entropy_top": f"Mean over latents that fire of the entropy in bits of the labels in {top}, each "
            "label counted as often as it occurs; undefined where none occurs.",
            "label_entropy_top_chance": "Control: as label_entropy_top, with the labels of another row.",
            "best_auroc": "Mean over latents that fire of the largest AUROC for any label.",
            "auroc": "For each latent and label, P(activation of a row with the label is larger than that of one "
            "without) + half of P(equal).",
            "labels_of_latent": "For each latent, the term of labels_per_latent.",
            "label_entropy_of_latent": "For each latent, the term of label_entropy_top.",
        }


@metric.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseProbing(_Labelled, metric.Metric):
    """Test accuracy of logistic probes on few latents, on few coordinates of the activations, and on all of them."""

    name: ClassVar[str] = "sparse_probing"
    batch_type: ClassVar[type] = LabelBatch
    ks: tuple[int, ...] = (1, 2, 5)
    """Numbers of latents that a probe may use; each 1 or more."""
    l2: float = 1e-3
    """Penalty l2 / 2 * |weights|^2 beside the mean loss, for columns of unit variance; above 0."""

    def compute(self, state: dict[str, np.ndarray]) -> dict[str, float | np.ndarray]:
        state = rows.ordered(state)
        test = state["test"] > 0
        if test.all() or not test.any():
            raise UserError(
                f"test must mark some rows and leave some to train on, got {int(test.sum())} of {len(test)}"
            )
        scored = [self._label(state["latents"], state["x"], y > 0, test) for y in state["labels"].T]
        per_label = {key: np.array([s[key] for s in scored]) for key in scored[0]}
        values: dict[str, float | np.ndarray] = {key: rows.known_mean(column) for key, column in per_label.items()}
        largest = f"probe_k{max(self.ks)}"
        return values | {f"{largest}_per_label": per_label[largest]}

    def _label(self, latents: np.ndarray, x: np.ndarray, label: np.ndarray, test: np.ndarray) -> dict[str, float]:
        """All probes of one label; NaN where the train rows do not hold both answers."""
        y, answer = label[~test], label[test]
        scores = {}
        for suffix, columns in (("", latents), ("_neurons", x)):
            order = _largest_difference(columns[~test], y)
            for k in self.ks:
                chosen = columns[:, order[:k]]
                scores[f"probe_k{k}{suffix}"] = logistic.accuracy(chosen[~test], y, chosen[test], answer, l2=self.l2)
        scores["probe_dense"] = logistic.accuracy(x[~test], y, x[test], answer, l2=self.l2)
        scores["probe_chance"] = max(answer.mean(), 1 - answer.mean()) if 0 < y.mean() < 1 else float("nan")
        return scores

    def definitions(self) -> dict[str, str]:
        fitted = f"logistic regression (l2 {self.l2:g}) fitted to the train rows"
        texts = {
            "probe_dense": f"Mean over labels of the share of test rows answered rightly by {fitted}, on all "
            "coordinates of the activations.",
            "probe_chance": "Share of the more frequent answer in the test rows, mean over labels.",
            f"probe_k{max(self.ks)}_per_label": f"For each label, the term of probe_k{max(self.ks)}.",
        }
        for k in self.ks:
            texts[f"probe_k{k}"] = f"As probe_dense, on the {k} latents whose mean differs most, in absolute value, "
            texts[f"probe_k{k}"] += "between train rows with and without the label; labels that the train rows do not "
            texts[f"probe_k{k}"] += "hold both ways are left out."
            texts[f"probe_k{k}_neurons"] = f"Control: as probe_k{k}, on coordinates of the activations."
        return texts


def _largest_difference(columns: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Columns by |mean with the label - mean without|, largest first, equal ones by place."""
    if y.all() or not y.any():
        return np.arange(columns.shape[1])
    difference = columns[y].mean(axis=0, dtype=np.float64) - columns[~y].mean(axis=0, dtype=np.float64)
    return np.argsort(-np.abs(difference), kind="stable")


def _entropy(counts: np.ndarray) -> float:
    """In bits; NaN of nothing."""
    if not counts.sum():
        return float("nan")
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log2(share)).sum()) + 0.0
