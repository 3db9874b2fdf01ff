r"""JumpReLU: every latent has its own threshold, learned through a straight-through estimator.

.. math:: f_i = u_i\, H(u_i - \theta_i), \qquad
    L = \mathrm{mse} + \lambda(t)\, S + c \sum_i \mathrm{ReLU}(\theta_i - u_i) \|W_{dec,i}\|

S is one of: `step` the mean of :math:`\sum_i H(u_i - \theta_i)` (L0); `tanh` the mean of
:math:`\sum_i \tanh(s f_i \|W_{dec,i}\|)`; `quadratic` :math:`\frac{2}{L_0^*} (\overline{L_0} - L_0^*)^2` with L0
averaged over the batch first, so that single rows stay free to use more or fewer. Pseudo-derivatives, with bandwidth
:math:`\epsilon` and :math:`K(v) = 1[|v| < 1/2]`:

.. math:: \frac{\partial f}{\partial \theta} = -\frac{\theta}{\epsilon} K\Big(\frac{u - \theta}{\epsilon}\Big), \qquad
    \frac{\partial H}{\partial \theta} = -\frac{1}{\epsilon} K\Big(\frac{u - \theta}{\epsilon}\Big)

The step is strict: u = theta does not fire. Thresholds are trained directly (not their logarithm) and kept at or
above 0. `ste_to_input` gives u the opposite of theta's pseudo-derivatives, besides the usual H.

Sources:
  Rajamanoharan et al., Jumping ahead, 2024 (arXiv:2407.14435); Lieberum et al., Gemma Scope, 2024
  (arXiv:2408.05147); Gemma Scope 2, 2025 (quadratic); Anthropic, Circuits updates, January 2025 (tanh, pre-activation
  loss).
"""

import dataclasses
import enum
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp

from saejax.fields.resume_policy import Fixed, Free
from saejax.sae import base


class SparsityPenalty(enum.Enum):
    """Penalty on latents that fire."""

    step = "step"
    """Their number, L0."""
    tanh = "tanh"
    """tanh of their size times their decoder norm: saturates, so that large latents do not shrink."""
    quadratic = "quadratic"
    """The squared distance of the batch's mean L0 from `target_l0`."""


@base.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class JumpReLU(base.Sparsifier):
    """JumpReLU sparse autoencoder; the defaults are Gemma Scope's and assume E||x||^2 = 1.

    Examples:
      >>> JumpReLU(d_in=16, d_sae=64, bandwidth=0.0)
      Traceback (most recent call last):
      ...
      saejax.errors.UserError: sae.bandwidth must be above 0, got 0.0
    """

    name: ClassVar[str] = "jumprelu"
    leaves: ClassVar[dict[str, int | None]] = {"threshold": 0}
    knobs: ClassVar[tuple[str, ...]] = ("l0_coef",)

    l0_coef: Free[float] = 1e-3
    """Weight of the sparsity penalty, at least 0, in the unit of mse; 1e-4 to 1e-2 with E||x||^2 = 1."""
    l0_warmup_steps: Free[int] = 0
    """Optimiser steps over which the weight grows linearly from 0. Gemma Scope: 10,000; with `quadratic` 50,000."""
    penalty: Fixed[SparsityPenalty] = SparsityPenalty.step
    """Penalty on latents that fire: `step`, `tanh` or `quadratic`."""
    target_l0: Free[float] = 32.0
    """Target L0 of the quadratic penalty, above 0."""
    tanh_scale: Fixed[float] = 4.0
    """Slope of the tanh penalty, above 0."""
    bandwidth: Fixed[float] = 1e-3
    """Width of the window of the pseudo-derivative, above 0, in the unit of the latents."""
    threshold_init: Fixed[float] = 1e-3
    """Threshold of every latent at the start, above 0, in the unit of the latents."""
    threshold_lr_factor: Free[float] = 1.0
    """Factor on the learning rate of the thresholds, at least 0."""
    pre_act_coef: Free[float] = 0.0
    """Weight of the pre-activation loss, which pulls silent latents up; Anthropic: 3e-6 with E||x|| = sqrt(d_in)."""
    ste_to_input: Fixed[bool] = False
    """Whether the pseudo-derivative also reaches the pre-activations, as Anthropic trains."""

    def __post_init__(self):
        super().__post_init__()
        base.check_enum(self.penalty, SparsityPenalty, "penalty")
        for name in ("l0_coef", "l0_warmup_steps", "threshold_lr_factor", "pre_act_coef"):
            base.check(getattr(self, name) >= 0, name, "must be at least 0", getattr(self, name))
        for name in ("target_l0", "tanh_scale", "bandwidth", "threshold_init"):
            base.check(getattr(self, name) > 0, name, "must be above 0", getattr(self, name))

    def activate(self, params, pre_acts, step=None):
        """Returns the latents above their thresholds."""
        threshold = params.extra["threshold"]
        return base.Encoding(latents=jump(pre_acts, threshold, self.bandwidth, self.ste_to_input), d_sae=self.d_sae)

    def objective(self, params, x, target, step):
        """Returns mse, plus "sparsity" and "pre_act" times their weights."""
        pre_acts, threshold = self.pre_activations(params, x, step), params.extra["threshold"]
        encoding = self.activate(params, pre_acts, step)
        recon = self.decode(params, encoding)
        mse = jnp.mean(jnp.sum((target - recon) ** 2, axis=1))
        norms = self.decoder_norms(params)[None, :]
        if self.penalty is SparsityPenalty.tanh:
            sparsity = jnp.mean(jnp.sum(jnp.tanh(self.tanh_scale * encoding.dense() * norms), axis=1))
        else:
            sparsity = jnp.mean(jnp.sum(heaviside(pre_acts, threshold, self.bandwidth, self.ste_to_input), axis=1))
        if self.penalty is SparsityPenalty.quadratic:
            sparsity = 2 / self.target_l0 * (sparsity - self.target_l0) ** 2
        terms = {"mse": mse, "sparsity": sparsity}
        loss = mse + base.warmed_up(self.l0_coef, step, self.l0_warmup_steps) * sparsity
        if self.pre_act_coef > 0:
            terms["pre_act"] = jnp.mean(jnp.sum(jax.nn.relu(threshold[None, :] - pre_acts) * norms, axis=1))
            loss = loss + self.pre_act_coef * terms["pre_act"]
        return loss, base.Aux(recon=recon, encoding=encoding, terms=terms)

    def extra(self):
        """Returns the thresholds."""
        return {"threshold": jnp.full(self.d_sae, self.threshold_init, jnp.float32)}

    def fold_extra(self, params, mean, scale):
        """Returns the thresholds in the data's unit."""
        return {"threshold": params.extra["threshold"] / scale}

    def constrain_extra(self, params):
        """Keeps thresholds at or above 0: latents are never negative."""
        return {"threshold": jnp.maximum(params.extra["threshold"], 0)}

    def lr_scales(self):
        """Returns the factor of the thresholds."""
        return {} if self.threshold_lr_factor == 1 else {"threshold": self.threshold_lr_factor}


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def jump(pre_acts, threshold, bandwidth, ste_to_input) -> jax.Array:
    """Returns u H(u - theta), [b, d_sae], with the pseudo-derivatives of the module."""
    return jnp.where(pre_acts > threshold[None, :], pre_acts, 0)


def _jump_forward(pre_acts, threshold, bandwidth, ste_to_input):
    return jump(pre_acts, threshold, bandwidth, ste_to_input), (pre_acts, threshold)


def _jump_backward(bandwidth, ste_to_input, saved, cotangent):
    pre_acts, threshold = saved
    pseudo = cotangent * threshold[None, :] * _window(pre_acts, threshold, bandwidth)
    d_pre = jnp.where(pre_acts > threshold[None, :], cotangent, 0)
    return d_pre + pseudo if ste_to_input else d_pre, -jnp.sum(pseudo, axis=0)


jump.defvjp(_jump_forward, _jump_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def heaviside(pre_acts, threshold, bandwidth, ste_to_input) -> jax.Array:
    """Returns H(u - theta), [b, d_sae] float32, with the pseudo-derivatives of the module."""
    return (pre_acts > threshold[None, :]).astype(jnp.float32)


def _heaviside_forward(pre_acts, threshold, bandwidth, ste_to_input):
    return heaviside(pre_acts, threshold, bandwidth, ste_to_input), (pre_acts, threshold)


def _heaviside_backward(bandwidth, ste_to_input, saved, cotangent):
    pseudo = cotangent * _window(saved[0], saved[1], bandwidth)
    return pseudo if ste_to_input else jnp.zeros_like(pseudo), -jnp.sum(pseudo, axis=0)


heaviside.defvjp(_heaviside_forward, _heaviside_backward)


def _window(pre_acts, threshold, bandwidth):
    """K((u - theta) / bandwidth) / bandwidth."""
    return (jnp.abs(pre_acts - threshold[None, :]) < bandwidth / 2) / bandwidth
