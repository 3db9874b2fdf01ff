"""Dead latents start anew in the direction of rows that are reconstructed badly.

Every so many steps each dead latent takes a row of the batch, drawn without replacement with probability proportional
to the square of its loss. Its decoder row becomes the direction of that row (from b_dec), with the mean norm of alive
decoder rows; its encoder column the same direction, with 0.2 times the mean norm of alive columns; its bias 0; what
its architecture adds (thresholds, gate scales) as at the start; everything that the optimiser stores for it 0. A batch
of b rows serves at most b latents; others wait for the next time. Behind a hidden layer the column follows the hidden
row. A tied encoder stays the decoder's transpose.

Source:
  Bricken et al., Towards monosemanticity, 2023, appendix "Neuron resampling". There rows come from 819,200 inputs,
  here from the batch of the step.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from saejax import sharding
from saejax.sae import base, encoders
from saejax.training import liveness, optim
from saejax.training.state import TrainState

ENCODER_SHARE = 0.2
"""Norm of a new encoder column over the mean norm of alive ones."""


def apply(
    sparsifier: base.Sparsifier,
    state: TrainState,
    x: Float[Array, "b d_in"],
    recon: Float[Array, "b d_in"],
    dead: Bool[Array, " d_sae"],
    key: Key[Array, ""],
) -> tuple[TrainState, Float[Array, ""]]:
    """Give dead latents a new start; nothing else changes, not by a bit.

    Args:
      sparsifier: architecture.
      state: after the optimiser step.
      x: normalised rows of the step.
      recon: their reconstruction.
      dead: latents to resample.
      key: for the draw of rows.

    Returns:
      (state, number of latents resampled).
    """
    losses = jnp.sum((x - recon) ** 2, axis=1)
    chosen, rows = _draw(losses, dead, key)
    new = _started(sparsifier, state.params, x, rows, alive=~dead)

    def renewed(tree: Any) -> Any:
        return on_latents(chosen, tree, new)

    cleared = on_latents(chosen, state.opt_state, jax.tree.map(jnp.zeros_like, state.opt_state))
    counters = jnp.where(chosen, 0, state.liveness.tokens_since_fired)
    state = dataclasses.replace(
        state,
        params=renewed(state.params),
        average=None if state.average is None else renewed(state.average),
        opt_state=optim.map_iterates(cleared, renewed),
        liveness=liveness.Liveness(tokens_since_fired=counters),
    )
    return state, jnp.sum(chosen, dtype=jnp.float32)


def on_latents(chosen: Bool[Array, " d_sae"], tree: Any, new: Any) -> Any:
    """Replace the slices of some latents in every leaf that `sharding.SPECS` splits by latents.

    Args:
      chosen: which latents.
      tree: parameters, or an optimiser state whose leaves are named like them.
      new: of the same structure.

    Returns:
      `tree` with the slices of `new`; leaves without a latent axis stay.
    """

    def replaced(path: tuple[Any, ...], leaf: jax.Array, other: jax.Array) -> jax.Array:
        axis = sharding.latent_axis(path, leaf)
        if axis is None:
            return leaf
        shape = [1] * leaf.ndim
        shape[axis] = -1
        return jnp.where(chosen.reshape(shape), other, leaf)

    return jax.tree_util.tree_map_with_path(replaced, tree, new)


def _draw(
    losses: Float[Array, " b"], dead: Bool[Array, " d_sae"], key: Key[Array, ""]
) -> tuple[Bool[Array, " d_sae"], Any]:
    """Which latents get a row, and which row, [d_sae] (any where none): successive draws by Gumbel's trick."""
    scores = 2 * jnp.log(losses) + jax.random.gumbel(key, losses.shape)
    order = jnp.argsort(-scores)
    rank = jnp.cumsum(dead) - 1
    return dead & (rank < len(losses)), order[jnp.clip(rank, 0, len(losses) - 1)]


def _started(
    sparsifier: base.Sparsifier, params: base.SAEParams, x: Array, rows: Array, *, alive: Bool[Array, " d_sae"]
) -> base.SAEParams:
    """Parameters in which every latent is newly made from its row."""
    read = centred = x - params.b_dec[None, :]
    if sparsifier.encoder is encoders.EncoderKind.mlp:
        read, _ = encoders.inputs(sparsifier, params, x, lambda pre_acts: pre_acts)
    alive = alive | ~jnp.any(alive)
    n_alive = jnp.sum(alive)
    column = jnp.sum(jnp.where(alive, jnp.linalg.norm(params.W_enc, axis=0), 0)) / n_alive
    row = jnp.sum(jnp.where(alive, jnp.linalg.norm(params.W_dec, axis=1), 0)) / n_alive
    new = dataclasses.replace(
        params,
        W_enc=ENCODER_SHARE * column * _directions(read)[rows].T,
        b_enc=jnp.zeros_like(params.b_enc),
        W_dec=row * _directions(centred)[rows],
        extra=params.extra | sparsifier.extra(),
    )
    return sparsifier.constrain(new)


def _directions(rows: Float[Array, "b n"]) -> Float[Array, "b n"]:
    return rows / jnp.maximum(jnp.linalg.norm(rows, axis=1, keepdims=True), 1e-20)
