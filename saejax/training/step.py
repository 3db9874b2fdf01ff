"""Training step, compiled once: draw a batch, loss and gradients, optimiser, constraint, liveness, metrics."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Required, TypedDict, Unpack

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key

from saejax.activations import buffer, normalize
from saejax.sae import base
from saejax.training import ema, liveness, optim, resample
from saejax.training.state import TrainState

Step = Callable[[TrainState, jax.Array], tuple[TrainState, dict[str, jax.Array]]]
Learn = Callable[[TrainState, jax.Array, jax.Array], tuple[TrainState, dict[str, jax.Array]]]


class Settings(TypedDict, total=False):
    """Settings of a step beside its architecture and optimiser."""

    dead_window_tokens: Required[int]
    """Tokens without firing after which a latent is dead."""
    learning_rate: Required[optax.Schedule]
    """The schedule inside the optimiser, for the log."""
    ema_decay: float | None
    """Of the average of the parameters, where the state keeps one; None takes that of the optimiser."""
    resample_every_steps: int | None
    """Steps between two resamplings of dead latents; None never does."""
    skip_nonfinite: bool
    """Whether a step that is not finite leaves all but the buffer as it was; `skipped`, 0 or 1, is then a metric."""


def make(sparsifier: base.Sparsifier, tx: optax.GradientTransformation, **settings: Unpack[Settings]) -> Step:
    """Build the training step of one architecture.

    Args:
      sparsifier: architecture; its `value_and_grad`, `project`, `constrain` and `track` are used.
      tx: optimiser.
      **settings: see `Settings`.

    Returns:
      step(state, fresh) -> (state, metrics), pure and not yet jitted; fresh is [n_lanes, block_rows, d_row] in the
      dtype of the source. Metrics are float32 scalars: loss, each loss term, fvu, l0, dead_share, grad_norm (after
      projection, before clipping), param_norm (after the step), lr and, where latents are resampled, their number.
    """
    learn = make_learn(sparsifier, tx, **settings)

    def step(state: TrainState, fresh: Float[Array, "lanes rows d_row"]) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(state.key, state.step)
        new_buffer, x = draw(state.buffer, state.normalizer, fresh, key)
        return learn(dataclasses.replace(state, buffer=new_buffer), x, key)

    return step


def draw(
    waiting: buffer.BufferState,
    normalizer: normalize.Normalizer,
    fresh: Float[Array, "lanes rows d_row"],
    key: Key[Array, ""],
) -> tuple[buffer.BufferState, Float[Array, "b d_row"]]:
    """The buffer after one swap, and the normalised rows that left it."""
    new_buffer, drawn = buffer.swap(waiting, fresh, key)
    return new_buffer, normalize.apply(normalizer, drawn.reshape(-1, drawn.shape[-1]))


def make_learn(
    sparsifier: base.Sparsifier,
    tx: optax.GradientTransformation,
    *,
    dead_window_tokens: int,
    learning_rate: optax.Schedule,
    ema_decay: float | None = None,
    resample_every_steps: int | None = None,
    skip_nonfinite: bool = False,
) -> Learn:
    """The part of the step that comes after the draw, and that members of an ensemble do not share.

    Args:
      sparsifier, tx: as in `make`.
      dead_window_tokens, learning_rate, ema_decay, resample_every_steps, skip_nonfinite: see `Settings`.

    Returns:
      learn(state, x, key) -> (state, metrics): x [b, d_row] normalised, key that of the step. Neither the buffer nor
      the normaliser of the state is read or changed.
    """

    def learn(
        state: TrainState, x: Float[Array, "b d_row"], key: Key[Array, ""]
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        dead = liveness.dead(state.liveness, dead_window_tokens)
        (loss, aux), grads = sparsifier.value_and_grad(state.params, x, dead=dead, step=state.step)
        grads = sparsifier.project(state.params, grads)
        new_params, opt_state = _apply(tx, grads, state)
        params = sparsifier.track(sparsifier.constrain(new_params), aux, state.step)
        opt_state = optim.map_iterates(opt_state, sparsifier.constrain)
        average = state.average
        if average is not None:
            average = ema.update(sparsifier, average, params, opt_state, decay=ema_decay, step=state.step)
        metrics = {
            "loss": loss,
            **aux.terms,
            "fvu": _fvu(sparsifier.split(x)[1], aux.recon),
            "l0": jnp.mean(aux.encoding.l0()),
            "dead_share": jnp.mean(dead, dtype=jnp.float32),
            "grad_norm": optax.tree.norm(grads),
            "param_norm": optax.tree.norm(params),
            "lr": jnp.asarray(learning_rate(state.step), jnp.float32),
        }
        new_state = dataclasses.replace(
            state,
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            liveness=liveness.update(state.liveness, aux.encoding.fired(), x.shape[0]),
            average=average,
        )
        if resample_every_steps is not None:
            new_state, metrics["resampled"] = _resampled(new_state, x, aux.recon, key)
        if skip_nonfinite:
            new_state, metrics["skipped"] = _undone_unless_finite(state, new_state, metrics)
        return new_state, metrics

    def _resampled(state: TrainState, x: jax.Array, recon: jax.Array, key: jax.Array) -> tuple[TrainState, jax.Array]:
        dead = liveness.dead(state.liveness, dead_window_tokens)
        due = (state.step % (resample_every_steps or 1) == 0) & jnp.any(dead)
        return jax.lax.cond(
            due,
            lambda: resample.apply(sparsifier, state, x, recon, dead, jax.random.fold_in(key, 1)),
            lambda: (state, jnp.zeros(())),
        )

    return learn


def _undone_unless_finite(
    before: TrainState, after: TrainState, metrics: dict[str, jax.Array]
) -> tuple[TrainState, jax.Array]:
    """`after`, without its learning if the step was not finite; and whether it was."""
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"]) & jnp.isfinite(metrics["param_norm"])
    learned = {
        name: jax.tree.map(lambda new, old: jnp.where(finite, new, old), getattr(after, name), getattr(before, name))
        for name in ("params", "opt_state", "liveness", "average")
    }
    return dataclasses.replace(after, **learned), 1.0 - finite


def _apply(tx: optax.GradientTransformation, grads: Any, state: TrainState) -> tuple[Any, Any]:
    """Parameters and optimiser state after one update; Optax's types know no dataclasses."""
    params: Any = state.params
    updates, opt_state = tx.update(grads, state.opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def _fvu(x: Float[Array, "b d_out"], recon: Float[Array, "b d_out"]) -> Float[Array, ""]:
    """Fraction of variance unexplained within this batch: sum ||x - recon||^2 / sum ||x - batch mean||^2."""
    return jnp.sum((x - recon) ** 2) / jnp.sum((x - jnp.mean(x, axis=0, keepdims=True)) ** 2)
