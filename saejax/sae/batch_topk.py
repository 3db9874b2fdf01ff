r"""BatchTopK: the k B largest latents of a batch of B rows; each row uses as many as it needs.

.. math:: \text{training: } f = u \cdot 1[u \ge u_{(kB)}], \; u = \mathrm{ReLU}((x - b_{dec}) W_{enc} + b_{enc}),
    \qquad \text{inference: } f = u \cdot 1[u > \theta]

:math:`u_{(kB)}` is the kB-th largest of the batch; latents that tie with it are all kept. :math:`\theta` is the
running mean of the smallest kept latent (`selection`). An unrolled (lista) encoder uses the same threshold inside.

Sources:
  Bussmann et al., BatchTopK sparse autoencoders, 2024 (arXiv:2412.06410).
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from saejax.fields.resume_policy import Fixed
from saejax.sae import base, selection


@base.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchTopK(base.Sparsifier):
    """BatchTopK sparse autoencoder.

    Examples:
      >>> BatchTopK(d_in=16, d_sae=64, k=0)
      Traceback (most recent call last):
      ...
      saejax.errors.UserError: sae.k must be in [1, d_sae=64], got 0
    """

    name: ClassVar[str] = "batch_topk"
    leaves: ClassVar[dict[str, int | None]] = {"threshold": 0}
    knobs: ClassVar[tuple[str, ...]] = ("k",)

    k: Fixed[int] = 32
    """Latents kept per row on average, in [1, d_sae]; fewer where fewer are positive."""

    def __post_init__(self):
        super().__post_init__()
        base.check(1 <= self.k <= self.d_sae, "k", f"must be in [1, d_sae={self.d_sae}]", self.k)

    @property
    def n_active(self):
        """k."""
        return self.k

    def activate(self, params, pre_acts, step=None):
        """Returns the best latents of the batch in training, and those above the threshold at inference."""
        if step is None:
            return selection.above(pre_acts, params.extra["threshold"], self.k)
        return selection.of_batch(pre_acts, self.k)

    def objective(self, params, x, target, step):
        """Returns the squared error."""
        aux = self.reconstruct(params, x, target, step)
        return aux.terms["mse"], aux

    def extra(self):
        """Returns the inference threshold, 0 until the first step."""
        return {"threshold": jnp.zeros(())}

    def fold_extra(self, params, mean, scale):
        """Returns the threshold in the data's unit."""
        return {"threshold": params.extra["threshold"] / scale}

    def track(self, params, aux, step):
        """Moves the threshold towards the smallest latent kept in the batch."""
        return selection.track(params, aux.encoding)

    def lr_scales(self):
        """Keeps the optimiser away from the threshold."""
        return {"threshold": 0.0}
