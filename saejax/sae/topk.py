r"""TopK: the k largest latents of a row reconstruct it; AuxK revives the dead.

.. math:: z = \mathrm{ReLU}(\mathrm{TopK}((x - b_{dec}) W_{enc} + b_{enc})), \quad
    \hat x = z W_{dec} + b_{dec}

One dense product forward; everything else touches active latents only (`kernels`).

Sources:
  Gao et al., Scaling and evaluating sparse autoencoders, 2024 (arXiv:2406.04093).
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from saejax.kernels import top_k
from saejax.sae import base


@base.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class TopK(base.Sparsifier):
    """TopK sparse autoencoder.

    Example:
      >>> TopK(d_in=16, d_sae=64, k=999)
      Traceback (most recent call last):
      ...
      saejax.errors.UserError: sae.k must be in [1, d_sae=64], got 999
    """

    name: ClassVar[str] = "topk"

    k: int = 32
    """Latents kept per row, in [1, d_sae]; a row with fewer positive ones uses fewer."""

    def __post_init__(self):
        super().__post_init__()
        base.check(1 <= self.k <= self.d_sae, "k", f"must be in [1, d_sae={self.d_sae}]", self.k)

    @property
    def k_sparse(self):
        """Always."""
        return True

    def activate(self, params, pre_acts, step=None):
        """Returns the k largest latents of each row; those below zero become 0."""
        values, indices = top_k.top_k(pre_acts, self.k)
        return base.Encoding(values=jnp.maximum(values, 0), indices=indices, d_sae=self.d_sae)

    def objective(self, params, x, step):
        """Returns the squared error."""
        aux = self.reconstruct(params, x, step)
        return aux.terms["mse"], aux
