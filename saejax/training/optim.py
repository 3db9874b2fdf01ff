"""The optimiser of a run: gradient clipping, Adam, and a warm-up, stable, decay learning rate."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import optax

from saejax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Adam and its schedule; shares are of the whole run, so that a longer run keeps its shape."""

    lr: float = 1e-3
    """Peak learning rate. 1e-3 suits 4k to 16k latents at batch 1k to 4k; wider SAEs want less, as 1 / sqrt(d_sae)."""
    beta1: float = 0.9
    """Decay of the first moment, in [0, 1)."""
    beta2: float = 0.999
    """Decay of the second moment, in [0, 1)."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    clip_norm: float | None = 1.0
    """Largest global norm of the gradient; null does not clip."""
    warmup_share: float = 0.05
    """Share of the steps over which the rate rises linearly from zero, in [0, 1]."""
    decay_share: float = 0.2
    """Share of the steps, at the end, over which the rate falls linearly to zero, in [0, 1]."""

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise UserError(f"optim.lr must be above 0, got {self.lr}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"optim.{name} must be in [0, 1), got {getattr(self, name)}")
        if self.eps <= 0:
            raise UserError(f"optim.eps must be above 0, got {self.eps}")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise UserError(f"optim.clip_norm must be above 0 or null, got {self.clip_norm}")
        for name in ("warmup_share", "decay_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"optim.{name} must be in [0, 1], got {getattr(self, name)}")
        if self.warmup_share + self.decay_share > 1:
            raise UserError(
                f"optim.warmup_share + optim.decay_share must not exceed 1, "
                f"got {self.warmup_share} + {self.decay_share}"
            )


def schedule(config: OptimConfig, n_steps: int) -> optax.Schedule:
    """The learning rate at every step: linear rise, constant, linear fall to zero.

    Args:
      config: peak rate and the two shares.
      n_steps: steps of the whole run.

    Returns:
      A function from step to learning rate.

    Example:
      >>> rate = schedule(OptimConfig(lr=1.0, warmup_share=0.1, decay_share=0.5), 100)
      >>> [round(float(rate(step)), 3) for step in (0, 5, 10, 50, 75, 100)]
      [0.0, 0.5, 1.0, 1.0, 0.5, 0.0]
    """
    n_warmup = round(config.warmup_share * n_steps)
    n_decay = round(config.decay_share * n_steps)
    pieces = [
        optax.linear_schedule(0.0, config.lr, max(n_warmup, 1)),
        optax.constant_schedule(config.lr),
        optax.linear_schedule(config.lr, 0.0, max(n_decay, 1)),
    ]
    return optax.join_schedules(pieces, [n_warmup, n_steps - n_decay])


def make(
    config: OptimConfig, n_steps: int, lr_scales: Mapping[str, float] | None = None
) -> optax.GradientTransformation:
    """The chain of one run: clip by global norm, Adam, learning rate, factors of single leaves.

    Args:
      config: see `OptimConfig`.
      n_steps: steps of the whole run, which place warm-up and decay.
      lr_scales: factor on the rate of the leaves with a name, `Sparsifier.lr_scales()`; 0 freezes them.

    Returns:
      An Optax transformation; its moments take the dtype of the parameters, float32.

    Source:
      Kingma and Ba, Adam, 2015; the recipes of Gao et al. 2024 (TopK) and Anthropic, April 2024 (L1).
    """
    clip = [] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm)]
    return optax.chain(
        *clip,
        optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.eps),
        optax.scale_by_learning_rate(schedule(config, n_steps)),
        *([_scale_leaves(lr_scales)] if lr_scales else []),
    )


def _scale_leaves(factors: Mapping[str, float]) -> optax.GradientTransformation:
    """Multiplies the updates of the leaves whose path ends in a name."""

    def scaled(path: tuple[Any, ...], update: Any) -> Any:
        name = getattr(path[-1], "name", None) or getattr(path[-1], "key", None)
        return update * factors.get(str(name), 1.0)

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(scaled, updates))
