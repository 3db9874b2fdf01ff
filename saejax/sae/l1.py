r"""L1: a ReLU autoencoder with a penalty on each latent times the norm of its decoder row.

.. math:: f = \mathrm{ReLU}(x W_{enc} + b_{enc}), \quad \hat x = f W_{dec} + b_{dec}, \quad
    L = \frac1B \sum_r \Big(\|x_r - \hat x_r\|^2 + \lambda(t) \sum_i f_{ri} \|W_{dec,i}\|\Big)

The decoder is free: growing it does not evade the penalty. The older form holds the decoder at norm 1, subtracts b_dec
first and penalises the latent alone (`penalty: plain`; the preset `sae=l1_plain`). Latents are dense arrays here.

Sources:
  Anthropic interpretability team, Circuits updates, April 2024 (loss, initialisation, warm-up).
  Bricken et al., Towards monosemanticity, 2023 (plain).
"""

import dataclasses
import enum
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from saejax.fields.resume_policy import Fixed, Free
from saejax.sae import base


class Penalty(enum.Enum):
    """Cost of one unit of a latent."""

    decoder_norm = "decoder_norm"
    """The norm of its decoder row."""
    plain = "plain"
    """One; needs `unit_decoder`, or a large decoder would evade it."""


@base.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class L1(base.Sparsifier):
    """ReLU sparse autoencoder with an L1 penalty.

    Examples:
      >>> L1(d_in=16, d_sae=64, l1_coef=-1.0)
      Traceback (most recent call last):
      ...
      saejax.errors.UserError: sae.l1_coef must be at least 0, got -1.0
    """

    name: ClassVar[str] = "l1"
    knobs: ClassVar[tuple[str, ...]] = ("l1_coef",)
    preferred_norm: ClassVar[str] = "sqrt_d"

    decoder_init_norm: Fixed[float] = 0.1
    """Norm of the decoder rows at the start, above 0; 0.05 to 1 is usual, 1 with `unit_decoder`."""
    subtract_b_dec: Fixed[bool] = False
    """Whether the encoder reads x - b_dec (pre-encoder bias) or x."""
    unit_decoder: Fixed[bool] = False
    """Whether decoder rows are kept at norm 1, their gradients tangent to the sphere."""
    penalty: Fixed[Penalty] = Penalty.decoder_norm
    """Cost of one unit of a latent: `decoder_norm` or `plain` (1; needs unit_decoder)."""
    l1_coef: Free[float] = 5.0
    """Weight of the penalty, at least 0, in the unit of the data: 5 suits E||x|| = sqrt(d_in)."""
    l1_warmup_steps: Free[int] = 0
    """Optimiser steps over which the weight grows linearly from 0; 0 starts in full. Usual: 5 % of a run."""

    def __post_init__(self):
        super().__post_init__()
        base.check_enum(self.penalty, Penalty, "penalty")
        safe = self.unit_decoder or self.penalty is not Penalty.plain
        base.check(safe, "unit_decoder", "must be true with penalty=plain", self.unit_decoder)
        base.check(self.l1_coef >= 0, "l1_coef", "must be at least 0", self.l1_coef)
        base.check(self.l1_warmup_steps >= 0, "l1_warmup_steps", "must be at least 0", self.l1_warmup_steps)

    def activate(self, params, pre_acts, step=None):
        """Returns all latents."""
        return base.Encoding(latents=jax.nn.relu(pre_acts), d_sae=self.d_sae)

    def objective(self, params, x, target, step):
        """Returns the squared error (sum over d_out, mean over rows) plus the term "l1" times its weight."""
        aux = self.reconstruct(params, x, target, step)
        sizes = jnp.mean(aux.encoding.dense(), axis=0)
        # One product: the latents averaged over the rows, against the norms.
        l1 = sizes @ self.decoder_norms(params) if self.penalty is Penalty.decoder_norm else jnp.sum(sizes)
        loss = aux.terms["mse"] + self.coefficient(step) * l1
        return loss, dataclasses.replace(aux, terms=aux.terms | {"l1": l1})

    def coefficient(self, step: Array) -> Float[Array, ""]:
        """Returns the penalty's weight after `step` optimiser steps."""
        return base.warmed_up(self.l1_coef, step, self.l1_warmup_steps)
