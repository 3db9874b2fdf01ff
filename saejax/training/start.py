"""Initial biases, from the first filling of the buffer."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from saejax.activations import normalize
from saejax.errors import UserError
from saejax.sae import base, encoders
from saejax.training.settings import DecoderBias, EncoderBias, TrainConfig

ROWS = 8_192
"""Rows at most that encoder biases are calibrated on; a rate p is met to about sqrt(p / ROWS)."""

_BLOCK_FLOATS = 2**22  # pre-activations at a time


def check(sparsifier: base.Sparsifier, config: TrainConfig) -> None:
    """Refuse a calibration that an architecture has no use for.

    Raises:
      UserError: its encoder bias is held, or its latents have two signs.
    """
    held = sparsifier.lr_scales().get("b_enc", 1.0) == 0 or sparsifier.signed
    if config.b_enc_init is EncoderBias.firing_rate and held:
        why = "its latents have both signs" if sparsifier.signed else "its encoder has no bias"
        raise UserError(f"train.b_enc_init must be zero for sae={sparsifier.name} ({why}), got firing_rate")


def decoder_bias(start: DecoderBias, rows: Float[Array, "n d_out"]) -> Float[Array, " d_out"]:
    """b_dec at step 0, from normalised targets."""
    if start is DecoderBias.zero:
        return jnp.zeros(rows.shape[-1], jnp.float32)
    if start is DecoderBias.mean:
        return jnp.mean(rows, axis=0)
    return normalize.geometric_median(rows)


def encoder_bias(
    sparsifier: base.Sparsifier, params: base.SAEParams, rows: Float[Array, "n d_in"], rate: float
) -> Float[Array, " d_sae"]:
    """The biases with which every latent exceeds its threshold (0 where it has none) on a share `rate` of the rows.

    b = theta - the (1 - rate) quantile of the pre-activations without bias. TopK and its kind choose among these
    afterwards; in an unrolled encoder the first step is calibrated.

    Args:
      sparsifier: architecture.
      params: at the start, `b_dec` included; their `b_enc` is not read.
      rows: normalised, of what is read.
      rate: share of the rows, in (0, 1); at least one row.

    Source:
      Anthropic, Circuits updates, January 2025.
    """
    once = dataclasses.replace(sparsifier, encoder_steps=1)
    read, _ = encoders.inputs(once, params, rows, lambda pre_acts: pre_acts)
    n, d_sae, n_groups = len(rows), sparsifier.d_sae, sparsifier.n_groups
    firing = min(max(round(rate * n), 1), n - 1)
    most = max(1, _BLOCK_FLOATS // n)
    group = d_sae // n_groups
    block = next(size for size in range(min(most, group), 0, -1) if group % size == 0)
    by_site = jnp.moveaxis(read.reshape(n, n_groups, -1), 1, 0)

    def quantile(part: tuple[Float[Array, "block h"], Int[Array, ""]]) -> Float[Array, " block"]:
        columns, own = part
        ordered = jnp.sort(by_site[own] @ columns.T, axis=0)
        return (ordered[n - firing] + ordered[n - firing - 1]) / 2

    blocks = params.W_enc.T.reshape(d_sae // block, block, -1)
    quantiles = jax.lax.map(quantile, (blocks, jnp.arange(len(blocks)) * block // group)).reshape(d_sae)
    theta = params.extra.get("threshold", jnp.zeros(()))
    return jnp.broadcast_to(theta, (d_sae,)) - quantiles
