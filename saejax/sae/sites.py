r"""Sites: the parts of a row that an SAE reads and writes, for autoencoders and transcoders of all kinds.

A row is the concatenation of its sites :math:`x^1, \ldots, x^S` (the activations of several hooks at one token).

* `sae`: one site, read and written.
* `transcoder`: the first half of the sites is read, the second half is the target. With `skip` the target also gets
  :math:`x W_{skip}`, which starts at 0 (Paulo et al.: an affine map that the latents need not learn).
* `crosscoder`: all sites are read and written. The norm of a latent in a penalty is
  :math:`\sum_s \|W_{dec,i}^s\|`, so that it may leave sites out.
* `clt`: sites in_0 .. in_{L-1}, out_0 .. out_{L-1}. The latents form L groups of equal size, one after the other; group
  g reads in_g and writes out_g .. out_{L-1}. W_enc is compact, [d, d_sae]; W_dec has blocks of zeros, which `mask`
  computes from the positions and which initialisation, `project` and `constrain` keep.

Sources:
  Dunefsky et al., Transcoders find interpretable LLM feature circuits, 2024 (arXiv:2406.11944). Paulo et al.,
  Transcoders beat sparse autoencoders for interpretability, 2025 (arXiv:2501.18823; skip). Lindsey et al., Sparse
  crosscoders, Transformer Circuits, 2024. Ameisen et al., Circuit tracing, Transformer Circuits, 2025 (clt).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from saejax.kernels import matmul
from saejax.sae.layout import Layout


def product(
    x: Float[Array, "b n"],
    W_enc: Float[Array, "m h"],
    n_groups: int,
    dtype: str,
    groups: Int[Array, " h"] | None = None,
) -> Float[Array, "b h"]:
    """Returns the product of rows with the encoder, each group of columns with its own site.

    Args:
      x: Input: `n_groups` sites of width m side by side.
      W_enc: Columns, each for the site of its group.
      n_groups: Groups; with 1 this is `x @ W_enc`.
      dtype: Operands of the product.
      groups: Group of each column, for some columns in any order; None where these are all, group after group.
    """
    if n_groups == 1:
        return matmul.matmul(x, W_enc, dtype)
    if groups is not None:
        own = groups[None, :] == jnp.arange(n_groups)[:, None]
        spread = jnp.where(own[:, None, :], W_enc[None, :, :], 0)
        return matmul.matmul(x, spread.reshape(-1, W_enc.shape[1]), dtype)
    by_site = jnp.moveaxis(x.reshape(x.shape[0], n_groups, -1), 1, 0)
    by_group = jnp.moveaxis(W_enc.reshape(W_enc.shape[0], n_groups, -1), 1, 0)
    parts = jax.vmap(lambda a, b: matmul.matmul(a, b, dtype))(by_site, by_group)
    return jnp.moveaxis(parts, 0, 1).reshape(x.shape[0], -1)


def response(layout: Layout, row: Float[Array, " d_in"], W: Float[Array, "m h"]) -> Float[Array, " h"]:
    """Returns the product of one row with the encoder's first matrix."""
    n_groups = layout.n_groups
    return row @ W if n_groups == 1 else product(row[None, :], W, n_groups, "float32")[0]


def spread_scale(layout: Layout, scale: Float[Array, " d_in"]) -> Float[Array, "m h"]:
    """Returns one factor of every input for each column of the encoder's first matrix (h is 1 where all agree)."""
    if layout.n_groups == 1:
        return scale[:, None]
    by_site = scale.reshape(layout.n_groups, -1).T
    return jnp.repeat(by_site, layout.d_sae // layout.n_groups, axis=1)


def groups(layout: Layout) -> Int[Array, " d_sae"]:
    """Returns the group of each latent."""
    return jnp.arange(layout.d_sae) // (layout.d_sae // layout.n_groups)


def mask(layout: Layout) -> Bool[Array, "d_sae d_out"]:
    """Returns which entries of W_dec a cross-layer transcoder has; computed, never stored.

    Examples:
      >>> from saejax.sae import Family, TopK
      >>> mask(TopK(d_in=2, d_sae=2, k=1, family=Family.clt, sites=(1, 1, 2, 1))).astype(int).tolist()
      [[1, 1, 1], [0, 0, 1]]
    """
    group = groups(layout)
    column, layer, edge = jnp.arange(layout.d_out), jnp.zeros(layout.d_out, jnp.int32), 0
    for width in layout.writes[:-1]:
        edge += width
        layer = layer + (column >= edge)
    return group[:, None] <= layer[None, :]


def parts(rows: Float[Array, "... n"], widths: tuple[int, ...]) -> list[Float[Array, "... _"]]:
    """Returns the sites of rows, one array each."""
    edges = [sum(widths[:i]) for i in range(len(widths) + 1)]
    return [rows[..., a:b] for a, b in zip(edges, edges[1:], strict=False)]
