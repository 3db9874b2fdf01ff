"""Resampling: dead latents restart in the direction of badly reconstructed rows.

Every so many steps each dead latent takes a row of the batch, drawn without replacement with probability proportional
to the square of its loss. Its decoder row becomes the direction of that row (from b_dec), with the mean norm of alive
decoder rows. Its encoder column gets the same direction, with 0.2 times the mean norm of alive columns. Its bias
becomes 0, parameters of the architecture (thresholds, gate scales) return to their start, and its optimiser state
becomes 0. A batch of b rows serves at most b latents; others wait. Behind a hidden layer the column follows the hidden
row. A tied encoder stays the decoder's transpose. A transcoder takes decoder rows from the targets, and encoder
columns from its input minus the batch's mean. A cross-layer one takes them only from the sites of the latent.

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

from saejax.parallel import sharding
from saejax.sae import base, encoders, sites
from saejax.sae.layout import EncoderKind, Family
from saejax.training import liveness, optim
from saejax.training.state import TrainState

ENCODER_SHARE = 0.2
"""Norm of a new encoder column over the mean norm of alive ones."""


def apply(
    sparsifier: base.Sparsifier,
    state: TrainState,
    rows: Float[Array, "b d_row"],
    recon: Float[Array, "b d_out"],
    dead: Bool[Array, " d_sae"],
    key: Key[Array, ""],
) -> tuple[TrainState, Float[Array, ""]]:
    """Give dead latents a new start; nothing else changes, not by a bit.

    Args:
      sparsifier: architecture.
      state: after the optimiser step.
      rows: normalised rows of the step.
      recon: reconstruction of their targets.
      dead: latents to resample.
      key: for the draw of rows.

    Returns:
      (state, number of latents resampled).
    """
    x, target = sparsifier.split(rows)
    losses = jnp.sum((target - recon) ** 2, axis=1)
    chosen, taken = _draw(losses, dead, key)
    new = _started(sparsifier, state.params, x, target, taken, alive=~dead)

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
    """Rows for dead latents, [d_sae] (any where none): successive draws by Gumbel's trick."""
    scores = 2 * jnp.log(losses) + jax.random.gumbel(key, losses.shape)
    order = jnp.argsort(-scores)
    rank = jnp.cumsum(dead) - 1
    return dead & (rank < len(losses)), order[jnp.clip(rank, 0, len(losses) - 1)]


def _started(
    sparsifier: base.Sparsifier,
    params: base.SAEParams,
    x: Array,
    target: Array,
    rows: Array,
    *,
    alive: Bool[Array, " d_sae"],
) -> base.SAEParams:
    """Parameters in which every latent is newly made from its row."""
    centred = target - params.b_dec[None, :]
    read = centred if sparsifier.mirrors else x - jnp.mean(x, axis=0, keepdims=True)
    if sparsifier.encoder is EncoderKind.mlp:
        read, _ = encoders.inputs(sparsifier, params, x, lambda pre_acts: pre_acts)
    alive = alive | ~jnp.any(alive)
    n_alive = jnp.sum(alive)
    column = jnp.sum(jnp.where(alive, jnp.linalg.norm(params.W_enc, axis=0), 0)) / n_alive
    row = jnp.sum(jnp.where(alive, jnp.linalg.norm(params.W_dec, axis=1), 0)) / n_alive
    if sparsifier.family is Family.clt:
        by_site = read.reshape(len(x), sparsifier.n_groups, -1)
        columns = _directions(by_site[rows, sites.groups(sparsifier)])
        written = _directions(jnp.where(sites.mask(sparsifier), centred[rows], 0))
    else:
        columns, written = _directions(read)[rows], _directions(centred)[rows]
    new = dataclasses.replace(
        params,
        W_enc=ENCODER_SHARE * column * columns.T,
        b_enc=jnp.zeros_like(params.b_enc),
        W_dec=row * written,
        extra=params.extra | sparsifier.extra(),
    )
    return sparsifier.constrain(new)


def _directions(rows: Float[Array, "b n"]) -> Float[Array, "b n"]:
    return rows / jnp.maximum(jnp.linalg.norm(rows, axis=1, keepdims=True), 1e-20)
