"""The encoder of a k-sparse autoencoder: one dense product forward, active latents only backward.

`pre_activations` is the product, `top_k` selects outside of any gradient, and `with_encoder_gradient` gives
the selected values the gradient that the dense chain would have given them.
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
    """Returns `values` unchanged, differentiable as `relu((x - b_dec) @ W_enc + b_enc)` at `indices`.

    Args:
      values: Selected latents after the ReLU; a 0 passes no gradient.
      indices: Which latents they are.
      x, W_enc, b_enc, b_dec: What they were computed from; the gradient goes to these.
    """
    return values


def _forward(values, indices, x, W_enc, b_enc, b_dec):
    return values, (values > 0, indices, x, W_enc, b_dec)


def _backward(saved, cotangent):
    active, indices, x, W_enc, b_dec = saved
    d_pre = jnp.where(active, cotangent, 0)
    d_W = sparse_decode.accumulate_rows(d_pre, indices, x - b_dec[None, :], W_enc.shape[1])
    d_b_enc = sparse_decode.accumulate_rows(d_pre, indices, jnp.ones_like(x[:, :1]), W_enc.shape[1])[:, 0]
    # Dropped by the compiler when nobody differentiates the data, as in training.
    d_x = sparse_decode.combine_rows(d_pre, indices, W_enc.T)
    # The sum of -d_x over the rows, as one matrix-vector product.
    d_b_dec = -(W_enc @ d_b_enc)
    return None, None, d_x, d_W.T, d_b_enc, d_b_dec


with_encoder_gradient.defvjp(_forward, _backward)
