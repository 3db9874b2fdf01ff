r"""L1: a ReLU autoencoder that pays for every latent by its size times the norm of its decoder row.

.. math:: f = \mathrm{ReLU}(x W_{enc} + b_{enc}), \quad \hat x = f W_{dec} + b_{dec}, \quad
    L = \frac1B \sum_r \Big(\|x_r - \hat x_r\|^2 + \lambda(t) \sum_i f_{ri} \|W_{dec,i}\|\Big)

The decoder is free: the penalty cannot be evaded by growing it. Latents are dense arrays here.

Sources:
  Anthropic interpretability team, Circuits updates, April 2024 (loss, initialisation, warm-up).
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from saejax.kernels import matmul
from saejax.sae import base, initialise


@base.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class L1(base.Sparsifier):
    """ReLU sparse autoencoder with a decoder-norm weighted L1 penalty.

    Example:
      >>> L1(d_in=16, d_sae=64, l1_coef=-1.0)
      Traceback (most recent call last):
      ...
      saejax.errors.UserError: sae.l1_coef must be at least 0, got -1.0
    """

    name: ClassVar[str] = "l1"
    preferred_norm: ClassVar[str] = "sqrt_d"

    l1_coef: float = 5.0
    """Weight of the penalty, at least 0, in the unit of the data: 5 suits E||x|| = sqrt(d_in)."""
    l1_warmup_steps: int = 0
    """Optimiser steps over which the weight grows linearly from 0; 0 starts in full. Usual: 5 % of a run."""
    decoder_init_norm: float = 0.1
    """Norm of the decoder rows at the start, above 0; 0.05 to 1 is usual."""
    encoder_init: initialise.EncoderInit = initialise.EncoderInit.transpose
    """Where the encoder starts: `transpose` (of the decoder) or `independent`."""

    def __post_init__(self):
        super().__post_init__()
        base.check(self.l1_coef >= 0, "l1_coef", "must be at least 0", self.l1_coef)
        base.check(self.l1_warmup_steps >= 0, "l1_warmup_steps", "must be at least 0", self.l1_warmup_steps)
        base.check(self.decoder_init_norm > 0, "decoder_init_norm", "must be above 0", self.decoder_init_norm)
        base.check_enum(self.encoder_init, initialise.EncoderInit, "encoder_init")

    def init(self, key):
        """Draws decoder rows of norm `decoder_init_norm`; the encoder mirrors them; biases are 0."""
        return initialise.random(
            key,
            d_in=self.d_in,
            d_sae=self.d_sae,
            decoder_norm=self.decoder_init_norm,
            encoder=self.encoder_init,
        )

    def encode(self, params, x):
        """Returns all latents; no pre-encoder bias."""
        pre_acts = matmul.matmul(x, params.W_enc, self.matmul_dtype.value) + params.b_enc[None, :]
        return base.Encoding(latents=jax.nn.relu(pre_acts), d_sae=self.d_sae)

    def decode(self, params, encoding):
        """Returns `latents @ W_dec + b_dec`."""
        recon = matmul.matmul(encoding.dense(), params.W_dec, self.matmul_dtype.value)
        return recon + params.b_dec[None, :]

    def loss(self, params, x, *, dead, step):
        """Returns the squared error (sum over d_in, mean over rows) plus the term "l1" times its weight."""
        encoding = self.encode(params, x)
        recon = self.decode(params, encoding)
        mse = jnp.mean(jnp.sum((x - recon) ** 2, axis=1))
        # One product: the latents summed over the rows, against the norms.
        l1 = jnp.mean(encoding.dense(), axis=0) @ _row_norms(params.W_dec)
        loss = mse + self.coefficient(step) * l1
        return loss, base.Aux(recon=recon, encoding=encoding, terms={"mse": mse, "l1": l1})

    def coefficient(self, step: Array) -> Float[Array, ""]:
        """Returns the penalty's weight after `step` optimiser steps."""
        return self.l1_coef * jnp.minimum(1.0, step / self.l1_warmup_steps if self.l1_warmup_steps else 1.0)

    def constrain(self, params):
        """Returns the parameters: nothing is constrained."""
        return params

    def project(self, params, grads):
        """Returns the gradients: nothing is constrained."""
        return grads

    def fold(self, params, *, mean, scale):
        """Returns parameters for x itself; latents then carry the data's unit.

        f(x scale - mean scale) / scale = ReLU(x W_enc + b_enc / scale - mean W_enc): only biases change.
        """
        return dataclasses.replace(
            params, b_enc=params.b_enc / scale - mean @ params.W_enc, b_dec=params.b_dec / scale + mean
        )

    def unit_decoder(self, params: base.SAEParams) -> base.SAEParams:
        """Returns the same autoencoder with decoder rows of norm 1 and latents times the old norms."""
        norms = _row_norms(params.W_dec)
        some = jnp.where(norms > 0, norms, 1.0)
        return dataclasses.replace(
            params,
            W_enc=params.W_enc * some[None, :],
            b_enc=params.b_enc * some,
            W_dec=params.W_dec / some[:, None],
        )


def _row_norms(W: Float[Array, "n d"]) -> Float[Array, "n"]:
    """Norms whose gradient at a zero row is 0, not NaN."""
    squares = jnp.sum(W**2, axis=1)
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)
