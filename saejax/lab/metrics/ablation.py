r"""Ablation metrics: targeted perturbation of a concept's latents, removal of spurious concepts, loss recovered.

Targeted perturbation removes the `n` latents that tell a probe most about a concept: x minus their part of the
reconstruction. A good dictionary then loses this concept and no other:

.. math:: a_{cj} = (\bar f_j^{c} - \bar f_j^{\neg c}) \langle d_j, w_c \rangle, \qquad
   \mathrm{tpp} = \mathrm{mean}_c\, \Delta_{cc} - \mathrm{mean}_{c \neq p}\, \Delta_{cp}

where `Delta_cp` is the accuracy that probe p loses when concept c is ablated. Removal of a spurious concept: (after -
before) / (oracle - before). Loss recovered: (L_ablated - L_spliced) / (L_ablated - L_clean).

Sources:
  Karvonen et al., Evaluating sparse autoencoders on targeted concept erasure tasks, 2024 (arXiv:2411.18895); Marks et
  al., Sparse feature circuits, 2024 (arXiv:2403.19647).
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from saejax.errors import UserError
from saejax.evals import metric
from saejax.evals.result import EvalResult
from saejax.lab.metrics import rows
from saejax.lab.metrics.over import over


@struct.dataclass
class ConceptBatch:
    """Activations, their latents, concepts, and linear probes of these.

    Attributes:
      x: Activations, [b, d_in] float32.
      latents: [b, d_sae] float32.
      labels: Whether the row has each concept, [b, n_concepts] of 0 and 1.
      W_dec: What one unit of each latent adds to the reconstruction, [d_sae, d_in] float32.
      probe_weight: Probe of each concept, [n_concepts, d_in] float32; it says yes where <x, weight> + bias > 0.
      probe_bias: [n_concepts] float32.
      ablated: Latents that each ablation takes out, [n_ablations, n] int32; -1 for none.
      control: As many latents chosen at random, [n_ablations, n] int32; -1 for none.
      weight: 1 for a real row, 0 for padding, [b] float32.
    """

    shared: ClassVar[tuple[str, ...]] = ("W_dec", "probe_weight", "probe_bias", "ablated", "control")

    x: rows.Rows
    latents: rows.Rows
    labels: rows.Rows
    W_dec: rows.Rows
    probe_weight: rows.Rows
    probe_bias: rows.Rows
    ablated: rows.Rows = None
    control: rows.Rows = None
    weight: rows.Rows = None


@struct.dataclass
class DifferenceState:
    """Sums over rows with (0) and without (1) each concept: of latents [2, n_concepts, d_sae], rows [2, n_concepts]."""

    latents: jax.Array
    rows: jax.Array


@metric.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class MeanDifference(metric.Metric):
    """Difference of each latent's mean with and without a concept; it selects the latents to ablate."""

    name: ClassVar[str] = "mean_difference"
    batch_type: ClassVar[type] = ConceptBatch

    def init(self, batch: ConceptBatch) -> DifferenceState:
        concepts, d_sae = batch.labels.shape[-1], batch.latents.shape[-1]
        return DifferenceState(latents=jnp.zeros((2, concepts, d_sae)), rows=jnp.zeros((2, concepts)))

    def update(self, state: DifferenceState, batch: ConceptBatch) -> DifferenceState:
        real = (batch.weight > 0)[:, None]
        latents = jnp.where(real, batch.latents, 0.0)
        sides = jnp.stack([(batch.labels > 0) & real, (batch.labels <= 0) & real]).astype(jnp.float32)
        sums = jnp.einsum("sbc,bj->scj", sides, latents, precision=jax.lax.Precision.HIGHEST)
        return self.merge(state, DifferenceState(latents=sums, rows=jnp.sum(sides, axis=1)))

    def merge(self, a: DifferenceState, b: DifferenceState) -> DifferenceState:
        return jax.tree.map(lambda p, q: p + q, a, b)

    def compute(self, state: DifferenceState) -> dict[str, float | np.ndarray]:
        n = np.asarray(state.rows)[:, :, None]
        means = np.divide(np.asarray(state.latents), n, out=np.full(state.latents.shape, np.nan), where=n > 0)
        difference = means[0] - means[1]
        return {
            "mean_difference": difference,
            "concepts": float((~np.isnan(difference).any(axis=1)).sum()),
        }

    def definitions(self) -> dict[str, str]:
        return {
            "mean_difference": "For each concept and latent, the mean activation over rows with the concept - that "
            "over rows without; undefined where there are none of either.",
            "concepts": "Number of concepts that some rows have and some have not.",
        }


@struct.dataclass
class AblationState:
    """Sums over rows of right answers of the probes.

    Attributes:
      before: With x as it is, [n_concepts].
      after: With latents taken out, [n_ablations, n_concepts].
      control: With random ones taken out, [n_ablations, n_concepts].
      positive: Rows with the concept, [n_concepts].
      rows: Number of rows.
    """

    before: jax.Array
    after: jax.Array
    control: jax.Array
    positive: jax.Array
    rows: jax.Array


@metric.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Ablation(metric.Metric):
    """Accuracy of every probe before and after latents are taken out of the activations."""

    name: ClassVar[str] = "ablation"
    batch_type: ClassVar[type] = ConceptBatch

    def init(self, batch: ConceptBatch) -> AblationState:
        if batch.ablated is None or batch.control is None:
            raise UserError("ablated and control must name the latents to take out, got None")
        concepts, ablations = batch.labels.shape[-1], batch.ablated.shape[0]
        wide, table = jnp.zeros(concepts), jnp.zeros((ablations, concepts))
        return AblationState(before=wide, after=table, control=table, positive=wide, rows=jnp.zeros(()))

    def update(self, state: AblationState, batch: ConceptBatch) -> AblationState:
        highest = jax.lax.Precision.HIGHEST
        real, answer = (batch.weight > 0)[:, None], batch.labels > 0
        said = jnp.matmul(batch.x, batch.probe_weight.T, precision=highest) + batch.probe_bias[None, :]
        told = jnp.matmul(batch.W_dec, batch.probe_weight.T, precision=highest)

        def hits(logits: Float[Array, "b c"]) -> Float[Array, "c"]:
            return jnp.sum(jnp.where(real, (logits > 0) == answer, False).astype(jnp.float32), axis=0)

        def without(chosen: Int[Array, "n"]) -> Float[Array, "c"]:
            # A probe is linear: what a latent adds to its logit is all that has to be taken away.
            kept = jnp.where(chosen[None, :] >= 0, batch.latents[:, chosen], 0.0)
            return hits(said - jnp.matmul(kept, told[chosen], precision=highest))

        this = AblationState(
            before=hits(said),
            after=jax.lax.map(without, jnp.asarray(batch.ablated, jnp.int32)),
            control=jax.lax.map(without, jnp.asarray(batch.control, jnp.int32)),
            positive=jnp.sum((answer & real).astype(jnp.float32), axis=0),
            rows=jnp.sum(real.astype(jnp.float32)),
        )
        return self.merge(state, this)

    def merge(self, a: AblationState, b: AblationState) -> AblationState:
        return jax.tree.map(lambda p, q: p + q, a, b)

    def compute(self, state: AblationState) -> dict[str, float | np.ndarray]:
        n = float(state.rows)
        before, after, control = (np.asarray(v) / n for v in (state.before, state.after, state.control))
        share = np.asarray(state.positive) / n
        values: dict[str, float | np.ndarray] = {
            "probe_accuracy": float(before.mean()),
            "probe_accuracy_chance": float(np.maximum(share, 1 - share).mean()),
            "probe_accuracy_per_concept": before,
            "ablated_accuracy": after,
            "ablated_accuracy_control": control,
        }
        if len(after) == len(before):
            for suffix, table in (("", after), ("_control", control)):
                lost, own = before[None, :] - table, np.eye(len(before), dtype=bool)
                values[f"tpp_intended{suffix}"] = float(lost[own].mean())
                values[f"tpp_unintended{suffix}"] = float(lost[~own].mean()) if len(before) > 1 else 0.0
                values[f"tpp{suffix}"] = values[f"tpp_intended{suffix}"] - values[f"tpp_unintended{suffix}"]
        return values

    def definitions(self) -> dict[str, str]:
        texts = {
            "probe_accuracy": "Share of rows that a probe answers rightly, mean over probes.",
            "probe_accuracy_chance": "Share of the more frequent answer, mean over probes.",
            "probe_accuracy_per_concept": "For each probe, the term of probe_accuracy.",
            "ablated_accuracy": "For each ablation (row) and probe (column), the share of rows answered rightly with "
            "what the ablated latents add taken out of x.",
            "ablated_accuracy_control": "Control: as ablated_accuracy, with as many latents chosen at random.",
        }
        for suffix, which in {"": "ablation c", "_control": "random latents in the place of ablation c"}.items():
            texts |= {
                f"tpp{suffix}": f"tpp_intended{suffix} - tpp_unintended{suffix}; needs one ablation per probe.",
                f"tpp_intended{suffix}": f"Accuracy that probe c loses to {which}, mean over c.",
                f"tpp_unintended{suffix}": f"Accuracy that probe p loses to {which}, mean over p other than c.",
            }
        return texts


def most_telling(
    mean_difference: Float[np.ndarray, "n_concepts d_sae"],
    W_dec: Float[np.ndarray, "d_sae d_in"],
    probe_weight: Float[np.ndarray, "n_concepts d_in"],
    n: int,
) -> Int[np.ndarray, "n_concepts n"]:
    """Returns for each concept the latents of largest positive attribution, -1 where there are fewer than `n`.

    Raises:
      UserError: `n` is not between 1 and d_sae.
    """
    if not 1 <= n <= len(W_dec):
        raise UserError(f"n must be between 1 and d_sae = {len(W_dec)} latents, got {n}")
    attribution = np.nan_to_num(mean_difference) * (np.asarray(probe_weight) @ np.asarray(W_dec).T)
    chosen = np.argsort(-attribution, axis=1, kind="stable")[:, :n]
    return np.where(np.take_along_axis(attribution, chosen, axis=1) > 0, chosen, -1).astype(np.int32)


def targeted_perturbation(
    train: ConceptBatch, test: ConceptBatch, *, n: int = 10, seed: int = 0, mesh: Mesh | None = None
) -> EvalResult:
    """Ablates for each concept the latents chosen on some rows and measures all probes on others.

    Args:
      train: Rows that choose the latents; `ablated` and `control` are not looked at.
      test: Rows on which the probes answer, with the same probes and decoder.
      n: Latents to take out for each concept.
      seed: Of the random latents of the control, drawn from those that fire in `train`.
      mesh: Splits the rows; None for the default device.

    Returns:
      The keys of `Ablation`.

    Raises:
      UserError: see `most_telling`; or no rows.
    """
    difference = over(MeanDifference(), train, mesh=mesh).arrays["mean_difference"]
    ablated = most_telling(difference, test.W_dec, test.probe_weight, n)
    alive = np.flatnonzero((np.asarray(train.latents) != 0).any(axis=0))
    rng = np.random.default_rng(seed)
    control = np.full_like(ablated, -1)
    for row in control:
        row[: min(n, len(alive))] = rng.permutation(alive)[:n]
    control = np.where(ablated >= 0, control, -1)
    return over(Ablation(), dataclasses.replace(test, ablated=ablated, control=control), mesh=mesh)


def spurious_removal(before: float, after: float, oracle: float) -> float:
    """Returns the share of the accuracy lost to a spurious concept that ablating its latents brings back.

    Args:
      before: Accuracy, on balanced rows, of a probe trained where the concept goes along with the label.
      after: The same with the latents of the spurious concept taken out.
      oracle: Accuracy of a probe trained on balanced rows.

    Returns:
      (after - before) / (oracle - before): 1 is the oracle, 0 no help, negative is harm; NaN where nothing was lost.

    Examples:
      >>> spurious_removal(0.5, 0.75, 1.0)
      0.5
    """
    return metric.ratio(after - before, oracle - before)
