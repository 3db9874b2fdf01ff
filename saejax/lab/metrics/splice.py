"""Splice for any model: the cost of a reconstruction, by a callable that returns the loss of each row.

The scores equal those for language models (`evals.language_model`). The cost of an ablation by zero or by the mean
sets the scale, and the key says which.

Sources:
  Bricken et al., Towards monosemanticity, 2023, for the loss recovered.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from saejax.evals import metric
from saejax.evals.result import EvalResult
from saejax.lab.metrics import rows
from saejax.lab.metrics.over import over

_VARIANTS = ("clean", "spliced", "zero", "mean")


@struct.dataclass
class LossBatch:
    """Loss of each row under four fates of its activation, [b] float32 each.

    Attributes:
      clean: Left as it is.
      spliced: Replaced by its reconstruction.
      zero: Replaced by zero.
      mean: Replaced by the mean activation.
      weight: 1 for a real row, 0 for padding, [b] float32.
    """

    shared: ClassVar[tuple[str, ...]] = ()

    clean: rows.Rows
    spliced: rows.Rows
    zero: rows.Rows
    mean: rows.Rows
    weight: rows.Rows = None


@metric.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class LossRecovered(metric.Metric):
    """Mean losses of the four variants, and what share of an ablation's damage the reconstruction avoids, (-inf, 1]."""

    name: ClassVar[str] = "loss_recovered"
    batch_type: ClassVar[type] = LossBatch

    def init(self, batch: LossBatch) -> dict[str, jax.Array]:
        return {name: jnp.zeros(()) for name in (*_VARIANTS, "rows")}

    def update(self, state: dict[str, jax.Array], batch: LossBatch) -> dict[str, jax.Array]:
        weight = jnp.asarray(batch.weight)
        this = {name: metric.total(jnp.asarray(getattr(batch, name)), weight) for name in _VARIANTS}
        return self.merge(state, {**this, "rows": jnp.sum(weight)})

    def merge(self, a: dict[str, jax.Array], b: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return jax.tree.map(lambda p, q: p + q, a, b)

    def compute(self, state: dict[str, jax.Array]) -> dict[str, float | np.ndarray]:
        loss = {name: metric.ratio(state[name], state["rows"]) for name in _VARIANTS}
        values: dict[str, float | np.ndarray] = {f"loss_{name}": value for name, value in loss.items()}
        values["delta_loss"] = loss["spliced"] - loss["clean"]
        for name in ("zero", "mean"):
            values[f"loss_recovered_{name}"] = metric.ratio(loss[name] - loss["spliced"], loss[name] - loss["clean"])
        return values

    def definitions(self) -> dict[str, str]:
        return {
            "loss_clean": "Mean loss over rows of the unchanged model.",
            "loss_spliced": "As loss_clean, with the activation replaced by its reconstruction.",
            "loss_zero": "As loss_clean, with the activation replaced by zero.",
            "loss_mean": "As loss_clean, with the activation replaced by the mean activation.",
            "delta_loss": "loss_spliced - loss_clean.",
            "loss_recovered_zero": "(loss_zero - loss_spliced) / (loss_zero - loss_clean): 1 is the clean model, 0 no "
            "better than zero ablation.",
            "loss_recovered_mean": "(loss_mean - loss_spliced) / (loss_mean - loss_clean): 1 is the clean model, 0 no "
            "better than mean ablation.",
        }


def loss_recovered(
    loss_fn: Callable[[Any | None], Any], x: Any, recon: Any, *, mean: np.ndarray | None = None
) -> EvalResult:
    """Measures a model with reconstructions spliced in.

    Args:
      loss_fn: Takes what replaces the activations `x`, or None to leave them, and returns the loss of each row, [n], or
        one mean loss.
      x: Activations, [n, ..., d_in].
      recon: Their reconstructions, of the same shape.
      mean: What mean ablation puts in, [d_in]; None for the mean of `x`.

    Returns:
      The keys of `LossRecovered`.

    Raises:
      UserError: a loss is not finite, or there are no rows.
    """
    x = np.asarray(x)
    mean = x.reshape(-1, x.shape[-1]).mean(axis=0, dtype=np.float64) if mean is None else mean
    replaced = {
        "clean": None,
        "spliced": recon,
        "zero": np.zeros_like(x),
        "mean": np.broadcast_to(np.asarray(mean, x.dtype), x.shape),
    }
    losses = {name: np.atleast_1d(np.asarray(loss_fn(activation))) for name, activation in replaced.items()}
    return over(LossRecovered(), LossBatch(**losses))
