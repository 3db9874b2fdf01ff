r"""Identifiability: does a representation hold the latents that made the data, up to a linear map?

A linear map with intercept is fitted to the train rows and judged on the test rows:

.. math:: R^2_j = 1 - \frac{\sum_i (z_{ij} - \hat z_{ij})^2}{\sum_i (z_{ij} - \bar z_j)^2},\qquad
   \mathrm{orthogonality\_mae} = \mathrm{mean}_j \left|\frac{s_j}{\bar s} - 1\right|,\qquad
   \mathrm{ce\_gap} = \mathrm{CE} - \mathrm{CE}_\mathrm{Bayes}

where s are the singular values of the map without intercept. Read an R2 beside those of the network's input and of the
untrained network: an input that is nearly linear in the latents proves nothing. The theory concerns the global
optimum, so `ce_gap` belongs beside it.

Sources:
  Reizinger et al., Cross-entropy is all you need to invert the data generating process, 2024 (arXiv:2410.21869).
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from saejax.errors import UserError
from saejax.evals import metric
from saejax.lab.metrics import least_squares, rows
from saejax.lab.metrics.least_squares import Moments


@struct.dataclass
class ProbeBatch:
    """Representations and the latents behind them.

    Attributes:
      h: Representations, [b, m].
      z: True latents, [b, q].
      test: Whether the row judges (1) or trains (0) the probe, [b] bool or integers.
      row_id: Distinct for every row, [b] integers.
      weight: 1 for a real row, 0 for padding, [b] float32.
    """

    shared: ClassVar[tuple[str, ...]] = ()

    h: rows.Rows
    z: rows.Rows
    test: rows.Rows
    row_id: rows.Rows
    weight: rows.Rows = None


@struct.dataclass
class ProbeState:
    """Moments of rows [h, z, sign * z], float64.

    Attributes:
      train: Of the rows that train the probe.
      test: Of those that judge it.
      m: Width of h, static.
      q: Number of latents, static.
    """

    train: Moments
    test: Moments
    m: int = struct.field(pytree_node=False)
    q: int = struct.field(pytree_node=False)


@metric.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearProbe(metric.Metric):
    """R2 of a linear probe, held out, and how far its map is from orthogonal.

    The moments are summed in float64 on the host: normal equations square the condition of h, which float32 would not
    survive.
    """

    name: ClassVar[str] = "linear_probe"
    batch_type: ClassVar[type] = ProbeBatch
    on_host: ClassVar[bool] = True
    ridge: float = 0.0
    """Penalty on the squared map, in units of the mean variance of h; 0 or more, 0 for least squares."""
    seed: int = 0
    """Of the signs of the control and of the random maps."""

    def init(self, batch: ProbeBatch) -> ProbeState:
        m, q = batch.h.shape[-1], batch.z.shape[-1]
        return ProbeState(train=least_squares.none(m + 2 * q), test=least_squares.none(m + 2 * q), m=m, q=q)

    def update(self, state: ProbeState, batch: ProbeBatch) -> ProbeState:
        real, test = np.asarray(batch.weight) > 0, np.asarray(batch.test) > 0
        z = np.asarray(batch.z, np.float64)
        # Signs by row id turn the latents into noise of the same size: what the probe scores on them is chance.
        sign = 1.0 - 2.0 * (rows.hashed(np.asarray(batch.row_id), self.seed) >> np.uint32(31))
        joint = np.concatenate([np.asarray(batch.h, np.float64), z, sign[:, None] * z], axis=1)
        train, held_out = least_squares.moments(joint[real & ~test]), least_squares.moments(joint[real & test])
        return self.merge(state, dataclasses.replace(state, train=train, test=held_out))

    def merge(self, a: ProbeState, b: ProbeState) -> ProbeState:
        return dataclasses.replace(
            a, train=least_squares.merge(a.train, b.train), test=least_squares.merge(a.test, b.test)
        )

    def compute(self, state: ProbeState) -> dict[str, float | np.ndarray]:
        train, test, m, q = state.train, state.test, state.m, state.q
        if not train.rows or not test.rows:
            raise UserError(
                f"test must mark some rows and leave some to train on, got {int(test.rows)} test rows and "
                f"{int(train.rows)} train rows"
            )
        weights, intercept = least_squares.fit(train, m, ridge=self.ridge)
        scores = least_squares.r2(test, weights, intercept)
        singular = np.linalg.svd(least_squares.fit_through_origin(train, m)[:, :q], compute_uv=False)
        return {
            "probe_r2": rows.known_mean(scores[:q]),
            "probe_r2_chance": rows.known_mean(scores[q:]),
            "probe_r2_train": rows.known_mean(least_squares.r2(train, weights, intercept)[:q]),
            "probe_r2_per_latent": scores[:q],
            "orthogonality_mae": _mae(singular),
            "orthogonality_mae_chance": self._mae_of_random_maps(m, q),
            "probe_singular_values": singular,
        }

    def _mae_of_random_maps(self, m: int, q: int) -> float:
        """Mean over 32 Gaussian maps of the same shape."""
        rng = np.random.default_rng(self.seed)
        maps = (rng.standard_normal((m, q)) for _ in range(32))
        return float(np.mean([_mae(np.linalg.svd(a, compute_uv=False)) for a in maps]))

    def definitions(self) -> dict[str, str]:
        penalty = f"ridge {self.ridge}" if self.ridge else "least squares"
        return {
            "probe_r2": f"Linear map with intercept ({penalty}) from h to z, fitted to the train rows: mean over "
            "latents of 1 - squared error / squared deviation from the mean, both over the test rows; latents that do "
            "not vary are left out.",
            "probe_r2_chance": "Control: as probe_r2, for z with a random sign on every row, fitted alike.",
            "probe_r2_train": "As probe_r2, over the train rows.",
            "probe_r2_per_latent": "For each latent, the term of probe_r2.",
            "orthogonality_mae": "Mean of |s / mean s - 1| over the singular values s of the least-squares map without "
            "intercept from h to z; 0 for a scaled orthogonal map.",
            "orthogonality_mae_chance": "Control: as orthogonality_mae, mean over 32 Gaussian maps of the same shape.",
            "probe_singular_values": "Singular values of that map, largest first.",
        }


@struct.dataclass
class ClassBatch:
    """A classifier's logits, and those of the best one.

    Attributes:
      logits: Of the classifier, [b, n_classes] float32.
      bayes_logits: Of the posterior under the true process, up to a constant for each row, [b, n_classes] float32.
      label: [b] int32.
      weight: 1 for a real row, 0 for padding, [b] float32.
    """

    shared: ClassVar[tuple[str, ...]] = ()

    logits: rows.Rows
    bayes_logits: rows.Rows
    label: rows.Rows
    weight: rows.Rows = None


@struct.dataclass
class ClassState:
    """Sums over rows: nats and hits of the classifier and of the best one, [2] each; rows of each label [n_classes]."""

    nats: jax.Array
    hits: jax.Array
    labels: jax.Array


@metric.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class CrossEntropyGap(metric.Metric):
    """Distance of a classifier from the best possible one, in nats."""

    name: ClassVar[str] = "cross_entropy_gap"
    batch_type: ClassVar[type] = ClassBatch

    def init(self, batch: ClassBatch) -> ClassState:
        metric.same_width(logits=batch.logits, bayes_logits=batch.bayes_logits)
        return ClassState(nats=jnp.zeros(2), hits=jnp.zeros(2), labels=jnp.zeros(batch.logits.shape[-1]))

    def update(self, state: ClassState, batch: ClassBatch) -> ClassState:
        label, weight = jnp.asarray(batch.label, jnp.int32), jnp.asarray(batch.weight)
        nats, hits = [], []
        for logits in (batch.logits, batch.bayes_logits):
            own = jnp.take_along_axis(jax.nn.log_softmax(logits), label[:, None], axis=-1)[:, 0]
            nats.append(metric.total(-own, weight))
            hits.append(metric.total((jnp.argmax(logits, axis=-1) == label).astype(jnp.float32), weight))
        counts = jnp.zeros_like(state.labels).at[label].add((weight > 0).astype(jnp.float32))
        return self.merge(state, ClassState(nats=jnp.stack(nats), hits=jnp.stack(hits), labels=counts))

    def merge(self, a: ClassState, b: ClassState) -> ClassState:
        return jax.tree.map(lambda p, q: p + q, a, b)

    def compute(self, state: ClassState) -> dict[str, float | np.ndarray]:
        counts = np.asarray(state.labels, np.float64)
        share = counts / counts.sum()
        ce, bayes = (metric.ratio(s, counts.sum()) for s in np.asarray(state.nats))
        hits, bayes_hits = (metric.ratio(s, counts.sum()) for s in np.asarray(state.hits))
        return {
            "ce": ce,
            "ce_bayes": bayes,
            "ce_gap": ce - bayes,
            "ce_chance": float(-np.sum(share * np.log(np.where(share > 0, share, 1.0)))),
            "accuracy": hits,
            "accuracy_bayes": bayes_hits,
            "accuracy_chance": float(share.max()),
        }

    def definitions(self) -> dict[str, str]:
        return {
            "ce": "Mean over rows of -ln softmax(logits)[label], in nats.",
            "ce_bayes": "As ce, for the posterior under the true process.",
            "ce_gap": "ce - ce_bayes, in nats; 0 at the global optimum up to sampling.",
            "ce_chance": "Entropy in nats of the frequencies of the labels: ce of knowing only them.",
            "accuracy": "Share of rows whose largest logit is that of the label.",
            "accuracy_bayes": "As accuracy, for the posterior under the true process.",
            "accuracy_chance": "Share of the most frequent label.",
        }


def vmf_logits(
    z: Float[Array, "b n"] | np.ndarray, class_vectors: Float[Array, "n_classes n"] | np.ndarray, kappa: float
) -> Float[Array, "b n_classes"]:
    """Posterior logits where z is von Mises-Fisher around one of equally likely class vectors: kappa <v_c, z>.

    Args:
      z: Latents on the unit sphere.
      class_vectors: Unit vectors.
      kappa: Concentration, above 0.

    Returns:
      Logits, for `ClassBatch.bayes_logits`.
    """
    return kappa * jnp.matmul(z, class_vectors.T, precision=jax.lax.Precision.HIGHEST)


def _mae(singular: np.ndarray) -> float:
    """Mean distance from 1 of singular values over their mean."""
    mean = singular.mean()
    return float(np.abs(singular / mean - 1.0).mean()) if mean > 0 else float("nan")
