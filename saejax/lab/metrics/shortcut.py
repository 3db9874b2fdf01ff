"""Shortcut learning: does a classifier answer by a cue that merely correlates with the label?

Rows are grouped by label and cue. A classifier that relies on the cue is right where the cue agrees with the label and
wrong where it does not. So its worst group reveals what its mean hides. `dependence` compares the scores of two
networks, trained without and with the correlation, and gives its cost.

Sources:
  Sagawa et al., Distributionally robust neural networks for group shifts, 2020 (arXiv:1911.08731), for the worst group.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from saejax.errors import UserError
from saejax.evals import metric
from saejax.lab.metrics import rows


@struct.dataclass
class CueBatch:
    """Answers of a classifier beside the label and the cue.

    Attributes:
      prediction: Class, [b] int32.
      label: Class, [b] int32.
      cue: The class that the cue speaks for, [b] int32.
      weight: 1 for a real row, 0 for padding, [b] float32.
    """

    shared: ClassVar[tuple[str, ...]] = ()

    prediction: rows.Rows
    label: rows.Rows
    cue: rows.Rows
    weight: rows.Rows = None


@struct.dataclass
class GroupState:
    """Sums over rows by label and cue, [n_classes, n_classes]: right answers, and rows."""

    hits: jax.Array
    rows: jax.Array


@metric.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupAccuracy(metric.Metric):
    """Accuracy by group of label and cue, and of the worst group."""

    name: ClassVar[str] = "group_accuracy"
    batch_type: ClassVar[type] = CueBatch
    n_classes: int = 2
    """Number of classes, which is that of cues; 2 or more."""

    def init(self, batch: CueBatch) -> GroupState:
        return GroupState(*(jnp.zeros((self.n_classes, self.n_classes)) for _ in range(2)))

    def update(self, state: GroupState, batch: CueBatch) -> GroupState:
        real = (jnp.asarray(batch.weight) > 0).astype(jnp.float32)
        group = jnp.asarray(batch.label, jnp.int32), jnp.asarray(batch.cue, jnp.int32)
        right = real * (jnp.asarray(batch.prediction) == batch.label)
        none = jnp.zeros((self.n_classes, self.n_classes))
        return self.merge(state, GroupState(hits=none.at[group].add(right), rows=none.at[group].add(real)))

    def merge(self, a: GroupState, b: GroupState) -> GroupState:
        return jax.tree.map(lambda p, q: p + q, a, b)

    def compute(self, state: GroupState) -> dict[str, float | np.ndarray]:
        hits, n = np.asarray(state.hits), np.asarray(state.rows)
        table = np.divide(hits, n, out=np.full(n.shape, np.nan), where=n > 0)
        agree = np.eye(self.n_classes, dtype=bool)
        aligned, conflicting = (metric.ratio(hits[part].sum(), n[part].sum()) for part in (agree, ~agree))
        return {
            "group_accuracy_mean": metric.ratio(hits.sum(), n.sum()),
            "group_accuracy_chance": 1.0 / self.n_classes,
            "worst_group_accuracy": float(np.nanmin(table)) if n.any() else float("nan"),
            "aligned_accuracy": aligned,
            "conflicting_accuracy": conflicting,
            "shortcut_gap": aligned - conflicting,
            "group_accuracy": table,
        }

    def definitions(self) -> dict[str, str]:
        return {
            "group_accuracy_mean": "Share of all rows answered rightly.",
            "group_accuracy_chance": "1 / number of classes: every group's accuracy when answers are drawn blindly.",
            "worst_group_accuracy": "The smallest entry of group_accuracy.",
            "aligned_accuracy": "Share answered rightly of the rows whose cue agrees with the label.",
            "conflicting_accuracy": "Share answered rightly of the rows whose cue does not agree with the label.",
            "shortcut_gap": "aligned_accuracy - conflicting_accuracy; 0 for a classifier that ignores the cue.",
            "group_accuracy": "For each label (row) and cue (column), the share answered rightly; undefined where "
            "there are no rows.",
        }


def dependence(
    without: Mapping[str, float],
    with_cue: Mapping[str, float],
    keys: Sequence[str] = ("additivity_r2", "probe_r2", "worst_group_accuracy"),
) -> dict[str, float]:
    """Compares a network trained with a spurious cue to one trained without.

    Args:
      without: Scores of the network trained where the cue is independent of the label.
      with_cue: Scores, on the same rows, of the one trained where the cue goes along with the label.
      keys: Scores that are larger for the better network.

    Returns:
      `KEY_lost`, without - with_cue, for every key.

    Raises:
      UserError: a key is missing.

    Examples:
      >>> dependence({"probe_r2": 1.0}, {"probe_r2": 0.25}, ["probe_r2"])
      {'probe_r2_lost': 0.75}
    """
    missing = [key for key in keys if key not in without or key not in with_cue]
    if missing:
        raise UserError(f"keys must be scores of both networks, got {', '.join(missing)} that one does not have")
    return {f"{key}_lost": float(without[key]) - float(with_cue[key]) for key in keys}
