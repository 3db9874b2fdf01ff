r"""Gaps: the loss due to the encoder, to the dictionary, and to a change of the data.

On one dictionary, with one loss, an encoder is compared with the best codes of a solver:

.. math:: \mathrm{amortisation\_gap} = E[\ell(\mathrm{enc}(y)) - \min_z \ell(z)] \ge 0,\qquad
   \ell(z) = \tfrac12 \|y - z D\|^2 + \lambda \|z\|_1

Sources:
  O'Neill and Klindt, 2024 (arXiv:2411.13117), for the amortisation gap; its 2026 sequel (arXiv:2603.28744), for the gap
  of the dictionary.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from saejax.errors import UserError
from saejax.evals import metric

_WORSE = 1e-5
"""A solver's loss above the encoder's by more than this share is its failure, not rounding."""


@jax.jit
def lasso_loss(
    y: Float[Array, "b d"], codes: Float[Array, "b n"], dictionary: Float[Array, "n d"], l1_coef: float
) -> Float[Array, "b"]:
    r"""Returns \(\tfrac12 \|y - z D\|^2 + \lambda \|z\|_1\) of each row, what `sparse_coding.infer` minimises."""
    error = y - jnp.matmul(codes, dictionary, precision=jax.lax.Precision.HIGHEST)
    return 0.5 * jnp.sum(error**2, axis=-1) + l1_coef * jnp.sum(jnp.abs(codes), axis=-1)


@struct.dataclass
class LossPairBatch:
    """The loss of each row, [b], with the codes of the encoder and with those of a solver; `weight` [b]."""

    shared: ClassVar[tuple[str, ...]] = ()

    encoder: jax.Array
    solver: jax.Array
    weight: jax.Array | None = None


@struct.dataclass
class LossPairState:
    """Sums over rows, scalars: both losses, rows, and rows where the solver did worse."""

    encoder: jax.Array
    solver: jax.Array
    rows: jax.Array
    worse: jax.Array


@metric.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class AmortisationGap(metric.Metric):
    """By how much a solver beats the encoder, same dictionary, same loss."""

    name: ClassVar[str] = "amortisation_gap"
    batch_type: ClassVar[type] = LossPairBatch

    def init(self, batch: LossPairBatch) -> LossPairState:
        return LossPairState(*(jnp.zeros(()) for _ in range(4)))

    def update(self, state: LossPairState, batch: Any) -> LossPairState:
        worse = batch.solver > batch.encoder * (1 + _WORSE)
        parts = (batch.encoder, batch.solver, jnp.ones_like(batch.solver), worse.astype(jnp.float32))
        return self.merge(state, LossPairState(*(metric.total(part, batch.weight) for part in parts)))

    def merge(self, a: LossPairState, b: LossPairState) -> LossPairState:
        return jax.tree.map(lambda p, q: p + q, a, b)

    def compute(self, state: LossPairState) -> dict[str, float | np.ndarray]:
        gap = float(state.encoder) - float(state.solver)
        return {
            "amortisation_gap": metric.ratio(gap, state.rows),
            "amortisation_gap_relative": metric.ratio(gap, state.solver),
            "loss_encoder": metric.ratio(state.encoder, state.rows),
            "loss_solver": metric.ratio(state.solver, state.rows),
            "solver_worse_share": metric.ratio(state.worse, state.rows),
        }

    def definitions(self) -> dict[str, str]:
        return {
            "amortisation_gap": "Mean over rows of the loss with the encoder's codes minus that with the solver's.",
            "amortisation_gap_relative": "Sum of these differences divided by the sum of the solver's losses.",
            "loss_encoder": "Mean loss with the encoder's codes.",
            "loss_solver": "Mean loss with the solver's codes.",
            "solver_worse_share": "Share of rows on which the solver's loss is above the encoder's by more than "
            "1e-5 of "
            "it: 0 for a solver that converged.",
        }


def inference_gaps(encoder: float, solver: float, oracle: float, name: str = "f1") -> dict[str, float]:
    """Splits the distance to the best possible score into the encoder's share and the dictionary's.

    Args:
      encoder: Score (support F1, code MCC) of the encoder's codes on its learnt dictionary.
      solver: The same of a solver's codes on that dictionary.
      oracle: The same of that solver on the true dictionary.
      name: Of the score.

    Returns:
      `amortisation_gap_<name>` = solver - encoder and `dictionary_gap_<name>` = oracle - solver, both in [-1, 1].

    Examples:
      >>> {key: round(value, 3) for key, value in inference_gaps(0.757, 0.911, 0.995).items()}
      {'amortisation_gap_f1': 0.154, 'dictionary_gap_f1': 0.084}
    """
    return {f"amortisation_gap_{name}": solver - encoder, f"dictionary_gap_{name}": oracle - solver}


def shift_gaps(trained: Mapping[str, float], shifted: Mapping[str, float]) -> dict[str, float]:
    """Returns `<key>_shift_gap` = value on the training distribution - value on shifted data, for every common key.

    Both must come from the same metric with the same matching, learnt on the training distribution (`Support` takes the
    matching with the batch; `CodeMcc(shifted=True)` does both at once). Keys that end in `_chance` are left out.

    Raises:
      UserError: no key is common to both.

    Examples:
      >>> shift_gaps({"f1": 0.75, "f1_chance": 0.1}, {"f1": 0.5, "f1_chance": 0.1})
      {'f1_shift_gap': 0.25}
    """
    common = [key for key in trained if key in shifted and not key.endswith("_chance")]
    if not common:
        raise UserError(f"no score is in both results, got {sorted(trained)} and {sorted(shifted)}")
    return {f"{key}_shift_gap": float(trained[key]) - float(shifted[key]) for key in common}
