"""The k largest pre-activations of each row, computed in blocks of rows.

Each block passes through the product and the selection while it is still in the cache. The pre-activations of the
whole batch never exist at once.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from saejax.kernels import choice, matmul, pallas_encode, partition, screen, top_k
from saejax.kernels.choice import Form

_CPU_BYTES = 2**26  # pre-activations of a block; half or twice as many are as fast
_BYTES = 2**29  # the same on accelerators: enough rows to fill them, and little memory beside gradients


def encode_top_k(
    x: Float[Array, "b d_in"],
    W_enc: Float[Array, "d_in d_sae"],
    b_enc: Float[Array, "d_sae"],
    b_dec: Float[Array, "d_in"],
    k: int,
    dtype: str,
) -> tuple[Float[Array, "b k"], Int[Array, "b k"]]:
    """Returns what `top_k` gives of `(x - b_dec) @ W_enc + b_enc`, on any mesh, without a gradient.

    Args:
      x, W_enc, b_enc, b_dec: The encoder and what it reads.
      k: How many to keep, in [1, d_sae].
      dtype: Operands of the product; sums are float32.

    Returns:
      Values in descending order and int32 indices; of equal values the lowest index comes first.

    Examples:
      >>> encoder = jnp.eye(2), jnp.array([0.0, 2.0]), jnp.zeros(2)
      >>> values, indices = encode_top_k(jnp.array([[3.0, 0.0]]), *encoder, 2, "float32")
      >>> values.tolist(), indices.tolist()
      ([[3.0, 2.0]], [[0, 1]])
    """
    if not 1 <= k <= W_enc.shape[1]:
        raise ValueError(f"k must be in [1, {W_enc.shape[1]}], got {k}")
    cut = partition.of(x.shape[0], W_enc.shape[1])

    def shard(x, W_enc, b_enc, b_dec):
        select = functools.partial(_in_blocks, k=min(k, W_enc.shape[1]), dtype=dtype)
        preferred = Form.screened if screen.pays(W_enc.shape[1], k, dtype) else Form.sparse
        default = functools.partial(select, block_bytes=_BYTES)
        kernel = functools.partial(pallas_encode.top_k_of_product, k=min(k, W_enc.shape[1]))
        sizes = {"rows": x.shape[0], "width": x.shape[1], "n": W_enc.shape[1], "k": k, "dtype": dtype}
        screened = choice.of(choice.Operation.encode, preferred, **sizes) is Form.screened
        cpu = functools.partial(select, block_bytes=_CPU_BYTES, screened=screened)
        cuda = choice.on_gpu(choice.Operation.encode, kernel, default, **sizes)
        values, indices = lax.platform_dependent(x - b_dec[None, :], W_enc, b_enc, cpu=cpu, cuda=cuda, default=default)
        return top_k.of_shards(values, indices, k, cut, W_enc.shape[1])

    rows = P(cut.rows, None)
    in_specs = (rows, P(None, cut.latents), P(cut.latents), P())
    return cut.run(shard, in_specs, (rows, rows))(*lax.stop_gradient((x, W_enc, b_enc, b_dec)))


def _in_blocks(x, W_enc, b_enc, *, k, dtype, block_bytes, screened=False):
    n_rows, width = x.shape
    n_blocks = max(1, -(-n_rows * 4 * W_enc.shape[1] // block_bytes))
    block_rows = -(-n_rows // n_blocks)
    padded = jnp.pad(x, ((0, n_blocks * block_rows - n_rows), (0, 0)))
    rounded = W_enc.astype(dtype)  # once, not in every block

    def whole(rows):
        return top_k.on_device(matmul.matmul(rows, rounded, dtype) + b_enc[None, :], k)

    if screened:
        among_candidates = screen.candidates(W_enc, b_enc, k)

        def of_block(rows):
            certain, *best = among_candidates(rows)
            return lax.cond(certain, lambda: tuple(best), lambda: whole(rows))
    else:
        of_block = whole

    best = lax.map(of_block, padded.reshape(n_blocks, block_rows, width))
    return tuple(found.reshape(-1, k)[:n_rows] for found in best)
