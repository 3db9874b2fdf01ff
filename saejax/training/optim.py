"""Optimiser: clipping, one of four update rules, and a learning rate with warm-up, plateau and decay.

A rule stores its state in trees with the parameters' own leaf names, so `sharding.SPECS` places it.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from saejax.errors import UserError
from saejax.fields import numeric
from saejax.fields.resume_policy import Fixed, Free

# Root mean square of an orthogonalised update, that of Adam's: the same `lr` then suits both (Liu et al. 2025).
_MUON_RMS = 0.2


class Optimiser(enum.Enum):
    """Update rule: gradients to updates."""

    adam = "adam"
    """Gradient over the root of its running square."""
    muon = "muon"
    """Matrices: the orthogonalised running gradient, of Adam's size; vectors: Adam."""
    schedule_free = "schedule_free"
    """Adam without momentum, whose iterates are averaged: no decay; the average is evaluated, exported and loaded."""
    sign = "sign"
    """The sign of the running gradient; wants a tenth or so of Adam's rate."""


class Ramp(enum.Enum):
    """Shape of the rise or fall of the learning rate."""

    linear = "linear"
    cosine = "cosine"


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Update rule and schedule; shares are of the whole run, so that a longer run keeps its shape."""

    name: Fixed[Optimiser] = Optimiser.adam
    """adam, muon (matrices; Adam on vectors), schedule_free or sign."""
    lr: Free[float] = 1e-3
    """Peak learning rate. 1e-3 suits 4k to 16k latents at batch 1k to 4k; wider SAEs want less, as 1 / sqrt(d_sae)."""
    lr_reference_d_sae: Free[int | None] = None
    """Width that `lr` was chosen for, at least 1: the peak is then lr sqrt(this / sae.d_sae); null takes lr itself."""
    beta1: Free[float] = 0.9
    """Decay of the running gradient, in [0, 1); schedule_free: how near its average gradients are taken, above 0."""
    beta2: Free[float] = 0.999
    """Decay of the running square, in [0, 1); no effect on sign."""
    eps: Free[float] = 1e-8
    """Added to the root of the running square (muon: to the norm of a matrix); no effect on sign."""
    clip_norm: Free[float | None] = 1.0
    """Largest global norm of the gradient; null does not clip."""
    warmup_share: Free[float] = 0.05
    """Share of the steps over which the rate rises from zero, in [0, 1]."""
    warmup: Free[Ramp] = Ramp.linear
    """Shape of the rise: linear or cosine."""
    decay_share: Free[float] = 0.2
    """Share of the steps, at the end, over which the rate falls to zero, in [0, 1]; no effect on schedule_free."""
    decay: Free[Ramp] = Ramp.linear
    """Shape of the fall: linear or cosine."""

    def __post_init__(self) -> None:
        numeric.check(self, "optim.")
        if self.lr <= 0:
            raise UserError(f"optim.lr must be above 0, got {self.lr}")
        if self.lr_reference_d_sae is not None and self.lr_reference_d_sae < 1:
            raise UserError(f"optim.lr_reference_d_sae must be at least 1 or null, got {self.lr_reference_d_sae}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"optim.{name} must be in [0, 1), got {getattr(self, name)}")
        if self.name is Optimiser.schedule_free and self.beta1 == 0:
            raise UserError("optim.beta1 must be above 0 with optim.name=schedule_free, got 0")
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

    @property
    def averages(self) -> bool:
        """Whether the rule brings its own average of the parameters."""
        return self.name is Optimiser.schedule_free


def schedule(config: OptimConfig, n_steps: int, d_sae: int | None = None) -> optax.Schedule:
    """The learning rate at every step: rise, constant, fall to zero.

    Args:
      config: peak rate, shares and shapes.
      n_steps: steps of the whole run.
      d_sae: width of the SAE, for `lr_reference_d_sae`.

    Returns:
      A function from step to learning rate.

    Examples:
      >>> rate = schedule(OptimConfig(lr=1.0, warmup_share=0.1, decay_share=0.5), 100)
      >>> [round(float(rate(step)), 3) for step in (0, 5, 10, 50, 75, 100)]
      [0.0, 0.5, 1.0, 1.0, 0.5, 0.0]
      >>> wide = OptimConfig(lr=1.0, lr_reference_d_sae=16384, warmup_share=0.0)
      >>> float(schedule(wide, 100, d_sae=65536)(50))
      0.5
    """
    peak = config.lr
    if config.lr_reference_d_sae is not None:
        if d_sae is None:
            raise ValueError("optim.lr_reference_d_sae needs the width of the SAE")
        peak = config.lr * math.sqrt(config.lr_reference_d_sae / d_sae)
    n_warmup = round(config.warmup_share * n_steps)
    n_decay = 0 if config.averages else round(config.decay_share * n_steps)  # of none, the last piece never begins
    pieces = [
        _ramp(config.warmup, 0.0, peak, max(n_warmup, 1)),
        optax.constant_schedule(peak),
        _ramp(config.decay, peak, 0.0, max(n_decay, 1)),
    ]
    return optax.join_schedules(pieces, [n_warmup, n_steps - n_decay])


def _ramp(shape: Ramp, start: float, end: float, n_steps: int) -> optax.Schedule:
    if shape is Ramp.linear:
        return optax.linear_schedule(start, end, n_steps)
    return lambda step: start + (end - start) * (1 - jnp.cos(jnp.pi * jnp.clip(step / n_steps, 0, 1))) / 2


def make(
    config: OptimConfig, n_steps: int, lr_scales: Mapping[str, float] | None = None, *, d_sae: int | None = None
) -> optax.GradientTransformation:
    """The chain of one run: clip by global norm, update rule, learning rate, factors of single leaves.

    Args:
      config: see `OptimConfig`.
      n_steps: steps of the whole run, which place warm-up and decay.
      lr_scales: factor on the rate of the leaves with a name, `Sparsifier.lr_scales()`; 0 freezes them.
      d_sae: width of the SAE, for `lr_reference_d_sae`.

    Returns:
      An Optax transformation; what it stores takes the dtype of the parameters, float32.

    Source:
      Kingma and Ba, Adam, 2015; the recipes of Gao et al. 2024 (TopK) and Anthropic, April 2024 (L1); Jordan et al.,
      Muon, 2024, scaled as Liu et al. 2025 (arXiv:2502.16982); Defazio et al., The road less scheduled, 2024
      (arXiv:2405.15682); Bernstein et al., signSGD, 2018.
    """
    rate = schedule(config, n_steps, d_sae)
    scaled = [_scale_leaves(lr_scales)] if lr_scales else []
    parts = [_rule(config), optax.scale_by_learning_rate(rate), *scaled]
    if config.averages:
        frozen = {name: 0.0 for name, factor in (lr_scales or {}).items() if factor == 0}
        # Frozen leaves may move by other means (`Sparsifier.track`); averaging must not pull them back.
        parts = [contrib.schedule_free(optax.chain(*parts), rate, b1=config.beta1), _scale_leaves(frozen)]
    clip = [] if config.clip_norm is None else [_clip(config.clip_norm)]
    return optax.chain(*clip, *parts)


def _clip(largest_norm: float) -> optax.GradientTransformation:
    """As `optax.clip_by_global_norm`, by one factor, which the update rule takes in without another pass."""

    def clipped(updates: Any, _: Any) -> Any:
        norm = optax.tree.norm(updates)
        factor = jnp.where(norm > largest_norm, largest_norm / norm, 1.0)
        return jax.tree.map(lambda update: factor * update, updates)

    return optax.stateless(clipped)


def _rule(config: OptimConfig) -> optax.GradientTransformation:
    adam = optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.eps)
    match config.name:
        case Optimiser.adam:
            return adam
        case Optimiser.schedule_free:
            return optax.scale_by_rms(config.beta2, config.eps, eps_in_sqrt=False, bias_correction=True)
        case Optimiser.sign:
            return optax.chain(optax.ema(config.beta1, debias=False), optax.scale_by_sign())
        case Optimiser.muon:
            return optax.partition(
                {"muon": _muon(config), "adam": adam},
                lambda params: jax.tree.map(lambda leaf: "muon" if leaf.ndim == 2 else "adam", params),
            )


def _muon(config: OptimConfig) -> optax.GradientTransformation:
    """Orthogonalised momentum of matrices, scaled to a root mean square that does not depend on their shape."""

    def resized(updates: Any, _: Any) -> Any:
        return jax.tree.map(lambda update: update * (_MUON_RMS * math.sqrt(max(update.shape))), updates)

    def as_matrices(tree: Any) -> Any:
        return jax.tree.map(lambda _: contrib.MuonDimensionNumbers(), tree)

    orthogonal = contrib.scale_by_muon(beta=config.beta1, eps=config.eps, weight_dimension_numbers=as_matrices)
    return optax.chain(orthogonal, optax.stateless(resized))


def _scale_leaves(factors: Mapping[str, float]) -> optax.GradientTransformation:
    """Multiplies the updates of the leaves whose path ends in a name."""

    def scaled(path: tuple[Any, ...], update: Any) -> Any:
        return update * factors.get(leaf_name(path), 1.0)

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(scaled, updates))


def leaf_name(path: tuple[Any, ...]) -> str:
    """The last name on a leaf's path: that of the parameter it is, or belongs to."""
    return str(getattr(path[-1], "name", None) or getattr(path[-1], "key", None))


def map_iterates(opt_state: Any, f: Callable[[Any], Any]) -> Any:
    """Apply `f` to copies of the parameters inside an optimiser state: the fast iterate of schedule_free.

    Args:
      opt_state: of `make`.
      f: from parameters to parameters.

    Returns:
      The state with `f` of them; unchanged for every other rule.
    """

    def mapped(node: Any) -> Any:
        return node._replace(z=f(node.z)) if _is_free(node) else node

    return jax.tree.map(mapped, opt_state, is_leaf=_is_free)


def brings_average(opt_state: Any) -> bool:
    """Whether an optimiser state is that of a rule with its own average."""
    return any(_is_free(node) for node in jax.tree.leaves(opt_state, is_leaf=_is_free))


def average(opt_state: Any, params: Any) -> Any:
    """The average of the iterates of schedule_free, x = (y - (1 - beta1) z) / beta1.

    Args:
      opt_state: of `make` with `name=schedule_free`.
      params: y, where gradients are taken.

    Returns:
      x, of the structure of `params`.
    """
    (free,) = [node for node in jax.tree.leaves(opt_state, is_leaf=_is_free) if _is_free(node)]
    return contrib.schedule_free_eval_params(free, params)


def _is_free(node: Any) -> bool:
    return isinstance(node, contrib.ScheduleFreeState)
