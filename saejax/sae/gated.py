r"""Gated: one affine map decides which latents fire, a rescaled copy decides how much.

.. math:: \pi = (x - b_{dec}) W_{enc} + b_{enc}, \quad
    f = 1[\pi > 0] \odot \mathrm{ReLU}\big(e^{r_{mag}} \odot (x - b_{dec}) W_{enc} + b_{mag}\big)

.. math:: L = \|x - \hat x(f)\|^2 + \lambda(t) \sum_i \mathrm{ReLU}(\pi_i)
    + \|x - \hat x_{frozen}(\mathrm{ReLU}(\pi))\|^2

The last term teaches the gate to reconstruct through a decoder that it must not move. It has no gradient in W_dec, and
none in b_dec, where that is added or where the encoder subtracts it. (A tied encoder is the decoder: there the gate's
gradient is the decoder's.)

Sources:
  Rajamanoharan et al., Improving dictionary learning with gated sparse autoencoders, 2024 (arXiv:2404.16014).
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from saejax.fields.resume_policy import Free
from saejax.kernels import matmul
from saejax.sae import base, sites
from saejax.sae.layout import EncoderKind


@base.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Gated(base.Sparsifier):
    """Gated sparse autoencoder.

    Examples:
      >>> Gated(d_in=16, d_sae=64, unit_decoder=False)
      Traceback (most recent call last):
      ...
      saejax.errors.UserError: sae.unit_decoder must be true: a large decoder would evade the penalty, got False
    """

    name: ClassVar[str] = "gated"
    leaves: ClassVar[dict[str, int | None]] = {"r_mag": 0, "b_mag": 0}
    knobs: ClassVar[tuple[str, ...]] = ("l1_coef",)

    l1_coef: Free[float] = 0.04
    """Weight of the penalty on the gate, at least 0; 0.01 to 0.1 with E||x||^2 = 1."""
    l1_warmup_steps: Free[int] = 0
    """Optimiser steps over which the weight grows linearly from 0; 0 starts in full."""

    def __post_init__(self):
        super().__post_init__()
        must = "must be true: a large decoder would evade the penalty"
        base.check(self.unit_decoder, "unit_decoder", must, self.unit_decoder)
        base.check(self.l1_coef >= 0, "l1_coef", "must be at least 0", self.l1_coef)
        base.check(self.l1_warmup_steps >= 0, "l1_warmup_steps", "must be at least 0", self.l1_warmup_steps)

    def activate(self, params, pre_acts, step=None):
        """Returns the magnitudes of the latents whose gate is open."""
        sizes = jnp.exp(params.extra["r_mag"])[None, :] * (pre_acts - params.b_enc[None, :])
        sizes = jax.nn.relu(sizes + params.extra["b_mag"][None, :])
        return base.Encoding(latents=jnp.where(pre_acts > 0, sizes, 0), d_sae=self.d_sae)

    def objective(self, params, x, target, step):
        """Returns mse, the "l1" of the gate times its weight, and "gate_mse" in full."""
        pre_acts = self.pre_activations(params, x, step)
        encoding = self.activate(params, pre_acts, step)
        recon = self.decode(params, encoding)
        mse = jnp.mean(jnp.sum((target - recon) ** 2, axis=1))
        l1 = jnp.mean(jnp.sum(jax.nn.relu(pre_acts), axis=1))
        # The same numbers, seen through a decoder and a centring that are held fixed.
        frozen = lax.stop_gradient((params.W_dec, params.b_dec))
        held = dataclasses.replace(params, W_dec=frozen[0], b_dec=frozen[1])
        gate = jax.nn.relu(self.pre_activations(held, x, step))
        by_gate = matmul.matmul(gate, held.W_dec, self.matmul_dtype.value) + held.b_dec[None, :]
        gate_mse = jnp.mean(jnp.sum((target - by_gate) ** 2, axis=1))
        loss = mse + base.warmed_up(self.l1_coef, step, self.l1_warmup_steps) * l1 + gate_mse
        return loss, base.Aux(recon=recon, encoding=encoding, terms={"mse": mse, "l1": l1, "gate_mse": gate_mse})

    def extra(self):
        """Returns log scale and bias of the magnitudes."""
        return {"r_mag": jnp.zeros(self.d_sae), "b_mag": jnp.zeros(self.d_sae)}

    def more_products(self, encoder, decoder):
        """Returns those of the gate's decoding, forward and for its latents."""
        return 2 * decoder

    def fold_extra(self, params, mean, scale):
        """Returns the bias of the magnitudes for x itself; the scales stay."""
        b_mag = params.extra["b_mag"] / scale
        if not self.centres and self.encoder is not EncoderKind.mlp:
            b_mag = b_mag - jnp.exp(params.extra["r_mag"]) * sites.response(self, mean, params.W_enc)
        return {"b_mag": b_mag}
