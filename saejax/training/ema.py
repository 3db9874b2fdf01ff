"""Parameter averages over the steps: evaluated, exported and loaded in place of the last parameters.

It is either an exponential average (`train.ema_decay`) or the average of schedule_free. `TrainState.average` holds it,
always on the constraint of the architecture, so it can be used directly.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from saejax.sae import base
from saejax.training import optim


def decay_at(decay: float, step: Int[Array, ""]) -> Float[Array, ""]:
    """The decay after `step` optimiser steps: `decay`, less at first, so that the start of the run is forgotten.

    min(decay, (1 + step) / (10 + step)).

    Examples:
      >>> [round(float(decay_at(0.99, jnp.asarray(step))), 2) for step in (0, 90, 10_000)]
      [0.1, 0.91, 0.99]
    """
    return jnp.minimum(decay, (1 + step) / (10 + step))


def update(
    sparsifier: base.Sparsifier,
    average: base.SAEParams,
    params: base.SAEParams,
    opt_state: Any,
    *,
    decay: float | None,
    step: Int[Array, ""],
) -> base.SAEParams:
    """The average after one more optimiser step.

    Args:
      sparsifier: architecture; its `constrain` holds for the average too.
      average: before the step.
      params: after it.
      opt_state: after it.
      decay: of the exponential average; None takes that of schedule_free.
      step: optimiser steps taken before.

    Returns:
      average <- d average + (1 - d) params, constrained. Leaves that the optimiser does not move (running statistics)
      are those of `params`.
    """
    if decay is None:
        mixed = optim.average(opt_state, params)
    else:
        d = decay_at(decay, step)
        mixed = jax.tree.map(lambda old, new: d * old + (1 - d) * new, average, params)
    frozen = {name for name, factor in sparsifier.lr_scales().items() if factor == 0}

    def kept(path: tuple[Any, ...], mean: jax.Array, now: jax.Array) -> jax.Array:
        return now if optim.leaf_name(path) in frozen else mean

    return sparsifier.constrain(jax.tree_util.tree_map_with_path(kept, mixed, params))
