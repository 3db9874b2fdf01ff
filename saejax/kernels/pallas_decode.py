"""Pallas kernels of a k-sparse decoder on NVIDIA GPUs: combine, dot and accumulate rows.

They compute what `sparse_decode` computes on one device, and never store the gathered rows [b, k, d]. They use no
atomic additions. Accumulation sorts the places by latent, and one block sums each latent's places in that order: the
same input gives the same bits. They are unmeasured, so `choice` uses them only on request.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from saejax.kernels import mosaic

WARPGROUP = 128
"""Lanes of a block: every width must be a multiple of it."""
_WIDTH = 1024  # numbers of a row that one block holds in registers, 8 per lane
_AHEAD = 4  # gathered rows in flight


def fits(width: int) -> bool:
    """Returns whether rows of this width can be read."""
    return width % WARPGROUP == 0


def combine_rows(
    values: Float[Array, "b k"], indices: Int[Array, "b k"], W: Float[Array, "n d"], *, interpret: bool = False
) -> Float[Array, "b d"]:
    """Returns the sum of the rows of `W` at `indices`, weighted by `values`: one block per row and part of its width.

    Args:
      values: Coefficients.
      indices: Rows of `W`, in [0, n); repeats add up.
      W: float32, d a multiple of 128.
      interpret: Whether to run on the CPU, for tests.
    """
    (b, k), d = values.shape, W.shape[1]
    width = _part(d)
    pl, _ = mosaic.api()

    def body(values, indices, W, out):
        row, columns = lax.axis_index("row"), pl.ds(lax.axis_index("part") * width, width)

        def add(slot, total):
            return total + values[row, slot] * W[indices[row, slot], columns]

        out[row, columns] = lax.fori_loop(0, k, add, jnp.zeros(width, jnp.float32), unroll=_ahead(k))

    out_type = jax.ShapeDtypeStruct((b, d), jnp.float32)
    return mosaic.run(body, (values, indices, W), out_type, {"part": d // width, "row": b}, interpret=interpret)


def dot_rows(
    y: Float[Array, "b d"], indices: Int[Array, "b k"], W: Float[Array, "n d"], *, interpret: bool = False
) -> Float[Array, "b k"]:
    """Returns the inner product of each row of `y` with each of its rows of `W`: one block per row.

    Args:
      y: float32, d a multiple of 128.
      indices: Rows of `W`, in [0, n).
      W: float32.
      interpret: Whether to run on the CPU, for tests.
    """
    (b, k), d = indices.shape, W.shape[1]
    width = _part(d)
    pl, _ = mosaic.api()

    def body(y, indices, W, out):
        row = lax.axis_index("row")

        def one(slot, nothing):
            def add(part, total):
                columns = pl.ds(part * width, width)
                return total + y[row, columns] * W[indices[row, slot], columns]

            products = lax.fori_loop(0, d // width, add, jnp.zeros(width, jnp.float32), unroll=_ahead(d // width))
            out[row, slot] = jnp.sum(products)
            return nothing

        lax.fori_loop(0, k, one, jnp.int32(0))

    out_type = jax.ShapeDtypeStruct((b, k), jnp.float32)
    return mosaic.run(body, (y, indices, W), out_type, {"row": b}, interpret=interpret)


def accumulate_rows(
    values: Float[Array, "b k"], indices: Int[Array, "b k"], y: Float[Array, "b d"], n: int, *, interpret: bool = False
) -> Float[Array, "n d"]:
    """Returns the [n, d] array whose row i is the sum of `values * y` over all places that name i.

    One block per latent and part of the width; a latent's places are added in the order of the rows.

    Args:
      values: Coefficients; places with a 0 are passed over.
      indices: In [0, n); repeats add up.
      y: float32, d a multiple of 128.
      n: Rows of the result.
      interpret: Whether to run on the CPU, for tests.
    """
    d = y.shape[1]
    width = _part(d)
    pl, _ = mosaic.api()
    values, rows, starts = _by_latent(values, indices, n)

    def body(values, rows, starts, y, out):
        latent, columns = lax.axis_index("latent"), pl.ds(lax.axis_index("part") * width, width)

        first, end = starts[latent], starts[latent + 1]

        def add(step, total):
            for ahead in range(_AHEAD):  # past the end the last place again, with weight 0
                place = first + step * _AHEAD + ahead
                at = jnp.minimum(place, end - 1)
                total += jnp.where(place < end, values[at], 0.0) * y[rows[at], columns]
            return total

        out[latent, columns] = lax.fori_loop(0, (end - first + _AHEAD - 1) // _AHEAD, add, jnp.zeros(width))

    out_type = jax.ShapeDtypeStruct((n, d), jnp.float32)
    grid = {"part": d // width, "latent": n}
    return mosaic.run(body, (values, rows, starts, y), out_type, grid, interpret=interpret)


def _by_latent(values, indices, n):
    """The places sorted by latent: their values and rows, and where each latent's begin and the last's end."""
    k = values.shape[1]
    latents = jnp.where(values != 0, indices, n).reshape(-1)  # n: past the last
    latents, place = lax.sort((latents, jnp.arange(latents.size, dtype=jnp.int32)), num_keys=1, is_stable=True)
    starts = jnp.searchsorted(latents, jnp.arange(n + 1, dtype=latents.dtype)).astype(jnp.int32)
    return values.reshape(-1)[place], place // k, starts


def _part(d: int) -> int:
    width = mosaic.divisor(d, _WIDTH, WARPGROUP)
    if width is None:
        raise ValueError(f"rows must be a multiple of {WARPGROUP} wide, got {d}")
    return width


def _ahead(steps: int) -> int:
    return mosaic.divisor(steps, _AHEAD, 1) or 1
