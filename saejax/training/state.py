"""The one thing that is sharded, donated and saved, and how it is born on its mesh."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Float

from saejax import sharding
from saejax.activations import buffer, normalize
from saejax.sae import base
from saejax.training import liveness
from saejax.training.settings import DecoderBias, TrainConfig


@struct.dataclass
class TrainState:
    """Everything that the next step depends on, but for the position of the loader, which the host keeps.

    Attributes:
      step: optimiser steps taken, int32 scalar.
      params: parameters of the SAE on normalised rows, float32.
      opt_state: Optax state of the same layout.
      liveness: tokens since each latent fired.
      buffer: rows waiting to be drawn.
      normalizer: mean and scale that rows get before the SAE sees them.
      key: typed key; every step folds its number into it, so it never changes.
    """

    step: jax.Array
    params: base.SAEParams
    opt_state: Any
    liveness: liveness.Liveness
    buffer: buffer.BufferState
    normalizer: normalize.Normalizer
    key: jax.Array


def create(
    sparsifier: base.Sparsifier,
    tx: optax.GradientTransformation,
    config: TrainConfig,
    normalizing: normalize.NormalizeConfig,
    first_rows: Float[Array, "lanes batches rows d_in"],
    *,
    seed: int,
    mesh: Mesh,
) -> TrainState:
    """A new state, every leaf born where `sharding.SPECS` wants it.

    Args:
      sparsifier: architecture.
      tx: optimiser.
      config: start of the decoder bias.
      normalizing: how rows are centred and scaled.
      first_rows: first filling of the buffer, in the dtype of the source, sharded over `data`.
      seed: fixes parameters and draws.
      mesh: where the state lives.

    Returns:
      State at step 0.
    """
    shapes = abstract(sparsifier, tx, first_rows, mesh=mesh)
    build = jax.jit(
        functools.partial(_build, sparsifier, tx), out_shardings=jax.tree.map(lambda leaf: leaf.sharding, shapes)
    )
    with jax.set_mesh(mesh):
        # Whole batches, not single rows: the lane axis stays evenly sharded.
        n_batches = -(-normalizing.rows // config.batch)
        sample = first_rows[:, :n_batches].reshape(-1, first_rows.shape[-1])
        normalizer = normalize.estimate(sample, normalizing.mode, center=normalizing.center)
        bias = _decoder_bias(config.b_dec_init, normalize.apply(normalizer, sample))
        return build(first_rows, normalizer, bias, jax.random.key(seed))


def abstract(
    sparsifier: base.Sparsifier, tx: optax.GradientTransformation, first_rows: Any, *, mesh: Mesh
) -> TrainState:
    """The state's shapes, dtypes and shardings without its values: what a checkpoint is restored into.

    Args:
      sparsifier: architecture.
      tx: optimiser.
      first_rows: anything with the shape [n_lanes, n_batches, block_rows, d_in] and dtype of the buffer.
      mesh: where the state shall live.

    Returns:
      A `TrainState` of `jax.ShapeDtypeStruct`.
    """
    vector: Any = jax.ShapeDtypeStruct((sparsifier.d_in,), jnp.float32)
    scalar: Any = jax.ShapeDtypeStruct((), jnp.float32)
    normalizer = normalize.Normalizer(mean=vector, scale=scalar)
    rows = jax.ShapeDtypeStruct(first_rows.shape, first_rows.dtype)
    key = jax.eval_shape(lambda: jax.random.key(0))
    shapes = jax.eval_shape(functools.partial(_build, sparsifier, tx), rows, normalizer, vector, key)
    shardings = sharding.tree_shardings(mesh, shapes)
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, shardings)


def _build(
    sparsifier: base.Sparsifier,
    tx: optax.GradientTransformation,
    rows: Float[Array, "lanes batches rows d_in"],
    normalizer: normalize.Normalizer,
    bias: Float[Array, " d_in"],
    key: jax.Array,
) -> TrainState:
    key_params, key_draws = jax.random.split(key)
    params: Any = dataclasses.replace(sparsifier.init(key_params), b_dec=bias)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=tx.init(params),
        liveness=liveness.init(sparsifier.d_sae),
        buffer=buffer.create(rows),
        normalizer=normalizer,
        key=key_draws,
    )


def _decoder_bias(start: DecoderBias, rows: Float[Array, "n d_in"]) -> Float[Array, " d_in"]:
    """b_dec at step 0, from normalised rows."""
    if start is DecoderBias.zero:
        return jnp.zeros(rows.shape[-1], jnp.float32)
    if start is DecoderBias.mean:
        return jnp.mean(rows, axis=0)
    return normalize.geometric_median(rows)
