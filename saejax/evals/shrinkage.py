r"""Shrinkage metrics: how much too short reconstructions are, and the scale of each latent that would mend it.

Three different numbers for the same codes; none is called just "shrinkage":

.. math:: \gamma = \frac{\sum_i \|\hat x_i\|^2}{\sum_i \langle x_i, \hat x_i\rangle},\qquad
   \mathrm{l2\_ratio} = \mathrm{mean}_i \frac{\|\hat x_i\|}{\|x_i\|},\qquad
   \mathrm{gain}_j = 1 + \frac{\sum_i f_{ij} \langle x_i - \hat x_i, d_j\rangle}{\sum_i f_{ij}^2 \|d_j\|^2}

An unbiased imperfect reconstruction has gamma 1 and an l2_ratio below 1.

Sources:
  Gao et al., Scaling and evaluating sparse autoencoders, 2024 (arXiv:2406.04093), section 5.1: refinement.
  Rajamanoharan et al., Improving dictionary learning with gated sparse autoencoders, 2024 (arXiv:2404.16014): gamma.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from saejax.evals import metric
from saejax.sae import base


@struct.dataclass
class NormState:
    """Sums over rows, scalars; `latent_part` is `recon - b_dec`, what the latents (and a skip) add.

    Attributes:
      recon_recon: Sum of |recon|^2.
      x_recon: Sum of <x, recon>.
      part_part: Sum of |latent_part|^2.
      rest_part: Sum of <x - b_dec, latent_part>.
      norm_ratio: Sum of |recon| / |x|.
      nonzero: Rows with |x| > 0.
    """

    recon_recon: jax.Array
    x_recon: jax.Array
    part_part: jax.Array
    rest_part: jax.Array
    norm_ratio: jax.Array
    nonzero: jax.Array


@metric.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Norms(metric.Metric):
    """Length of reconstructions against that of the activations."""

    name: ClassVar[str] = "norms"

    def init(self, batch: metric.EvalBatch) -> NormState:
        return NormState(*(jnp.zeros(()) for _ in range(6)))

    def update(self, state: NormState, batch: metric.EvalBatch) -> NormState:
        x, recon, weight = batch.x, batch.recon, batch.weight
        part, rest = recon - batch.b_dec[None, :], x - batch.b_dec[None, :]
        norm = jnp.linalg.norm(x, axis=-1)
        nonzero = norm > 0
        norm_ratio = jnp.where(nonzero, jnp.linalg.norm(recon, axis=-1) / jnp.where(nonzero, norm, 1.0), 0.0)
        this = NormState(
            recon_recon=metric.total(metric.dot(recon, recon), weight),
            x_recon=metric.total(metric.dot(x, recon), weight),
            part_part=metric.total(metric.dot(part, part), weight),
            rest_part=metric.total(metric.dot(rest, part), weight),
            norm_ratio=metric.total(norm_ratio, weight),
            nonzero=metric.total(nonzero.astype(jnp.float32), weight),
        )
        return self.merge(state, this)

    def merge(self, a: NormState, b: NormState) -> NormState:
        return jax.tree.map(lambda p, q: p + q, a, b)

    def compute(self, state: NormState) -> dict[str, float | np.ndarray]:
        return {
            "relative_reconstruction_bias": metric.ratio(state.recon_recon, state.x_recon),
            "l2_ratio": metric.ratio(state.norm_ratio, state.nonzero),
            "gain_shared": metric.ratio(state.rest_part, state.part_part),
        }

    def definitions(self) -> dict[str, str]:
        return {
            "relative_reconstruction_bias": "Sum over all rows of |recon|^2 divided by the sum over all rows of "
            "<x, recon>; 1 is unbiased, below 1 is too short.",
            "l2_ratio": "Mean over rows of |recon| / |x|, rows with x = 0 left out; below 1 even for an unbiased but "
            "imperfect reconstruction.",
            "gain_shared": "The one factor on all latents (and on the linear map of a transcoder with skip) that "
            "minimises the squared error: sum of <x - b_dec, recon - b_dec> divided by the sum of |recon - b_dec|^2.",
        }


@metric.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class NormSlope(metric.Metric):
    """The straight line of |recon| on |x|: whether long rows are shortened more than short ones."""

    name: ClassVar[str] = "norm_slope"

    def init(self, batch: metric.EvalBatch) -> metric.Scatter:
        return metric.Scatter.none(2)

    def update(self, state: metric.Scatter, batch: metric.EvalBatch) -> metric.Scatter:
        norms = jnp.stack([jnp.linalg.norm(batch.x, axis=-1), jnp.linalg.norm(batch.recon, axis=-1)], axis=-1)
        return self.merge(state, metric.Scatter.of(norms, batch.weight))

    def merge(self, a: metric.Scatter, b: metric.Scatter) -> metric.Scatter:
        return a.merged(b)

    def compute(self, state: metric.Scatter) -> dict[str, float | np.ndarray]:
        slope = metric.ratio(state.scatter[0, 1], state.scatter[0, 0])
        return {"norm_slope": slope, "norm_intercept": float(state.mean[1]) - slope * float(state.mean[0])}

    def definitions(self) -> dict[str, str]:
        return {
            "norm_slope": "Slope of the least-squares line of |recon| on |x| over all rows, with an intercept; 1 keeps "
            "differences of length; undefined where all rows have the same length.",
            "norm_intercept": "Intercept of that line, in units of the data; 0 with a slope of 1 is no shrinkage.",
        }


@struct.dataclass
class GainState:
    """Sums over rows for each latent, [d_sae]: firing times projected error, and firing squared times |d|^2."""

    pull: jax.Array
    power: jax.Array


@metric.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Gain(metric.Metric):
    """By what factor each latent, the others held fixed, should be scaled to minimise the squared error."""

    name: ClassVar[str] = "gain"

    def init(self, batch: metric.EvalBatch) -> GainState:
        return GainState(pull=jnp.zeros(batch.W_dec.shape[0]), power=jnp.zeros(batch.W_dec.shape[0]))

    def update(self, state: GainState, batch: metric.EvalBatch) -> GainState:
        error = jnp.where(batch.weight[:, None] > 0, batch.x - batch.recon, 0.0)
        length = jnp.sum(batch.W_dec**2, axis=-1)
        pull, squares = _pull(batch.encoding, error, batch.W_dec, batch.weight)
        return self.merge(state, GainState(pull=pull, power=squares * length))

    def merge(self, a: GainState, b: GainState) -> GainState:
        return GainState(pull=a.pull + b.pull, power=a.power + b.power)

    def compute(self, state: GainState) -> dict[str, float | np.ndarray]:
        pull, power = np.asarray(state.pull), np.asarray(state.power)
        gain = 1.0 + np.divide(pull, power, out=np.full(pull.shape, np.nan), where=power > 0)
        known = gain[power > 0]
        return {"gain_median": float(np.median(known)) if known.size else float("nan"), "gain": gain}

    def definitions(self) -> dict[str, str]:
        return {
            "gain": "For each latent, the factor on its activation that minimises the squared error over all rows with "
            "every other latent held fixed; above 1 where the latent is shrunk, undefined where it never fires.",
            "gain_median": "Median of gain over the latents that fire.",
        }


@struct.dataclass
class RefitBatch:
    """Latents of an SAE beside those refitted on the same support, `sparse_coding.refit` for one.

    Attributes:
      latents: As encoded, [b, d_sae] float32.
      refit: The same latents after least squares on their support, [b, d_sae] float32.
      weight: 1 for a real row, 0 for padding, [b] float32.
    """

    shared: ClassVar[tuple[str, ...]] = ()

    latents: jax.Array
    refit: jax.Array
    weight: jax.Array | None = None


@struct.dataclass
class RefinementState:
    """Sums over rows for each latent, [d_sae]: as encoded, and refitted."""

    encoded: jax.Array
    refit: jax.Array


@metric.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class RefinementRatio(metric.Metric):
    r"""Ratio of each latent to its refitted activation: \(\sum_i \hat z_{ij} / \sum_i \hat z^{refit}_{ij}\).

    Source: Gao et al., Scaling and evaluating sparse autoencoders, 2024, section 5.1 (activations refined on a fixed
    support).
    """

    name: ClassVar[str] = "refinement_ratio"
    batch_type: ClassVar[type] = RefitBatch

    def init(self, batch: RefitBatch) -> RefinementState:
        metric.same_width(latents=batch.latents, refit=batch.refit)
        zeros = jnp.zeros(batch.latents.shape[-1])
        return RefinementState(encoded=zeros, refit=zeros)

    def update(self, state: RefinementState, batch: Any) -> RefinementState:
        real = batch.weight[:, None] > 0
        encoded, refit = (jnp.sum(jnp.where(real, z, 0.0), axis=0) for z in (batch.latents, batch.refit))
        return self.merge(state, RefinementState(encoded=encoded, refit=refit))

    def merge(self, a: RefinementState, b: RefinementState) -> RefinementState:
        return RefinementState(encoded=a.encoded + b.encoded, refit=a.refit + b.refit)

    def compute(self, state: RefinementState) -> dict[str, float | np.ndarray]:
        encoded, refit = np.asarray(state.encoded), np.asarray(state.refit)
        each = np.divide(encoded, refit, out=np.full(refit.shape, np.nan), where=refit > 0)
        known = each[refit > 0]
        return {
            "refinement_ratio_shared": metric.ratio(encoded.sum(), refit.sum()),
            "refinement_ratio_median": float(np.median(known)) if known.size else float("nan"),
            "refinement_ratio": each,
        }

    def definitions(self) -> dict[str, str]:
        return {
            "refinement_ratio": "For each latent, the sum over rows of its activation divided by the sum after "
            "refitting all active latents of a row to the data; below 1 is shrunk, undefined where the refit sums "
            "to 0.",
            "refinement_ratio_median": "Median of refinement_ratio over the latents where it is defined.",
            "refinement_ratio_shared": "The same ratio of sums over all latents together.",
        }


def _pull(
    encoding: base.Encoding, error: Float[Array, "b d_in"], W_dec: Float[Array, "d_sae d_in"], weight: Float[Array, "b"]
) -> tuple[Float[Array, "d_sae"], Float[Array, "d_sae"]]:
    """For each latent the sums over rows of f <error, d> and of f^2; `error` is 0 on padding."""
    real = weight[:, None] > 0
    if encoding.latents is not None:
        latents = jnp.where(real, encoding.latents, 0.0)
        projected = jnp.matmul(error, W_dec.T, precision=jax.lax.Precision.HIGHEST)
        return jnp.sum(latents * projected, axis=0), jnp.sum(latents**2, axis=0)
    assert encoding.values is not None and encoding.indices is not None
    values = jnp.where(real, encoding.values, 0.0)
    # One slot at a time: gathering all k decoder rows of a batch at once would take k times its memory.
    projected = jax.lax.map(lambda slot: metric.dot(error, W_dec[slot]), encoding.indices.T).T
    zeros = jnp.zeros(encoding.d_sae)
    return zeros.at[encoding.indices].add(values * projected), zeros.at[encoding.indices].add(values**2)
