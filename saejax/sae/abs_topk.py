r"""AbsTopK: the k latents of largest magnitude with their signs; one latent serves both ends of a direction.

.. math:: z_i = u_i \cdot 1[|u_i| \text{ among the } k \text{ largest of the row}], \quad
    u = (x - b_{dec}) W_{enc} + b_{enc}

AuxK keeps the signs as well.

Sources:
  Zhu et al., AbsTopK: rethinking sparse autoencoders for bidirectional features, 2025 (arXiv:2510.00404).
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from saejax.fields.resume_policy import Fixed
from saejax.kernels import sparse_encode, top_k
from saejax.sae import base


@base.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class AbsTopK(base.Sparsifier):
    """Signed TopK sparse autoencoder.

    Examples:
      >>> AbsTopK(d_in=16, d_sae=64, k=65)
      Traceback (most recent call last):
      ...
      saejax.errors.UserError: sae.k must be in [1, d_sae=64], got 65
    """

    name: ClassVar[str] = "abs_topk"
    knobs: ClassVar[tuple[str, ...]] = ("k",)

    k: Fixed[int] = 32
    """Latents kept per row, in [1, d_sae]."""

    def __post_init__(self):
        super().__post_init__()
        base.check(1 <= self.k <= self.d_sae, "k", f"must be in [1, d_sae={self.d_sae}]", self.k)

    @property
    def k_sparse(self):
        """Always."""
        return True

    @property
    def n_active(self):
        """k."""
        return self.k

    @property
    def signed(self):
        """Always."""
        return True

    def activate(self, params, pre_acts, step=None):
        """Returns the k entries of largest magnitude of each row, signed."""
        _, indices = top_k.top_k(jnp.abs(pre_acts), self.k)
        values = sparse_encode.entries(pre_acts, indices)
        return base.Encoding(values=values, indices=indices, d_sae=self.d_sae)

    def objective(self, params, x, target, step):
        """Returns the squared error."""
        aux = self.reconstruct(params, x, target, step)
        return aux.terms["mse"], aux
