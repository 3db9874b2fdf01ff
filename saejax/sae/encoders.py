r"""How a row becomes pre-activations: one linear map, the decoder's transpose, a hidden layer, or unrolled ISTA.

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
import enum
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Key

from saejax.kernels import matmul
from saejax.sae import initialise, sites

if TYPE_CHECKING:
    from saejax.sae.base import SAEParams, Sparsifier


class EncoderKind(enum.Enum):
    """The map from a row to the pre-activations of the latents."""

    linear = "linear"
    """One matrix."""
    tied = "tied"
    """One matrix that stays the decoder's transpose; its gradient is added to the decoder's."""
    mlp = "mlp"
    """A hidden ReLU layer of `encoder_hidden` units before the matrix."""
    lista = "lista"
    """`encoder_steps` unrolled steps of iterative thresholding with one matrix: step 1 is the linear encoder."""


def start(
    key: Key[Array, ""], sparsifier: Sparsifier
) -> tuple[Float[Array, "n d_sae"], Float[Array, "d_sae d_out"], dict[str, jax.Array]]:
    """Returns W_enc, W_dec and the encoder's own parameters at the start of training."""
    d_in, d_sae = sparsifier.d_in, sparsifier.d_sae
    key_dec, key_enc = jax.random.split(key)
    norm = sparsifier.decoder_init_norm
    mirrored = sparsifier.starts_mirrored
    W_dec = initialise.directions(key_dec, d_sae, sparsifier.d_out) * norm
    if sparsifier.family is sites.Family.clt:
        W_dec = jnp.where(sites.mask(sparsifier), W_dec, 0)
        W_dec = W_dec * (norm / jnp.linalg.norm(W_dec, axis=1, keepdims=True))
    if sparsifier.encoder is EncoderKind.mlp:
        return _start_mlp(key_enc, W_dec, d_in, sparsifier.n_hidden, mirrored, norm)
    if sparsifier.encoder is EncoderKind.tied or mirrored:
        W_enc = W_dec.T
    else:
        W_enc = (initialise.directions(key_enc, d_sae, d_in // sparsifier.n_groups) * norm).T
    if sparsifier.encoder is EncoderKind.lista:
        # A step of ISTA is 1 / sigma_max(W_dec)^2; random rows have sigma_max about norm (1 + sqrt(d_sae / d_in)).
        W_enc = W_enc / (norm * (1 + (d_sae / d_in) ** 0.5)) ** 2
    return W_enc, W_dec, {}


def _start_mlp(key, W_dec, d_in, n_hidden, mirrored, norm):
    d_sae = len(W_dec)
    key_hidden, key_out = jax.random.split(key)
    if not mirrored:
        W_enc = (initialise.directions(key_out, d_sae, n_hidden) * norm).T
        W_hidden = initialise.directions(key_hidden, n_hidden, d_in).T
    else:
        # x = (ReLU(x Q) - ReLU(-x Q)) Q.T for any rotation Q: the network starts as the linear mirror of the decoder.
        rotation = jax.random.orthogonal(key_hidden, d_in)
        spare = n_hidden - 2 * d_in
        free = initialise.directions(key_out, spare, d_in).T
        W_hidden = jnp.concatenate([rotation, -rotation, free], axis=1)
        turned = rotation.T @ W_dec.T
        W_enc = jnp.concatenate([turned, -turned, jnp.zeros((spare, d_sae))], axis=0)
    return W_enc, W_dec, {"W_hidden": W_hidden, "b_hidden": jnp.zeros(n_hidden)}


def inputs(
    sparsifier: Sparsifier,
    params: SAEParams,
    x: Float[Array, "b d_in"],
    activate: Callable[[jax.Array], jax.Array],
) -> tuple[Float[Array, "b n"], Float[Array, "#b d_sae"] | None]:
    """Returns what the last product with W_enc reads, and what is added to that product beside b_enc.

    Args:
      sparsifier: Kind and sizes of the encoder.
      params: Parameters.
      x: Rows.
      activate: Dense latents of pre-activations, for the inner steps of `lista`.
    """
    centred = x - params.b_dec[None, :] if sparsifier.centres else x
    dtype = sparsifier.matmul_dtype.value
    if sparsifier.encoder is EncoderKind.mlp:
        hidden = matmul.matmul(centred, params.extra["W_hidden"], dtype) + params.extra["b_hidden"][None, :]
        return jax.nn.relu(hidden), None
    if sparsifier.encoder is not EncoderKind.lista:
        if not sparsifier.centres or sparsifier.n_groups > 1:
            return centred, None
        # Zero, with b_dec's gradient as one matrix-vector product. By way of the rows it would take the gradient of all
        # of them: as much work as the encoder itself, and nobody else wants it.
        held = lax.stop_gradient((params.b_dec, params.W_enc))
        return x - held[0][None, :], ((held[0] - params.b_dec) @ held[1])[None, :]
    read, carried = centred, None
    for _ in range(sparsifier.encoder_steps - 1):
        carried = activate(product(sparsifier, params, read, carried))
        read = centred - matmul.matmul(carried, params.W_dec, dtype)
    return read, carried


def product(
    sparsifier: Sparsifier, params: SAEParams, read: Float[Array, "b n"], carried: Float[Array, "#b d_sae"] | None
) -> Float[Array, "b d_sae"]:
    """Returns the pre-activations from what `inputs` gave."""
    dense = sites.product(read, params.W_enc, sparsifier.n_groups, sparsifier.matmul_dtype.value)
    pre_acts = dense + params.b_enc[None, :]
    return pre_acts if carried is None else pre_acts + carried


def fold(sparsifier: Sparsifier, params: SAEParams, mean: Float[Array, " d_row"], scale: Float[Array, ""]) -> SAEParams:
    """Returns parameters whose pre-activations at x are those of `params` at (x - mean) scale, over scale.

    Every kind is linear in a common scale of x and the biases, so these are divided; an encoder that does not
    subtract b_dec takes the mean into its first bias, and what skips the latents into b_dec.
    """
    extra, b_enc = dict(params.extra), params.b_enc / scale
    mean, mean_written = sparsifier.split(mean)
    if sparsifier.encoder is EncoderKind.mlp:
        extra["b_hidden"] = extra["b_hidden"] / scale
        if not sparsifier.centres:
            extra["b_hidden"] = extra["b_hidden"] - mean @ extra["W_hidden"]
    elif not sparsifier.centres:
        b_enc = b_enc - sites.response(sparsifier, mean, params.W_enc)
    b_dec = params.b_dec / scale + mean_written
    if sparsifier.skip:
        b_dec = b_dec - mean @ extra["W_skip"]
    return dataclasses.replace(params, b_enc=b_enc, b_dec=b_dec, extra=extra)


def fold_scale(sparsifier: Sparsifier, params: SAEParams, scale: Float[Array, " d_row"]) -> SAEParams:
    """Returns parameters that do with rows what `params` do with rows * scale, what they write undone.

    As `fold_matrix` with a diagonal matrix: the latents are the same numbers.
    """
    before, after = sparsifier.split(scale)
    extra, W_enc = dict(params.extra), params.W_enc
    if sparsifier.encoder is EncoderKind.mlp:
        extra["W_hidden"] = before[:, None] * extra["W_hidden"]
    else:
        W_enc = sites.spread_scale(sparsifier, before) * W_enc
    if sparsifier.skip:
        extra["W_skip"] = before[:, None] * extra["W_skip"] / after[None, :]
    decoder = {"W_dec": params.W_dec / after[None, :], "b_dec": params.b_dec / after}
    return dataclasses.replace(params, W_enc=W_enc, **decoder, extra=extra)


def fold_matrix(sparsifier: Sparsifier, params: SAEParams, matrix: Array, inverse: Array) -> SAEParams:
    """Returns parameters that do with x what `params` do with x @ matrix, reconstruction undone by `inverse`.

    Decoder rows lose their norms, and a tied encoder is no longer the decoder's transpose: for inference only.

    Args:
      sparsifier: Kind of the encoder.
      params: Parameters.
      matrix: [d_in, d_in], applied to rows from the right.
      inverse: Its inverse.
    """
    extra, W_enc = dict(params.extra), params.W_enc
    if sparsifier.encoder is EncoderKind.mlp:
        extra["W_hidden"] = matrix @ extra["W_hidden"]
    else:
        W_enc = matrix @ W_enc
    decoder = {"W_dec": params.W_dec @ inverse, "b_dec": params.b_dec @ inverse}
    return dataclasses.replace(params, W_enc=W_enc, **decoder, extra=extra)
