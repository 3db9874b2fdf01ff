r"""AuxK: an auxiliary loss that revives dead latents; they learn to explain what the live ones miss.

.. math:: \mathrm{aux} = \min(n_{dead}/k_{aux}, 1)\,
    \frac{\sum_r \|e_r - \hat e_r\|^2}{\sum_r \|e_r - \bar e\|^2}, \qquad
    \hat e = \mathrm{TopK}_{k_{aux}}(\mathrm{ReLU}(\text{dead latents}))\, W_{dec}

e is the residual, target - recon, held fixed; its estimate has no b_dec. The gradient reaches only the encoder
columns, the encoder biases and the decoder rows of dead latents. The loss of every architecture adds `aux_alpha` times
this, in the unit of its squared error (`base.Sparsifier.loss`). Behind a hidden layer or an unrolled encoder the
gradient stops at the last product: it moves dead latents, not the shared layers.

Sources:
  Gao et al., Scaling and evaluating sparse autoencoders, 2024 (arXiv:2406.04093): the k_aux best dead
  latents, alpha 1/32. The ReLU on the auxiliary values and the division by the variance of the residual in the
  batch are those of its published code. The factor min(n_dead / k_aux, 1), which keeps a few dead latents
  from being pushed by the whole residual, is that of SAELens.
"""

import dataclasses
import functools
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from saejax.kernels import choice, kth_largest, matmul, partition, top_k
from saejax.sae import parameters, sites

_BLOCK_BYTES = 2**25  # latents of a block of rows, of which some copies exist at once


class Weights(NamedTuple):
    """The parameters that AuxK may move, in the columns and rows of dead latents; or their gradients."""

    W_enc: jax.Array  # [n, d_sae]
    b_enc: jax.Array  # [d_sae]
    W_dec: jax.Array  # [d_sae, d_out]

    @classmethod
    def of(cls, params: parameters.SAEParams) -> Self:
        """Returns those of all parameters, or of a gradient."""
        return cls(params.W_enc, params.b_enc, params.W_dec)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """AuxK of one architecture: static and hashable."""

    k_aux: int
    """Dead latents used per row (fewer if fewer are dead)."""
    dtype: str = "float32"
    """Operands of the products."""
    signed: bool = False
    """Whether latents may be negative: then no ReLU, and the largest magnitudes are chosen."""
    n_groups: int = 1
    """Groups of latents that read a part of the encoder's input each (`sites.product`)."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def aux_k_loss(
    weights: Weights,
    read: Float[Array, "b m"],
    residual: Float[Array, "b d_out"],
    dead: Bool[Array, " d_sae"],
    settings: Settings,
) -> Float[Array, ""]:
    """Returns the AuxK loss of one batch, before its coefficient; 0 without dead latents.

    Args:
      weights: The parameters that it may move.
      read: Input of the product with W_enc, `x - b_dec` in a linear encoder; no gradient.
      residual: `target - recon`; no gradient.
      dead: Latents that count as dead.
      settings: How many take part, and how.
    """
    return _forward(weights, read, residual, dead, settings)[0]


def _forward(weights, read, residual, dead, settings):
    return added(jax.tree.map(jnp.zeros_like, weights), weights, read, residual, dead, settings)


def _backward(settings, grads, cotangent):
    return jax.tree.map(lambda grad: grad * cotangent, grads), None, None, None


aux_k_loss.defvjp(_forward, _backward)


def added(
    grads: Weights,
    weights: Weights,
    read: Float[Array, "b m"],
    residual: Float[Array, "b d_out"],
    dead: Bool[Array, " d_sae"],
    settings: Settings,
    weight: Float[Array, ""] | float = 1.0,
) -> tuple[Float[Array, ""], Weights]:
    """Returns the AuxK loss of `aux_k_loss`, and `grads` plus `weight` times its gradients.

    A loop that runs once or not at all changes its arrays in place. A conditional would copy them, and the sum of two
    gradients would pass over both. So it costs nothing when nothing is dead.

    Args:
      grads: Gradients of `weights` so far.
      weights, read, residual, dead, settings: As in `aux_k_loss`.
      weight: Factor on the gradients.
    """
    with jax.named_scope("aux_k"):  # a compiled program tells by it what runs only while latents are dead
        return _added(grads, weights, read, residual, dead, settings, weight)


def _added(grads, weights, read, residual, dead, settings, weight):
    k_aux, dtype, signed, n_groups = settings.k_aux, settings.dtype, settings.signed, settings.n_groups
    n_dead = jnp.sum(dead)
    centred = residual - jnp.mean(residual, axis=0, keepdims=True)
    # A residual without variance (a perfect or an empty batch) gives 0, not NaN.
    scale = jnp.minimum(n_dead / k_aux, 1.0) / jnp.maximum(jnp.sum(centred**2), 1e-20)

    def explain(part, use, read, residual, groups=None):
        W_enc, b_enc, W_dec = part
        pre_acts = sites.product(read, W_enc, n_groups, dtype, groups) + b_enc[None, :]
        values = jnp.where(use[None, :], pre_acts if signed else jax.nn.relu(pre_acts), 0)
        if values.shape[1] > k_aux:
            values = values * _best(jnp.abs(values) if signed else values, k_aux)
        return scale * jnp.sum((residual - matmul.matmul(values, W_dec, dtype)) ** 2)

    def held(turn):
        """Presents a loop's constants as variables; the compiler would compute ahead of a loop that never runs."""
        return lax.optimization_barrier((weights, read, residual, turn))[:3]

    def few(turn, state):
        # At most k_aux are dead, so all of them take part: a small dense problem on their copies.
        slots = jnp.arange(k_aux)
        real = slots < n_dead
        chosen = jnp.nonzero(dead, size=k_aux, fill_value=0)[0]
        # Spare slots name latents beyond the last. All differ, so that a GPU adds without atomics.
        at = jnp.where(real, chosen, dead.shape[0] + slots)
        once: Any = {"mode": "drop", "unique_indices": True}
        (W_enc, b_enc, W_dec), *given = held(turn)
        part = Weights(W_enc[:, chosen], b_enc[chosen], W_dec[chosen])
        groups = chosen // (dead.shape[0] // n_groups)
        loss, (g_enc, g_bias, g_dec) = jax.value_and_grad(explain)(part, real, *given, groups)
        on_enc, on_bias, on_dec = state[1]
        return loss, Weights(
            on_enc.at[:, at].add(weight * g_enc, **once),
            on_bias.at[at].add(weight * g_bias, **once),
            on_dec.at[at].add(weight * g_dec, **once),
        )

    n_blocks = _blocks(len(read), dead.shape[0])

    def many(turn, state):
        weights, *given = held(turn)
        rows = len(read) // n_blocks
        block = (lax.dynamic_slice_in_dim(array, turn * rows, rows) for array in given) if n_blocks > 1 else given
        loss, more = jax.value_and_grad(explain)(weights, dead, *block)
        return state[0] + loss, jax.tree.map(lambda grad, more: grad + weight * more, state[1], more)

    state = (jnp.zeros(()), grads)
    least = 0
    if k_aux < dead.shape[0]:
        state = lax.fori_loop(0, ((n_dead > 0) & (n_dead <= k_aux)).astype(jnp.int32), few, state)
        least = k_aux
    return lax.fori_loop(0, jnp.where(n_dead > least, n_blocks, 0), many, state)


def _blocks(n_rows: int, n_latents: int) -> int:
    """In how many equal blocks rows pass, so that all their latents at once stay small; 1 where the mesh cuts them."""
    if partition.of(n_rows, n_latents).rows is not None:
        return 1
    return partition.equal_blocks(n_rows, 4 * n_latents, _BLOCK_BYTES)


def _best(values: Float[Array, "b n"], k: int) -> Float[Array, "b n"]:
    """Returns 1 at the k largest entries of each row and 0 elsewhere; entries are at least 0."""
    if choice.target().platform != "cpu":
        return kth_largest.keep(values, k)
    _, indices = top_k.top_k(values, k)
    rows = jnp.arange(values.shape[0])[:, None]
    return jnp.zeros_like(values).at[rows, indices].set(1.0)
