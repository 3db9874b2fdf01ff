r"""The loss that training differentiates: an architecture's objective and AuxK.

.. math:: L = \text{objective} + \alpha\, s^2\, \mathrm{aux}

aux is dimensionless (`aux_k`), and :math:`s^2 = E\|y - \bar y\|^2` of the targets y, from the batch and without a
gradient, gives it the unit of mse. So with TopK the loss is that of Gao et al. (mse / s^2 + alpha aux) times s^2, alpha
means the same at every scale of the data, and with centred data of E||x||^2 = 1 it is the loss of dictionary_learning's
TopK trainer but for the factor min(n_dead / k_aux, 1). With `skip` the objective's target is what x W_skip leaves over,
and the gradient flows into W_skip.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from saejax.sae import aux_k
from saejax.sae.parameters import Aux, SAEParams

if TYPE_CHECKING:
    from saejax.sae.base import Sparsifier


def loss(
    sparsifier: Sparsifier,
    params: SAEParams,
    rows: Float[Array, "b d_row"],
    dead: Bool[Array, " d_sae"],
    step: Int[Array, ""],
) -> tuple[Float[Array, ""], Aux]:
    """Returns the training loss of one batch and what it was made of.

    Args:
      sparsifier: Architecture.
      params: Parameters.
      rows: Normalised activations, float32.
      dead: Latents that count as dead at this step.
      step: Number of optimiser steps already taken, for schedules.
    """
    (found, aux), (read, residual, weight) = _but_aux(sparsifier, params, rows, step)
    if sparsifier.aux_alpha == 0:
        return found, aux
    term: Any = aux_k.aux_k_loss(*_weights(params), read, residual, dead, *_settings(sparsifier))
    return found + weight * term, dataclasses.replace(aux, terms=aux.terms | {"aux_k": term})


def value_and_grad(
    sparsifier: Sparsifier,
    params: SAEParams,
    rows: Float[Array, "b d_row"],
    dead: Bool[Array, " d_sae"],
    step: Int[Array, ""],
) -> tuple[tuple[Float[Array, ""], Aux], SAEParams]:
    """Returns `loss` and its gradient; AuxK adds to the arrays of the objective's gradient.

    Args:
      sparsifier, params, rows, dead, step: As in `loss`.
    """

    def but_aux(params):
        (found, aux), rest = _but_aux(sparsifier, params, rows, step)
        return found, (aux, rest)

    (found, (aux, (read, residual, weight))), grads = jax.value_and_grad(but_aux, has_aux=True)(params)
    if sparsifier.aux_alpha == 0:
        return (found, aux), grads
    k_aux, dtype, signed, n_groups = _settings(sparsifier)
    term, (W_enc, b_enc, W_dec) = aux_k.added(
        _weights(grads), _weights(params), read, residual, dead, k_aux, dtype, signed, n_groups, weight
    )
    grads = dataclasses.replace(grads, W_enc=W_enc, b_enc=b_enc, W_dec=W_dec)
    return (found + weight * term, dataclasses.replace(aux, terms=aux.terms | {"aux_k": term})), grads


def _weights(tree: SAEParams) -> tuple[jax.Array, jax.Array, jax.Array]:
    return tree.W_enc, tree.b_enc, tree.W_dec


def _settings(sparsifier: Sparsifier) -> tuple[int, str, bool, int]:
    """`k_aux`, `dtype`, `signed` and `n_groups` of `aux_k`."""
    return sparsifier.n_aux, sparsifier.matmul_dtype.value, sparsifier.signed, sparsifier.n_groups


def _but_aux(sparsifier: Sparsifier, params: SAEParams, rows: Any, step: Any) -> Any:
    """The loss without AuxK, and what AuxK reads with its weight, without a gradient."""
    x, target = sparsifier.split(rows)
    aim = target - sparsifier.skipped(params, x) if sparsifier.skip else target
    found, aux = sparsifier.objective(params, x, aim, step)
    read = sparsifier.encoder_inputs(params, x, step)[0] if sparsifier.aux_alpha > 0 else None
    spread = jnp.mean(jnp.sum((target - jnp.mean(target, axis=0, keepdims=True)) ** 2, axis=1))
    rest = lax.stop_gradient((read, aim - aux.recon, sparsifier.aux_alpha * spread))
    return (found, dataclasses.replace(aux, recon=sparsifier.add_skip(params, aux.recon, x))), rest
