r"""P-anneal: an Lp penalty whose p falls from 1, so it ends near a count and shrinks large latents less.

.. math:: L = \mathrm{mse} + \lambda(t)\, c(t) \frac1B \sum_{r,i} f_{ri}^{\,p(t)}, \qquad
    c(t) = \frac{\sum f}{\sum f^{p(t)}} \text{ held fixed}

A millionth is added to f before the power, whose slope at 0 is infinite. c keeps the penalty at the value of L1 while
p moves; only its split between small and large latents changes. The paper rescales by the means over a queue of recent
batches. Here the batch itself serves, so no state is needed.

Sources:
  Karvonen et al., Measuring progress in dictionary learning for language model interpretability with board game
  models, 2024 (arXiv:2408.00113).
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from saejax.fields.resume_policy import Fixed, Free
from saejax.sae import base

_TINY = 1e-6


@base.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class PAnneal(base.Sparsifier):
    """ReLU sparse autoencoder with an annealed Lp penalty.

    Examples:
      >>> config = PAnneal(d_in=16, d_sae=64, p_end=0.5, anneal_start_step=100, anneal_steps=100)
      >>> [round(float(config.p(jnp.asarray(step))), 3) for step in (0, 100, 150, 200, 900)]
      [1.0, 1.0, 0.75, 0.5, 0.5]
    """

    name: ClassVar[str] = "p_anneal"
    knobs: ClassVar[tuple[str, ...]] = ("l1_coef",)

    l1_coef: Free[float] = 0.01
    """Weight of the penalty, at least 0; 0.005 to 0.03 with E||x||^2 = 1."""
    l1_warmup_steps: Free[int] = 0
    """Optimiser steps over which the weight grows linearly from 0; 0 starts in full."""
    p_end: Fixed[float] = 0.2
    """Power at the end, in (0, 1]."""
    anneal_start_step: Fixed[int] = 0
    """Optimiser step at which p begins to fall, at least 0."""
    anneal_steps: Fixed[int] = 10_000
    """Optimiser steps over which p falls linearly from 1 to `p_end`, at least 1."""

    def __post_init__(self):
        super().__post_init__()
        must = "must be true: a large decoder would evade the penalty"
        base.check(self.unit_decoder, "unit_decoder", must, self.unit_decoder)
        for name in ("l1_coef", "l1_warmup_steps", "anneal_start_step"):
            base.check(getattr(self, name) >= 0, name, "must be at least 0", getattr(self, name))
        base.check(0 < self.p_end <= 1, "p_end", "must be in (0, 1]", self.p_end)
        base.check(self.anneal_steps >= 1, "anneal_steps", "must be at least 1", self.anneal_steps)

    def activate(self, params, pre_acts, step=None):
        """Returns all latents."""
        return base.Encoding(latents=jax.nn.relu(pre_acts), d_sae=self.d_sae)

    def objective(self, params, x, target, step):
        """Returns the squared error plus the term "lp" times its weight; its value is that of the L1 norm."""
        aux = self.reconstruct(params, x, target, step)
        latents = aux.encoding.dense()
        powers = jnp.mean(jnp.sum(jnp.where(latents > 0, (latents + _TINY) ** self.p(step), 0), axis=1))
        l1 = jnp.mean(jnp.sum(latents, axis=1))
        lp = powers * lax.stop_gradient(l1 / jnp.maximum(powers, 1e-20))
        loss = aux.terms["mse"] + base.warmed_up(self.l1_coef, step, self.l1_warmup_steps) * lp
        return loss, dataclasses.replace(aux, terms=aux.terms | {"lp": lp})

    def p(self, step: Array) -> Float[Array, ""]:
        """Returns the power after `step` optimiser steps."""
        share = jnp.clip((step - self.anneal_start_step) / self.anneal_steps, 0.0, 1.0)
        return 1 + (self.p_end - 1) * share
