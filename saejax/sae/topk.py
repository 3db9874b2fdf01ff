r"""TopK: the k largest latents of a row reconstruct it; AuxK revives dead ones.

.. math:: z = \mathrm{ReLU}(\mathrm{TopK}((x - b_{dec}) W_{enc} + b_{enc})), \quad
    \hat x = z W_{dec} + b_{dec}

It needs one dense product forward; everything else touches active latents only (`kernels`). Multi-TopK adds the
squared error with 4 k latents, times `multi_topk_alpha`, so codes stay useful at other k. k may fall or rise linearly
at the start of training.

Sources:
  Gao et al., Scaling and evaluating sparse autoencoders, 2024 (arXiv:2406.04093).
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Int

from saejax.fields.resume_policy import Fixed, Free
from saejax.kernels import top_k
from saejax.sae import base


@base.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class TopK(base.Sparsifier):
    """TopK sparse autoencoder.

    Examples:
      >>> TopK(d_in=16, d_sae=64, k=999)
      Traceback (most recent call last):
      ...
      saejax.errors.UserError: sae.k must be in [1, d_sae=64], got 999
      >>> config = TopK(d_in=16, d_sae=64, k=4, k_start=24, k_anneal_steps=10)
      >>> [int(config.k_at(jnp.asarray(step))) for step in (0, 5, 10, 99)]
      [24, 14, 4, 4]
    """

    name: ClassVar[str] = "topk"
    knobs: ClassVar[tuple[str, ...]] = ("k",)

    k: Fixed[int] = 32
    """Latents kept per row, in [1, d_sae]; a row with fewer positive ones uses fewer."""
    multi_topk_alpha: Free[float] = 0.0
    """Weight of the squared error with 4 k latents, at least 0; 0 turns it off, Gao et al. use 1/8."""
    k_start: Fixed[int | None] = None
    """Latents kept at the first step, in [1, d_sae]; null keeps k throughout."""
    k_anneal_steps: Fixed[int] = 0
    """Optimiser steps over which k_start becomes k, at least 0."""

    def __post_init__(self):
        super().__post_init__()
        in_range = f"in [1, d_sae={self.d_sae}]"
        base.check(1 <= self.k <= self.d_sae, "k", f"must be {in_range}", self.k)
        base.check(self.multi_topk_alpha >= 0, "multi_topk_alpha", "must be at least 0", self.multi_topk_alpha)
        allowed = self.k_start is None or 1 <= self.k_start <= self.d_sae
        base.check(allowed, "k_start", f"must be null or {in_range}", self.k_start)
        base.check(self.k_anneal_steps >= 0, "k_anneal_steps", "must be at least 0", self.k_anneal_steps)

    @property
    def k_sparse(self):
        """Always."""
        return True

    @property
    def n_active(self):
        """k."""
        return self.k

    @property
    def anneals(self) -> bool:
        """Whether k moves in training."""
        return self.k_start is not None and self.k_start != self.k and self.k_anneal_steps > 0

    def k_at(self, step: Array) -> Int[Array, ""]:
        """Returns k after `step` optimiser steps."""
        start = self.k if self.k_start is None else self.k_start
        share = jnp.clip(step / max(self.k_anneal_steps, 1), 0.0, 1.0)
        return jnp.round(start + (self.k - start) * share).astype(jnp.int32)

    def activate(self, params, pre_acts, step=None):
        """Returns the k largest latents of each row; those below zero become 0."""
        return self.keep(*top_k.top_k(pre_acts, self.n_best(step)), step)

    def n_best(self, step):
        """Returns k at inference, the largest k of the schedule in training: it fixes the shape."""
        return self.k if step is None or not self.anneals else max(self.k, self.k_start or 1)

    def keep(self, values, indices, step):
        """Returns the best of each row; slots beyond the present k are unused."""
        encoding = base.Encoding(values=jnp.maximum(values, 0), indices=indices, d_sae=self.d_sae)
        return self._best(encoding, step) if step is not None and self.anneals else encoding

    def objective(self, params, x, target, step):
        """Returns the squared error, plus "multi_mse" times its weight."""
        if self.multi_topk_alpha == 0:
            aux = self.reconstruct(params, x, target, step)
            return aux.terms["mse"], aux
        wide = dataclasses.replace(
            self,
            k=min(4 * self.k, self.d_sae),
            k_start=None if self.k_start is None else min(4 * self.k_start, self.d_sae),
            multi_topk_alpha=0.0,
        ).reconstruct(params, x, target, step)
        # One selection serves both: the best come first.
        encoding = self._best(wide.encoding, step)
        recon = self.decode(params, encoding)
        mse, multi = jnp.mean(jnp.sum((target - recon) ** 2, axis=1)), wide.terms["mse"]
        aux = base.Aux(recon=recon, encoding=encoding, terms={"mse": mse, "multi_mse": multi})
        return mse + self.multi_topk_alpha * multi, aux

    def why_static(self, knob):
        """Refuses another k where a schedule or a second selection follows it."""
        follows = self.multi_topk_alpha > 0 or self.anneals
        return "k must not vary with multi_topk_alpha or k_start" if knob == "k" and follows else None

    def _best(self, encoding, step):
        """The first k slots of a longer selection, as many as k is at this step."""
        most = max(self.k, self.k_start or 1) if self.anneals else self.k
        values, indices = encoding.values[:, :most], encoding.indices[:, :most]
        if self.anneals:
            values = jnp.where(jnp.arange(most)[None, :] < self.k_at(step), values, 0)
        return dataclasses.replace(encoding, values=values, indices=indices)
