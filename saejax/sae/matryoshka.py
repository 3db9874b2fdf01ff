r"""Matryoshka: the first latents alone must reconstruct too, so that general features stay whole.

.. math:: L = \frac1P \sum_{p=1}^{P} \|x - (f_{1:n_p} W_{dec,1:n_p} + b_{dec})\|^2

Prefixes n_1 < ... < n_P = d_sae count equally. Each group of latents between two prefixes is decoded once and the
reconstructions add up: dense codes (batch_topk) pay one decode for all prefixes; k-sparse ones (topk) pay one sparse
decode per prefix.

Sources:
  Bussmann et al., Learning multi-level features with matryoshka sparse autoencoders, 2025 (arXiv:2503.17547).
  Default prefixes: the group sizes 1/32, 1/16, 1/8, 1/4, 17/32 of SAEBench's baseline suite.
"""

import dataclasses
import enum
from typing import ClassVar

import jax.numpy as jnp

from saejax.fields.resume_policy import Fixed
from saejax.kernels import matmul, sparse_decode, top_k
from saejax.sae import base, selection
from saejax.sae.layout import Family


class Selection(enum.Enum):
    """Selection of the kept latents."""

    batch_topk = "batch_topk"
    """k per row on average over the batch; above a threshold at inference."""
    topk = "topk"
    """k of each row."""


@base.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Matryoshka(base.Sparsifier):
    """Matryoshka sparse autoencoder.

    Examples:
      >>> Matryoshka(d_in=16, d_sae=64, k=8).widths
      (2, 6, 14, 30, 64)
      >>> Matryoshka(d_in=16, d_sae=64, k=8, prefixes=(8, 32))
      Traceback (most recent call last):
      ...
      saejax.errors.UserError: sae.prefixes must rise from at least 1 to d_sae=64, got (8, 32)
    """

    name: ClassVar[str] = "matryoshka"
    leaves: ClassVar[dict[str, int | None]] = {"threshold": 0}
    knobs: ClassVar[tuple[str, ...]] = ("k",)

    k: Fixed[int] = 32
    """Latents kept per row (on average, with batch_topk), in [1, d_sae]."""
    selection: Fixed[Selection] = Selection.batch_topk
    """Selection of the kept latents: `batch_topk` or `topk`."""
    prefixes: Fixed[tuple[int, ...]] = ()
    """Numbers of latents that must reconstruct alone, rising, the last d_sae; [] takes 1/32, 3/32, 7/32, 15/32, 1."""

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "prefixes", tuple(self.prefixes))  # a YAML list arrives as a list
        base.check(1 <= self.k <= self.d_sae, "k", f"must be in [1, d_sae={self.d_sae}]", self.k)
        base.check_enum(self.selection, Selection, "selection")
        nested = self.family is not Family.clt
        base.check(nested, "family", "must not be clt: its first latents read the first layer alone", self.family.name)
        rising = all(a < b for a, b in zip((0, *self.prefixes), self.prefixes, strict=False))
        ok = not self.prefixes or rising and self.prefixes[-1] == self.d_sae
        base.check(ok, "prefixes", f"must rise from at least 1 to d_sae={self.d_sae}", self.prefixes)

    @property
    def widths(self) -> tuple[int, ...]:
        """The prefixes, with the default filled in."""
        shares = (1, 3, 7, 15, 32)
        return self.prefixes or tuple(sorted({max(1, self.d_sae * share // 32) for share in shares}))

    @property
    def k_sparse(self):
        """With `topk`."""
        return self.selection is Selection.topk

    @property
    def n_active(self):
        """k."""
        return self.k

    def activate(self, params, pre_acts, step=None):
        """Returns the latents that the selection keeps."""
        if self.k_sparse:
            return self.keep(*top_k.top_k(pre_acts, self.k), step)
        if step is None:
            return selection.above(pre_acts, params.extra["threshold"], self.k)
        return selection.of_batch(pre_acts, self.k)

    def n_best(self, step):
        """Returns k with `topk`."""
        return self.k if self.k_sparse else None

    def keep(self, values, indices, step):
        """Returns the best of each row, those below zero as 0."""
        return base.Encoding(values=jnp.maximum(values, 0), indices=indices, d_sae=self.d_sae)

    def objective(self, params, x, target, step):
        """Returns the mean of the squared errors of all prefixes, "prefix_mse"; "mse" is that of the last."""
        encoding = self.code(params, x, step)
        recon, errors, first = params.b_dec[None, :], [], 0
        for width in self.widths:
            recon = recon + self._group(params, encoding, first, width)
            errors.append(jnp.mean(jnp.sum((target - recon) ** 2, axis=1)))
            first = width
        loss = jnp.mean(jnp.stack(errors))
        return loss, base.Aux(recon=recon, encoding=encoding, terms={"mse": errors[-1], "prefix_mse": loss})

    def _group(self, params, encoding, first, last):
        """Contribution of the latents from `first` to before `last` to the reconstruction."""
        if encoding.latents is not None:
            return matmul.matmul(encoding.latents[:, first:last], params.W_dec[first:last], self.matmul_dtype.value)
        inside = (encoding.indices >= first) & (encoding.indices < last)
        return sparse_decode.sparse_decode(jnp.where(inside, encoding.values, 0), encoding.indices, params.W_dec)

    def extra(self):
        """Returns the inference threshold of batch_topk, 0 until the first step."""
        return {} if self.k_sparse else {"threshold": jnp.zeros(())}

    def fold_extra(self, params, mean, scale):
        """Returns the threshold in the data's unit."""
        return {} if self.k_sparse else {"threshold": params.extra["threshold"] / scale}

    def track(self, params, aux, step):
        """Moves the threshold towards the smallest latent kept in the batch."""
        return params if self.k_sparse else selection.track(params, aux.encoding)

    def lr_scales(self):
        """Keeps the optimiser away from the threshold."""
        return {} if self.k_sparse else {"threshold": 0.0}
