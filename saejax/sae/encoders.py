r"""Encoders (row to pre-activations): one linear map, the decoder's transpose, a hidden layer, unrolled ISTA.

.. math:: \text{linear, tied:}\; u = x_c W_{enc} + b_{enc} \qquad
    \text{mlp:}\; u = \mathrm{ReLU}(x_c W_{hidden} + b_{hidden}) W_{enc} + b_{enc}

.. math:: \text{lista:}\; u_{t+1} = z_t + (x_c - z_t W_{dec}) W_{enc} + b_{enc}, \quad
    z_t = \mathrm{act}(u_t), \quad z_0 = 0

x_c is x - b_dec where the architecture subtracts it, else x; act is the architecture's own activation.

Sources:
  Gregor and LeCun, Learning fast approximations of sparse coding, 2010 (LISTA; here one matrix for all steps,
  and the decoder itself inside). O'Neill et al., Compute optimal inference and provable amortisation gap in
  sparse autoencoders, 2024 (MLP encoders).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Key

from saejax.kernels import matmul
from saejax.sae import sites
from saejax.sae.layout import EncoderKind, Family, Layout
from saejax.sae.parameters import SAEParams


def start(
    key: Key[Array, ""], layout: Layout
) -> tuple[Float[Array, "n d_sae"], Float[Array, "d_sae d_out"], dict[str, jax.Array]]:
    """Returns W_enc, W_dec and the encoder's own parameters at the start of training."""
    d_in, d_sae = layout.d_in, layout.d_sae
    key_dec, key_enc = jax.random.split(key)
    norm = layout.decoder_init_norm
    mirrored = layout.starts_mirrored
    W_dec = directions(key_dec, d_sae, layout.d_out) * norm
    if layout.family is Family.clt:
        W_dec = jnp.where(sites.mask(layout), W_dec, 0)
        W_dec = W_dec * (norm / jnp.linalg.norm(W_dec, axis=1, keepdims=True))
    if layout.encoder is EncoderKind.mlp:
        return _start_mlp(key_enc, W_dec, d_in, layout.n_hidden, mirrored, norm)
    if layout.encoder is EncoderKind.tied or mirrored:
        W_enc = W_dec.T
    else:
        W_enc = (directions(key_enc, d_sae, d_in // layout.n_groups) * norm).T
    if layout.encoder is EncoderKind.lista:
        # A step of ISTA is 1 / sigma_max(W_dec)^2; random rows have sigma_max about norm (1 + sqrt(d_sae / d_in)).
        W_enc = W_enc / (norm * (1 + (d_sae / d_in) ** 0.5)) ** 2
    return W_enc, W_dec, {}


def directions(key: Key[Array, ""], n: int, d: int) -> Float[Array, "n d"]:
    """Returns n random unit vectors, uniform on the sphere."""
    rows = jax.random.normal(key, (n, d), jnp.float32)
    return rows / jnp.linalg.norm(rows, axis=1, keepdims=True)


def _start_mlp(key, W_dec, d_in, n_hidden, mirrored, norm):
    d_sae = len(W_dec)
    key_hidden, key_out = jax.random.split(key)
    if not mirrored:
        W_enc = (directions(key_out, d_sae, n_hidden) * norm).T
        W_hidden = directions(key_hidden, n_hidden, d_in).T
    else:
        # x = (ReLU(x Q) - ReLU(-x Q)) Q.T for any rotation Q: the network starts as the linear mirror of the decoder.
        rotation = jax.random.orthogonal(key_hidden, d_in)
        spare = n_hidden - 2 * d_in
        free = directions(key_out, spare, d_in).T
        W_hidden = jnp.concatenate([rotation, -rotation, free], axis=1)
        turned = rotation.T @ W_dec.T
        W_enc = jnp.concatenate([turned, -turned, jnp.zeros((spare, d_sae))], axis=0)
    return W_enc, W_dec, {"W_hidden": W_hidden, "b_hidden": jnp.zeros(n_hidden)}


def inputs(
    layout: Layout,
    params: SAEParams,
    x: Float[Array, "b d_in"],
    activate: Callable[[jax.Array], jax.Array],
) -> tuple[Float[Array, "b n"], Float[Array, "#b d_sae"] | None]:
    """Returns the input of the last product with W_enc, and the terms added to that product beside b_enc.

    Args:
      layout: Kind and sizes of the encoder.
      params: Parameters.
      x: Rows.
      activate: Dense latents of pre-activations, for the inner steps of `lista`.
    """
    centred = x - params.b_dec[None, :] if layout.centres else x
    dtype = layout.matmul_dtype.value
    if layout.encoder is EncoderKind.mlp:
        hidden = matmul.matmul(centred, params.extra["W_hidden"], dtype) + params.extra["b_hidden"][None, :]
        return jax.nn.relu(hidden), None
    if layout.encoder is not EncoderKind.lista:
        if not layout.centres or layout.n_groups > 1:
            return centred, None
        # Zero, with b_dec's gradient as one matrix-vector product. By way of the rows it would take the gradient of all
        # of them: as much work as the encoder itself, and nobody else wants it.
        held = lax.stop_gradient((params.b_dec, params.W_enc))
        return x - held[0][None, :], ((held[0] - params.b_dec) @ held[1])[None, :]
    read, carried = centred, None
    for _ in range(layout.encoder_steps - 1):
        carried = activate(product(layout, params, read, carried))
        read = centred - matmul.matmul(carried, params.W_dec, dtype)
    return read, carried


def product(
    layout: Layout, params: SAEParams, read: Float[Array, "b n"], carried: Float[Array, "#b d_sae"] | None
) -> Float[Array, "b d_sae"]:
    """Returns the pre-activations from what `inputs` gave."""
    dense = sites.product(read, params.W_enc, layout.n_groups, layout.matmul_dtype.value)
    pre_acts = dense + params.b_enc[None, :]
    return pre_acts if carried is None else pre_acts + carried


def fold(layout: Layout, params: SAEParams, mean: Float[Array, " d_row"], scale: Float[Array, ""]) -> SAEParams:
    """Returns parameters whose pre-activations at x are those of `params` at (x - mean) scale, over scale.

    Every kind is linear in a common scale of x and the biases, so these are divided. An encoder that does not subtract
    b_dec takes the mean into its first bias; b_dec takes the part that skips the latents.
    """
    extra, b_enc = dict(params.extra), params.b_enc / scale
    mean, mean_written = layout.split(mean)
    if layout.encoder is EncoderKind.mlp:
        extra["b_hidden"] = extra["b_hidden"] / scale
        if not layout.centres:
            extra["b_hidden"] = extra["b_hidden"] - mean @ extra["W_hidden"]
    elif not layout.centres:
        b_enc = b_enc - sites.response(layout, mean, params.W_enc)
    b_dec = params.b_dec / scale + mean_written
    if layout.skip:
        b_dec = b_dec - mean @ extra["W_skip"]
    return dataclasses.replace(params, b_enc=b_enc, b_dec=b_dec, extra=extra)


def fold_scale(layout: Layout, params: SAEParams, scale: Float[Array, " d_row"]) -> SAEParams:
    """Returns parameters that treat rows as `params` treat rows * scale, with the output scaled back.

    As `fold_matrix` with a diagonal matrix: the latents are the same numbers.
    """
    before, after = layout.split(scale)
    extra, W_enc = dict(params.extra), params.W_enc
    if layout.encoder is EncoderKind.mlp:
        extra["W_hidden"] = before[:, None] * extra["W_hidden"]
    else:
        W_enc = sites.spread_scale(layout, before) * W_enc
    if layout.skip:
        extra["W_skip"] = before[:, None] * extra["W_skip"] / after[None, :]
    decoder = {"W_dec": params.W_dec / after[None, :], "b_dec": params.b_dec / after}
    return dataclasses.replace(params, W_enc=W_enc, **decoder, extra=extra)


def fold_matrix(layout: Layout, params: SAEParams, matrix: Array, inverse: Array) -> SAEParams:
    """Returns parameters that do with x what `params` do with x @ matrix, reconstruction undone by `inverse`.

    Decoder rows lose their norms, and a tied encoder is no longer the decoder's transpose: for inference only.

    Args:
      layout: Kind of the encoder.
      params: Parameters.
      matrix: [d_in, d_in], applied to rows from the right.
      inverse: Its inverse.
    """
    extra, W_enc = dict(params.extra), params.W_enc
    if layout.encoder is EncoderKind.mlp:
        extra["W_hidden"] = matrix @ extra["W_hidden"]
    else:
        W_enc = matrix @ W_enc
    decoder = {"W_dec": params.W_dec @ inverse, "b_dec": params.b_dec @ inverse}
    return dataclasses.replace(params, W_enc=W_enc, **decoder, extra=extra)
