r"""Matching pursuit: the encoder is k greedy steps with the decoder as its dictionary.

.. math:: j_t = \arg\max_j s_j, \quad v_t = \mathrm{ReLU}(s_{j_t}), \quad r \leftarrow r - v_t W_{dec,j_t}, \quad
    s = r W_{dec}^T, \quad r_0 = x - b_{dec}

The code updates the scores s, not the residual: :math:`s \leftarrow s - v_t W_{dec,j_t} W_{dec}^T`, the same product.
The gradient flows through values and residual, not through the choice. Choosing a latent twice adds to its value. With
unit rows :math:`\|r\|^2` falls by :math:`v_t^2` at each step. b_enc stays at its start, 0. k steps cost k dense
products.

Sources:
  Mallat and Zhang, Matching pursuits with time-frequency dictionaries, 1993; Costa et al., From flat to hierarchical:
  extracting sparse representations with matching pursuit, 2025 (arXiv:2506.03093).
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jax import lax

from saejax.fields.resume_policy import Fixed
from saejax.kernels import matmul, sparse_decode, sparse_encode, top_k
from saejax.sae import base
from saejax.sae.layout import EncoderKind, Family


@base.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class MatchingPursuit(base.Sparsifier):
    """Matching pursuit sparse autoencoder.

    Examples:
      >>> MatchingPursuit(d_in=16, d_sae=64, encoder=EncoderKind.mlp)
      Traceback (most recent call last):
      ...
      saejax.errors.UserError: sae.encoder must be tied: the decoder is its dictionary, got EncoderKind.mlp
    """

    name: ClassVar[str] = "matching_pursuit"
    knobs: ClassVar[tuple[str, ...]] = ("k",)
    whitens: ClassVar[bool] = False  # its encoder is its decoder

    encoder: Fixed[EncoderKind] = EncoderKind.tied
    """Only `tied`: the decoder is the dictionary of the pursuit."""
    k: Fixed[int] = 8
    """Greedy steps, in [1, d_sae]: at most as many latents per row."""

    def __post_init__(self):
        super().__post_init__()
        tied = self.encoder is EncoderKind.tied
        base.check(tied, "encoder", "must be tied: the decoder is its dictionary", self.encoder)
        one = self.family is Family.sae
        base.check(
            one, "family", "must be sae: the scales of several sites would change its dictionary", self.family.name
        )
        base.check(self.unit_decoder, "unit_decoder", "must be true for matching pursuit", self.unit_decoder)
        base.check(self.subtract_b_dec, "subtract_b_dec", "must be true for matching pursuit", self.subtract_b_dec)
        base.check(1 <= self.k <= self.d_sae, "k", f"must be in [1, d_sae={self.d_sae}]", self.k)

    @property
    def n_active(self):
        """k."""
        return self.k

    def more_products(self, encoder, decoder):
        """Returns those of the steps after the first."""
        return encoder * (self.k - 1)

    def activate(self, params, pre_acts, step=None):
        """Returns the latents that k greedy steps choose, with the gradient through every step."""

        def greedy(scores, _):
            values, indices = top_k.top_k(scores, 1)
            values = sparse_encode.with_gradient_of(jnp.maximum(values, 0), indices, scores)
            part = sparse_decode.sparse_decode(values, indices, params.W_dec)
            # XLA's CPU compiler turns the transpose of a bfloat16 gradient into a product that it cannot run; the
            # barrier, which also stands in the gradient, keeps the two apart.
            dictionary = lax.optimization_barrier(params.W_dec.T)
            scores = scores - matmul.matmul(part, dictionary, self.matmul_dtype.value)
            return scores, (values[:, 0], indices[:, 0])

        _, (values, indices) = lax.scan(greedy, pre_acts, length=self.k)
        return base.Encoding(values=_merged(values.T, indices.T), indices=indices.T, d_sae=self.d_sae)

    def objective(self, params, x, target, step):
        """Returns the squared error."""
        aux = self.reconstruct(params, x, target, step)
        return aux.terms["mse"], aux

    def lr_scales(self):
        """Holds b_enc: a pursuit has no bias of its own."""
        return {"b_enc": 0.0}


def _merged(values, indices):
    """Values in which the first slot of a latent holds the sum of all of its slots and the others 0."""
    same = indices[:, :, None] == indices[:, None, :]
    first = jnp.argmax(same, axis=2) == jnp.arange(indices.shape[1])[None, :]
    return jnp.where(first, jnp.einsum("bij,bj->bi", same.astype(values.dtype), values), 0)
