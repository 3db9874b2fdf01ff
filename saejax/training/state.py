"""`TrainState`: everything that is sharded, donated and saved, and its creation on a mesh."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Float

from saejax.activations import buffer, normalize
from saejax.parallel import sharding
from saejax.sae import base
from saejax.training import liveness, optim, start
from saejax.training.settings import EncoderBias, TrainConfig


@struct.dataclass
class TrainState:
    """Everything that the next step depends on, except the position of the loader, which the host keeps.

    Attributes:
      step: optimiser steps taken, int32 scalar.
      params: parameters of the SAE on normalised rows, float32.
      opt_state: Optax state of the same layout.
      liveness: tokens since each latent fired.
      buffer: rows waiting to be drawn.
      normalizer: mean and scale that rows get before the SAE sees them.
      key: typed key; every step folds its number into it, so it never changes.
      average: average of the parameters over the steps (`ema`), None where none is kept.
    """

    step: jax.Array
    params: base.SAEParams
    opt_state: Any
    liveness: liveness.Liveness
    buffer: buffer.BufferState
    normalizer: normalize.Normalizer
    key: jax.Array
    average: base.SAEParams | None = None

    @property
    def chosen(self) -> base.SAEParams:
        """The parameters that are evaluated, exported and loaded: the average where there is one."""
        return self.params if self.average is None else self.average


def create(
    sparsifier: base.Sparsifier,
    tx: optax.GradientTransformation,
    config: TrainConfig,
    normalizing: normalize.NormalizeConfig,
    first_rows: Float[Array, "lanes batches rows d_row"],
    *,
    seed: int,
    data_seed: int | None = None,
    mesh: Mesh,
) -> TrainState:
    """A new state, every leaf born where `sharding.SPECS` wants it.

    Args:
      sparsifier: architecture.
      tx: optimiser.
      config: start of the biases, and whether an average is kept.
      normalizing: how rows are centred and scaled.
      first_rows: first filling of the buffer, in the dtype of the source, sharded over `data`.
      seed: fixes parameters, and draws where `data_seed` is None.
      data_seed: fixes draws.
      mesh: where the state lives.

    Returns:
      State at step 0.
    """
    draws = seed if data_seed is None else data_seed
    (made,) = create_many(
        sparsifier, tx, config, normalizing, first_rows, seeds=(seed,), data_seed=draws, mesh=mesh
    )  # fmt: skip
    return made


def create_many(
    sparsifier: base.Sparsifier,
    tx: optax.GradientTransformation,
    config: TrainConfig,
    normalizing: normalize.NormalizeConfig,
    first_rows: Float[Array, "lanes batches rows d_row"],
    *,
    seeds: Sequence[int],
    data_seed: int,
    mesh: Mesh,
) -> list[TrainState]:
    """States of several seeds on one stream, each bit for bit what `create` makes; only the first has a buffer.

    Args:
      sparsifier, tx, config, normalizing, first_rows, data_seed, mesh: as in `create`.
      seeds: one for each state.
    """
    shapes = abstract(sparsifier, tx, config, normalizing, first_rows, mesh=mesh)
    build = jax.jit(
        functools.partial(_build, sparsifier, tx, config),
        out_shardings=jax.tree.map(lambda leaf: leaf.sharding, shapes),
    )
    with jax.set_mesh(mesh):
        rows = sample(first_rows, normalizing.rows, config.batch)
        normalizer = normalize.estimate(
            rows,
            normalizing.mode,
            center=normalizing.center,
            preferred=normalize.NormMode[sparsifier.preferred_norm],
            whiten_eps=normalizing.whiten_eps,
            sites=sparsifier.sites,
        )
        bias = start.decoder_bias(config.b_dec_init, sparsifier.split(normalize.apply(normalizer, rows))[1])
        made: list[Any] = []
        for seed in seeds:
            born = build(first_rows, normalizer, bias, jax.random.key(seed), jax.random.key(data_seed))
            made.append(dataclasses.replace(born, buffer=None) if made else born)
    return made


def sample(first_rows: Float[Array, "lanes batches rows d_row"], n_rows: int, batch: int) -> Float[Array, "n d_row"]:
    """The first rows of a filling: whole batches, so that the lane axis stays evenly sharded."""
    return first_rows[:, : -(-n_rows // batch)].reshape(-1, first_rows.shape[-1])


def abstract(
    sparsifier: base.Sparsifier,
    tx: optax.GradientTransformation,
    config: TrainConfig,
    normalizing: normalize.NormalizeConfig,
    first_rows: Any,
    *,
    mesh: Mesh,
) -> TrainState:
    """Shapes, dtypes and shardings of the state without its values: the target of a restore.

    Args:
      sparsifier: architecture.
      tx: optimiser.
      config: whether an average is kept.
      normalizing: how rows are centred and scaled.
      first_rows: anything with the shape [n_lanes, n_batches, block_rows, d_row] and dtype of the buffer.
      mesh: where the state shall live.

    Returns:
      A `TrainState` of `jax.ShapeDtypeStruct`.
    """
    vector: Any = jax.ShapeDtypeStruct((sparsifier.d_out,), jnp.float32)
    normalizer = normalize.abstract(normalizing.mode, sparsifier.d_row, sparsifier.sites)
    rows = jax.ShapeDtypeStruct(first_rows.shape, first_rows.dtype)
    key = jax.eval_shape(lambda: jax.random.key(0))
    shapes = jax.eval_shape(functools.partial(_build, sparsifier, tx, config), rows, normalizer, vector, key, key)
    shardings = sharding.tree_shardings(mesh, shapes)
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, shardings)


def _build(
    sparsifier: base.Sparsifier,
    tx: optax.GradientTransformation,
    config: TrainConfig,
    rows: Float[Array, "lanes batches rows d_row"],
    normalizer: normalize.Normalizer,
    bias: Float[Array, " d_out"],
    key: jax.Array,
    data_key: jax.Array,
) -> TrainState:
    key_params, key_draws = jax.random.split(key)[0], jax.random.split(data_key)[1]
    params: Any = dataclasses.replace(sparsifier.init(key_params), b_dec=bias)
    if config.b_enc_init is EncoderBias.firing_rate:
        calibrating = normalize.apply(normalizer, sample(rows, start.ROWS, config.batch))
        b_enc = start.encoder_bias(sparsifier, params, sparsifier.split(calibrating)[0], config.rate(sparsifier.d_sae))
        params = dataclasses.replace(params, b_enc=b_enc)
    opt_state = tx.init(params)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=opt_state,
        liveness=liveness.init(sparsifier.d_sae),
        buffer=buffer.create(rows),
        normalizer=normalizer,
        key=key_draws,
        average=params if config.ema_decay is not None or optim.brings_average(opt_state) else None,
    )
