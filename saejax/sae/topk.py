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
from jax import lax

from saejax.kernels import matmul, sparse_decode, sparse_encode, top_k
from saejax.sae import base, initialise
from saejax.sae.aux_k import aux_k_loss


@base.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class TopK(base.Sparsifier):
    """TopK sparse autoencoder with AuxK.

    Example:
      >>> TopK(d_in=16, d_sae=64, k=999)
      Traceback (most recent call last):
      ...
      saejax.errors.UserError: sae.k must be in [1, d_sae=64], got 999
    """

    name: ClassVar[str] = "topk"

    k: int = 32
    """Latents kept per row, in [1, d_sae]; a row with fewer positive ones uses fewer."""
    aux_alpha: float = 1 / 32
    """Weight of the AuxK loss against mse over variance, dimensionless; 0 turns it off. 1/32 as in Gao et al."""
    k_aux: int | None = None
    """Dead latents that explain the residual of a row, in [1, d_sae]; null takes half of d_in."""
    encoder_init: initialise.EncoderInit = initialise.EncoderInit.transpose
    """Where the encoder starts: `transpose` (of the decoder) or `independent`."""

    def __post_init__(self):
        super().__post_init__()
        base.check(1 <= self.k <= self.d_sae, "k", f"must be in [1, d_sae={self.d_sae}]", self.k)
        base.check(self.aux_alpha >= 0, "aux_alpha", "must be at least 0", self.aux_alpha)
        in_range = self.k_aux is None or 1 <= self.k_aux <= self.d_sae
        base.check(in_range, "k_aux", f"must be null or in [1, d_sae={self.d_sae}]", self.k_aux)
        base.check_enum(self.encoder_init, initialise.EncoderInit, "encoder_init")

    @property
    def n_aux(self) -> int:
        """Dead latents per row in AuxK, with the default filled in."""
        return min(max(self.d_in // 2, 1), self.d_sae) if self.k_aux is None else self.k_aux

    def init(self, key):
        """Draws unit decoder rows; the encoder mirrors them; biases are 0."""
        return initialise.random(key, d_in=self.d_in, d_sae=self.d_sae, decoder_norm=1.0, encoder=self.encoder_init)

    def encode(self, params, x):
        """Returns the k largest latents of each row; those below zero become 0."""
        weights = params.W_enc, params.b_enc, params.b_dec
        pre_acts = sparse_encode.pre_activations(x, *weights, self.matmul_dtype.value)
        values, indices = top_k.top_k(pre_acts, self.k)
        values = sparse_encode.with_encoder_gradient(jnp.maximum(values, 0), indices, x, *weights)
        return base.Encoding(values=values, indices=indices, d_sae=self.d_sae)

    def decode(self, params, encoding):
        """Returns the sum of the active decoder rows plus `b_dec`."""
        if encoding.latents is not None:
            recon = matmul.matmul(encoding.latents, params.W_dec, self.matmul_dtype.value)
        else:
            assert encoding.values is not None and encoding.indices is not None
            recon = sparse_decode.sparse_decode(encoding.values, encoding.indices, params.W_dec)
        return recon + params.b_dec[None, :]

    def loss(self, params, x, *, dead, step):
        r"""Returns :math:`\mathrm{mse} + \alpha\, s^2\, \mathrm{aux}`.

        mse is the squared error summed over d_in and averaged over the rows. aux is dimensionless (`aux_k`), and
        :math:`s^2 = E\|x - \bar x\|^2`, from the batch and without a gradient, gives it the unit of mse. So the
        loss is that of Gao et al. (mse / s^2 + alpha aux) times s^2, alpha means the same at every scale of the
        data, and with centred data of E||x||^2 = 1 it is the loss of dictionary_learning's TopK trainer but for
        the factor min(n_dead / k_aux, 1).
        """
        encoding = self.encode(params, x)
        recon = self.decode(params, encoding)
        residual = x - recon
        loss = mse = jnp.mean(jnp.sum(residual**2, axis=1))
        terms = {"mse": mse}
        if self.aux_alpha > 0:
            fixed = lax.stop_gradient((x - params.b_dec[None, :], residual))
            terms["aux_k"] = aux_k_loss(
                params.W_enc, params.b_enc, params.W_dec, *fixed, dead, self.n_aux, self.matmul_dtype.value
            )
            spread = jnp.mean(jnp.sum((x - jnp.mean(x, axis=0, keepdims=True)) ** 2, axis=1))
            loss = mse + self.aux_alpha * lax.stop_gradient(spread) * terms["aux_k"]
        return loss, base.Aux(recon=recon, encoding=encoding, terms=terms)

    def constrain(self, params):
        """Scales decoder rows to norm 1."""
        norm = jnp.linalg.norm(params.W_dec, axis=1, keepdims=True)
        return dataclasses.replace(params, W_dec=params.W_dec / jnp.maximum(norm, 1e-20))

    def project(self, params, grads):
        """Removes the part of the decoder's gradient along each (unit) row: rescaling would undo it."""
        along = jnp.sum(params.W_dec * grads.W_dec, axis=1, keepdims=True)
        return dataclasses.replace(grads, W_dec=grads.W_dec - along * params.W_dec)

    def fold(self, params, *, mean, scale):
        """Returns parameters for x itself; latents then carry the data's unit and decoder rows keep norm 1.

        With x' = (x - mean) scale:  b_dec / scale + mean centres x, all else is linear in the scale.
        """
        return dataclasses.replace(params, b_enc=params.b_enc / scale, b_dec=params.b_dec / scale + mean)
