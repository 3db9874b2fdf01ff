"""The encoder of a k-sparse autoencoder: one dense product forward, active latents only backward.

`pre_activations` computes the product and `top_k` selects outside of any gradient. `with_encoder_gradient` gives the
selected values the gradient of the dense chain.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from saejax.kernels import matmul, partition, sparse_decode

P = jax.sharding.PartitionSpec


def pre_activations(
    x: Float[Array, "b d_in"],
    W_enc: Float[Array, "d_in d_sae"],
    b_enc: Float[Array, "d_sae"],
    b_dec: Float[Array, "d_in"],
    dtype: str,
) -> Float[Array, "b d_sae"]:
    """Returns `(x - b_dec) @ W_enc + b_enc` in float32, without a gradient.

    The operands of the product are rounded to `dtype`. Every latent shard computes its own columns from whole
    rows: no sum is split over the mesh.
    """
    cut = partition.of(x.shape[0], W_enc.shape[1])

    def shard(x, W_enc, b_enc, b_dec):
        return matmul.matmul(x - b_dec[None, :], W_enc, dtype) + b_enc[None, :]

    in_specs = (P(cut.rows, None), P(None, cut.latents), P(cut.latents), P())
    args = jax.lax.stop_gradient((x, W_enc, b_enc, b_dec))
    return cut.run(shard, in_specs, P(cut.rows, cut.latents))(*args)


@jax.custom_vjp
def with_encoder_gradient(
    values: Float[Array, "b k"],
    indices: Int[Array, "b k"],
    x: Float[Array, "b d_in"],
    W_enc: Float[Array, "d_in d_sae"],
    b_enc: Float[Array, "d_sae"],
    b_dec: Float[Array, "d_in"],
) -> Float[Array, "b k"]:
    """Returns `values` unchanged, differentiable as `(x - b_dec) @ W_enc + b_enc` at `indices` where not 0.

    Args:
      values: Selected latents after the activation; a 0 passes no gradient.
      indices: Which latents they are.
      x, W_enc, b_enc, b_dec: What they were computed from; the gradient goes to these.
    """
    return values


def _forward(values, indices, x, W_enc, b_enc, b_dec):
    return values, (values != 0, indices, x, W_enc, b_dec)


def _backward(saved, cotangent):
    active, indices, x, W_enc, b_dec = saved
    d_pre = jnp.where(active, cotangent, 0)
    d_W = sparse_decode.accumulate_rows(d_pre, indices, x - b_dec[None, :], W_enc.shape[1])
    d_b_enc = sparse_decode.accumulate_rows(d_pre, indices, jnp.ones_like(x[:, :1]), W_enc.shape[1])[:, 0]
    # Dropped by the compiler when nobody differentiates the data, as in training.
    d_x = sparse_decode.combine_rows(d_pre, indices, W_enc.T)
    # The sum of -d_x over the rows, as one matrix-vector product.
    d_b_dec = -(W_enc @ d_b_enc)
    # Transposed once: fused into every pass of the optimiser, it would be read across its rows there.
    return None, None, d_x, jax.lax.optimization_barrier(d_W.T), d_b_enc, d_b_dec


with_encoder_gradient.defvjp(_forward, _backward)


@jax.custom_vjp
def with_gradient_of(
    values: Float[Array, "b k"], indices: Int[Array, "b k"], pre_acts: Float[Array, "b d_sae"]
) -> Float[Array, "b k"]:
    """Returns `values` unchanged, differentiable as the entries of `pre_acts` at `indices`.

    For encoders that are more than one product. A value of 0 passes no gradient.
    """
    return values


def _forward_of(values, indices, pre_acts):
    # The zero-size array tells the backward pass how many latents there are.
    return values, (values != 0, indices, jnp.zeros((0, pre_acts.shape[1])))


def _backward_of(saved, cotangent):
    active, indices, width = saved
    cut = partition.of(indices.shape[0], width.shape[1])
    n_local = width.shape[1]
    if cut.latents is not None:
        n_local //= jax.sharding.get_abstract_mesh().shape[cut.latents]

    def shard(d_values, indices):
        local = indices - cut.first_latent(n_local)
        own = (local >= 0) & (local < n_local)
        rows = jnp.arange(indices.shape[0])[:, None]
        zeros = jnp.zeros((indices.shape[0], n_local), d_values.dtype)
        return zeros.at[rows, jnp.where(own, local, 0)].add(jnp.where(own, d_values, 0))

    rows = P(cut.rows, None)
    d_pre = cut.run(shard, (rows, rows), P(cut.rows, cut.latents))(jnp.where(active, cotangent, 0), indices)
    return None, None, d_pre


with_gradient_of.defvjp(_forward_of, _backward_of)


def entries(a: Float[Array, "b n"], indices: Int[Array, "b k"]) -> Float[Array, "b k"]:
    """Returns the entries of each row at its indices, without a gradient; every shard looks up its own columns."""
    cut = partition.of(*a.shape)

    def shard(a, indices):
        local = indices - cut.first_latent(a.shape[1])
        own = (local >= 0) & (local < a.shape[1])
        found = jnp.take_along_axis(a, jnp.where(own, local, 0), axis=1)
        return cut.sum_latents(jnp.where(own, found, 0))

    rows = P(cut.rows, None)
    return cut.run(shard, (P(cut.rows, cut.latents), rows), rows)(jax.lax.stop_gradient(a), indices)
