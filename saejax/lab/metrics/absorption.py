r"""Absorption: a latent stays off where its concept is present, because another latent took over its direction.

Two forms. With known features (a parent and its children): how often the parent's latent is off while parent and child
are on, beside the same where the parent is alone. With a probe \(p\) for a concept, of unit length, and the latents
\(M\) that stand for it: the share of the probe's projection that other latents carry. With
\(a_i = \hat z_i \langle w_i, p\rangle\), \(P = \langle x, p\rangle\), \(m = \sum_{i \in M} a_i\) and \(A\) the sum of
the at most 3 largest positive \(a_i\), \(i \notin M\), whose decoder row has cosine at least 0.1 with p:

.. math:: \begin{cases} 0 & m \ge P \text{ or } A / P < 0.4 \\ 1 & m \le 0 \\
   \frac{A'}{A' + m},\ A' = \min(A, P - m) & \text{else} \end{cases}

Sources:
  Chanin et al., A is for absorption, 2024 (arXiv:2409.14507); SAEBench (Karvonen et al., 2025), for the fraction.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float

from saejax.errors import UserError
from saejax.evals import metric


@struct.dataclass
class FamilyBatch:
    """Parents and their children, true features both, and the latents that stand for the parents.

    Attributes:
      parent: Whether each parent is on, [b, p] bool or 0/1.
      child: Whether one of its children is on, [b, p].
      latent: The latent matched to the parent, [b, p] float32; on above 0.
      weight: 1 for a real row, 0 for padding, [b] float32.
    """

    shared: ClassVar[tuple[str, ...]] = ()

    parent: jax.Array
    child: jax.Array
    latent: jax.Array
    weight: jax.Array | None = None


@struct.dataclass
class FamilyState:
    """Rows for each parent, [p]: with a child, of these the latent off, alone, of these the latent off."""

    with_child: jax.Array
    off_with_child: jax.Array
    alone: jax.Array
    off_alone: jax.Array


@metric.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class ParentAbsorption(metric.Metric):
    """Share of rows where a parent's latent is off: a child is on, against the parent alone."""

    name: ClassVar[str] = "parent_absorption"
    batch_type: ClassVar[type] = FamilyBatch

    def init(self, batch: FamilyBatch) -> FamilyState:
        metric.same_width(parent=batch.parent, child=batch.child, latent=batch.latent)
        return FamilyState(*(jnp.zeros(batch.parent.shape[-1]) for _ in range(4)))

    def update(self, state: FamilyState, batch: Any) -> FamilyState:
        parent, child = (batch.parent > 0) & (batch.weight[:, None] > 0), batch.child > 0
        off = ~(batch.latent > 0)
        events = (parent & child, parent & child & off, parent & ~child, parent & ~child & off)
        return self.merge(state, FamilyState(*(jnp.sum(e, axis=0, dtype=jnp.float32) for e in events)))

    def merge(self, a: FamilyState, b: FamilyState) -> FamilyState:
        return jax.tree.map(lambda p, q: p + q, a, b)

    def compute(self, state: FamilyState) -> dict[str, float | np.ndarray]:
        with_child, off = np.asarray(state.with_child), np.asarray(state.off_with_child)
        return {
            "absorption": metric.ratio(off.sum(), with_child.sum()),
            "missed_alone": metric.ratio(state.off_alone.sum(), state.alone.sum()),
            "absorption_by_parent": np.divide(off, with_child, out=np.full(off.shape, np.nan), where=with_child > 0),
        }

    def definitions(self) -> dict[str, str]:
        return {
            "absorption": "Share of the cases of a parent and one of its children on in which the parent's latent "
            "is off, "
            "pooled over parents.",
            "missed_alone": "The same share where the parent is on without a child: the control, what is missed "
            "anyway.",
            "absorption_by_parent": "absorption of each parent; undefined where it never met a child.",
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Criteria:
    """What counts as absorption of a concept; the defaults are SAEBench's."""

    n_absorbers: int = 3
    """Other latents counted, the largest."""
    min_cos: float = 0.1
    """Cosine with the probe from which another latent can be an absorber."""
    min_cos_full: float = 0.025
    """The same for full absorption."""
    min_share: float = 0.4
    """Share of the probe's projection that absorbers must carry."""


def absorbed(
    x: Float[Array, "b d_in"],
    latents: Float[Array, "b d_sae"],
    W_dec: Float[Array, "d_sae d_in"],
    probe: Float[Array, "d_in"],
    main: Bool[Array, "d_sae"],
    criteria: Criteria = Criteria(),
) -> tuple[Float[Array, "b"], Bool[Array, "b"]]:
    """Absorption of one concept in each row, where the concept is present in all of them.

    Args:
      x: Activations (what the SAE reconstructs, its decoder bias taken off if it has one).
      latents: Codes of these rows.
      W_dec: Decoder rows, of any length.
      probe: Direction of the concept, of any length.
      main: Which latents stand for the concept.
      criteria: What counts as absorption.

    Returns:
      The fraction in [0, 1], and whether absorption is full: all main latents off, and the one latent with the largest
      projection carries at least `criteria.min_share`.

    Examples:
      >>> eye = jnp.eye(2)
      >>> W_dec, main = eye[:1].repeat(2, 0), jnp.array([True, False])
      >>> fraction, full = absorbed(eye[:1], jnp.array([[0.0, 1.0]]), W_dec, eye[0], main)
      >>> float(fraction[0]), bool(full[0])
      (1.0, True)
    """
    high = jax.lax.Precision.HIGHEST
    probe = probe / jnp.maximum(jnp.linalg.norm(probe), 1e-30)
    along = jnp.matmul(W_dec, probe, precision=high)
    cos = along / jnp.maximum(jnp.linalg.norm(W_dec, axis=-1), 1e-30)
    total = jnp.matmul(x, probe, precision=high)
    parts = latents * along[None, :]
    can_absorb = (~main & (cos >= criteria.min_cos))[None, :] & (parts > 0)
    largest, _ = jax.lax.top_k(jnp.where(can_absorb, parts, 0.0), min(criteria.n_absorbers, parts.shape[-1]))
    absorbers, own = jnp.sum(largest, axis=-1), jnp.sum(jnp.where(main[None, :], parts, 0.0), axis=-1)
    positive = jnp.where(total > 0, total, 1.0)
    taken = jnp.minimum(absorbers, total - own)
    shared = taken / jnp.where(taken + own > 0, taken + own, 1.0)
    none = (total <= 0) | (own >= total) | (absorbers / positive < criteria.min_share)
    fraction = jnp.where(none, 0.0, jnp.where(own <= 0, 1.0, shared))
    top = jnp.argmax(parts, axis=-1)
    silent = ~jnp.any(main[None, :] & (latents > 0), axis=-1)
    top_part = jnp.take_along_axis(parts, top[:, None], axis=-1)[:, 0]
    full = silent & (total > 0) & (cos[top] >= criteria.min_cos_full) & (top_part / positive >= criteria.min_share)
    return fraction, full


@struct.dataclass
class ProbeBatch:
    """Rows in which a concept is present.

    Attributes:
      x: Activations, [b, d_in].
      latents: Their codes, [b, d_sae].
      weight: 1 for a real row, 0 for padding, [b] float32.
      W_dec: Decoder rows, [d_sae, d_in].
      probe: Direction of the concept, [d_in].
      main: Which latents stand for it, [d_sae] bool.
    """

    shared: ClassVar[tuple[str, ...]] = ("W_dec", "probe", "main")

    x: jax.Array
    latents: jax.Array
    W_dec: jax.Array
    probe: jax.Array
    main: jax.Array
    weight: jax.Array | None = None


@struct.dataclass
class ProbeState:
    """Sums over rows, scalars."""

    fraction: jax.Array
    full: jax.Array
    missed: jax.Array
    rows: jax.Array


@metric.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeAbsorption(metric.Metric):
    """SAEBench's absorption of one concept, averaged over the rows that have it; `Criteria` has the constants."""

    name: ClassVar[str] = "probe_absorption"
    batch_type: ClassVar[type] = ProbeBatch

    def init(self, batch: Any) -> ProbeState:
        if batch.main.shape != batch.latents.shape[-1:]:
            raise UserError(f"main must have {batch.latents.shape[-1]} entries, got {list(batch.main.shape)}")
        return ProbeState(*(jnp.zeros(()) for _ in range(4)))

    def update(self, state: ProbeState, batch: Any) -> ProbeState:
        fraction, full = absorbed(batch.x, batch.latents, batch.W_dec, batch.probe, batch.main)
        missed = ~jnp.any(batch.main[None, :] & (batch.latents > 0), axis=-1)
        parts = (fraction, full.astype(jnp.float32), missed.astype(jnp.float32), jnp.ones_like(fraction))
        return self.merge(state, ProbeState(*(metric.total(part, batch.weight) for part in parts)))

    def merge(self, a: ProbeState, b: ProbeState) -> ProbeState:
        return jax.tree.map(lambda p, q: p + q, a, b)

    def compute(self, state: ProbeState) -> dict[str, float | np.ndarray]:
        return {
            "absorption_fraction": metric.ratio(state.fraction, state.rows),
            "absorption_full": metric.ratio(state.full, state.rows),
            "main_off": metric.ratio(state.missed, state.rows),
        }

    def definitions(self) -> dict[str, str]:
        return {
            "absorption_fraction": "Mean over the concept's rows of the share of the probe's projection carried by "
            "other "
            "latents (at most 3, cosine with the probe at least 0.1), 0 where they carry below 0.4 of it or the main "
            "latents carry all of it.",
            "absorption_full": "Share of the concept's rows with all main latents off and one other latent (cosine at "
            "least 0.025) carrying at least 0.4 of the projection.",
            "main_off": "Share of the concept's rows with all main latents off, absorbed or simply missed: the most "
            "that "
            "absorption_full can be.",
        }
