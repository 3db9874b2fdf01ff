"""Constraints on parameters: unit decoder rows, a tied encoder, decoder blocks that stay zero."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from saejax.sae import sites
from saejax.sae.layout import EncoderKind, Family, Layout
from saejax.sae.parameters import SAEParams


def constrain(layout: Layout, params: SAEParams) -> SAEParams:
    """Maps parameters back onto the constraint after an optimiser step."""
    if layout.family is Family.clt:
        params = dataclasses.replace(params, W_dec=jnp.where(sites.mask(layout), params.W_dec, 0))
    if layout.unit_decoder:
        norm = jnp.linalg.norm(params.W_dec, axis=1, keepdims=True)
        params = dataclasses.replace(params, W_dec=params.W_dec / jnp.maximum(norm, 1e-20))
    if layout.encoder is EncoderKind.tied:
        params = dataclasses.replace(params, W_enc=params.W_dec.T)
    return params


def project(layout: Layout, params: SAEParams, grads: SAEParams) -> SAEParams:
    """Removes from gradients what the constraint would undo; call before the optimiser.

    The gradient of a tied encoder moves to the decoder; that along a unit row goes: rescaling would undo it. So does
    that of the blocks which the decoder of a `clt` does not have.
    """
    if layout.encoder is EncoderKind.tied:
        both = grads.W_dec + grads.W_enc.T
        grads = dataclasses.replace(grads, W_dec=both, W_enc=jnp.zeros_like(grads.W_enc))
    if layout.family is Family.clt:
        grads = dataclasses.replace(grads, W_dec=jnp.where(sites.mask(layout), grads.W_dec, 0))
    if layout.unit_decoder:
        along = jnp.sum(params.W_dec * grads.W_dec, axis=1, keepdims=True)
        grads = dataclasses.replace(grads, W_dec=grads.W_dec - along * params.W_dec)
    return grads
