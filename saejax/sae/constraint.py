"""What parameters must obey: unit decoder rows, a tied encoder, blocks of the decoder that do not exist."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax.numpy as jnp

from saejax.sae import sites
from saejax.sae.encoders import EncoderKind
from saejax.sae.parameters import SAEParams

if TYPE_CHECKING:
    from saejax.sae.base import Sparsifier


def constrain(sparsifier: Sparsifier, params: SAEParams) -> SAEParams:
    """Maps parameters back onto the constraint after an optimiser step."""
    bounded = sparsifier.constrain_extra(params)
    if bounded:
        params = dataclasses.replace(params, extra=params.extra | bounded)
    if sparsifier.family is sites.Family.clt:
        params = dataclasses.replace(params, W_dec=jnp.where(sites.mask(sparsifier), params.W_dec, 0))
    if sparsifier.unit_decoder:
        norm = jnp.linalg.norm(params.W_dec, axis=1, keepdims=True)
        params = dataclasses.replace(params, W_dec=params.W_dec / jnp.maximum(norm, 1e-20))
    if sparsifier.encoder is EncoderKind.tied:
        params = dataclasses.replace(params, W_enc=params.W_dec.T)
    return params


def project(sparsifier: Sparsifier, params: SAEParams, grads: SAEParams) -> SAEParams:
    """Removes from gradients what the constraint would undo; call before the optimiser.

    The gradient of a tied encoder moves to the decoder; that along a unit row goes: rescaling would undo it. So does
    that of the blocks which the decoder of a `clt` does not have.
    """
    if sparsifier.encoder is EncoderKind.tied:
        both = grads.W_dec + grads.W_enc.T
        grads = dataclasses.replace(grads, W_dec=both, W_enc=jnp.zeros_like(grads.W_enc))
    if sparsifier.family is sites.Family.clt:
        grads = dataclasses.replace(grads, W_dec=jnp.where(sites.mask(sparsifier), grads.W_dec, 0))
    if sparsifier.unit_decoder:
        along = jnp.sum(params.W_dec * grads.W_dec, axis=1, keepdims=True)
        grads = dataclasses.replace(grads, W_dec=grads.W_dec - along * params.W_dec)
    return grads
