"""Pallas kernel for Hopper GPUs: the k largest pre-activations of each row, never stored as a whole.

Each block multiplies a tile of rows by a tile of latents, keeps the tile in registers and writes only the best `kept`
of each row. An exact top-k over these candidates follows. If a tile may have held more winners of a row than it wrote,
the row is computed again from its whole product, 128 rows at a time. So the result is exact for any input; redone rows
only cost time. The kernel is unmeasured, so `choice` uses it only on request.

Operands are bfloat16, sums float32. Among equal values the lowest index wins, as in `top_k`; -0 equals 0 in the tiles.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from saejax.kernels import matmul, mosaic, top_k

TILE = 256
"""Latents of a tile: the widest product of one warpgroup."""
ROWS = 128
"""Rows of a tile, half of them for each of two warpgroups."""
_DEPTH = 64  # columns of x per step of the product: 128 bytes, the widest swizzle
_STEPS = 4  # steps in flight; 48 KB of shared memory each
_NEIGHBOURS = 16  # tiles of rows whose blocks run side by side, so that both operands stay in the L2 cache
_REDONE = 1e-5  # rows done again that are tolerated, as a share, where winners fall on tiles by chance
_NONE = 2**31 - 1


def fits(b: int, d_in: int, n: int, dtype: str) -> bool:
    """Returns whether the kernel takes these sizes and this precision of the operands."""
    return b % ROWS == 0 and d_in % _DEPTH == 0 and n % TILE == 0 and dtype == "bfloat16"


def top_k_of_product(
    x: Float[Array, "b d_in"], W: Float[Array, "d_in n"], bias: Float[Array, "n"], k: int, *, interpret: bool = False
) -> tuple[Float[Array, "b k"], Int[Array, "b k"]]:
    """Returns the k largest entries of each row of `x @ W + bias`, best first, and their indices; on one device.

    Args:
      x, W: Operands of the product; rounded to bfloat16.
      bias: Added in float32.
      k: How many to keep, in [1, n].
      interpret: Whether to run on the CPU, for tests.
    """
    (b, d_in), n = x.shape, W.shape[1]
    if not fits(b, d_in, n, "bfloat16"):
        raise ValueError(f"b, d_in and n must be multiples of {ROWS}, {_DEPTH} and {TILE}, got {b}, {d_in}, {n}")
    x, W = x.astype(jnp.bfloat16), W.astype(jnp.bfloat16)
    return select(x, W, bias, k, *candidates(x, W, bias, kept_per_tile(k, n // TILE), interpret=interpret))


def kept_per_tile(k: int, n_tiles: int) -> int:
    """Returns how many candidates a tile writes per row, so that rows are seldom done again.

    The smallest c with :math:`n P(\\mathrm{Poisson}(k / n) \\ge c) \\le 10^{-5}` over n tiles, at most k and TILE.

    Examples:
      >>> kept_per_tile(64, 512), kept_per_tile(64, 64), kept_per_tile(3, 1)
      (6, 10, 3)
    """
    mean, least = k / n_tiles, -(-k // n_tiles)
    c, below = 0, 0.0
    while c < min(k, TILE) and (c < least or n_tiles * (1 - below) > _REDONE):
        below += math.exp(-mean + c * math.log(mean) - math.lgamma(c + 1))
        c += 1
    return c


def candidates(
    x: Float[Array, "b d_in"], W: Float[Array, "d_in n"], bias: Float[Array, "n"], kept: int, *, interpret: bool
) -> tuple[Float[Array, "t c b"], Int[Array, "t c b"]]:
    """Returns the `kept` best entries of each tile of TILE latents in each row of `x @ W + bias`, and their indices."""
    (b, d_in), n = x.shape, W.shape[1]
    pl, plgpu = mosaic.api()
    beside = mosaic.divisor(b // ROWS, _NEIGHBOURS, 1) or 1
    half = ROWS // 2
    swizzled = (plgpu.TilingTransform((8, _DEPTH)), plgpu.SwizzleTransform(2 * _DEPTH))

    def body(x, W, bias, values, indices):
        tile, mine = lax.axis_index("tile"), lax.axis_index("warpgroup") * half
        first_row = (lax.axis_index("band") * beside + lax.axis_index("beside")) * ROWS
        latents = pl.ds(tile * TILE, TILE)

        def around(product):
            @functools.partial(pl.run_scoped, total=plgpu.ACC((half, TILE), jnp.float32))
            def write(total):
                product(total)
                pre_acts = total[...] + lax.broadcast_in_dim(
                    mosaic.load(bias.at[latents], interpret), (half, TILE), (1,)
                )
                rows = pl.ds(first_row + mine, half)

                def write_next(c, last):
                    value, column = next_of_tile(pre_acts, *last)
                    values[tile, c, rows] = value
                    indices[tile, c, rows] = column + tile * TILE
                    return value, column

                lax.fori_loop(0, kept, write_next, before_first(half))

        def step(_, x, W, total):
            plgpu.wgmma(total, x.at[pl.ds(mine, half)], W)
            plgpu.wgmma_wait(0)
            return total

        in_shared = functools.partial(plgpu.BlockSpec, transforms=swizzled, memory_space=plgpu.SMEM)
        plgpu.emit_pipeline_warp_specialized(
            step,
            grid=(d_in // _DEPTH,),
            in_specs=[in_shared((ROWS, _DEPTH), lambda s: (0, s)), in_shared((_DEPTH, TILE), lambda s: (s, 0))],
            memory_registers=40,
            wg_axis="warpgroup",
            num_compute_wgs=2,
            max_concurrent_steps=min(_STEPS, d_in // _DEPTH),
            compute_context=around,
        )(x.at[pl.ds(first_row, ROWS)], W.at[:, latents])

    shape = (n // TILE, kept, b)
    out_type = (jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape, jnp.int32))
    grid = {"band": b // ROWS // beside, "tile": n // TILE, "beside": beside}
    threads = {"num_threads": 3, "thread_name": "warpgroup"}
    return mosaic.run(body, (x, W, bias), out_type, grid, interpret=interpret, **threads)


def before_first(m: int) -> tuple[Float[Array, "m"], Int[Array, "m"]]:
    """Returns the start for `next_of_tile`, which finds the largest entry of each row."""
    return jnp.full(m, jnp.inf), jnp.full(m, -1, jnp.int32)


def next_of_tile(
    a: Float[Array, "m t"], value: Float[Array, "m"], column: Int[Array, "m"]
) -> tuple[Float[Array, "m"], Int[Array, "m"]]:
    """Returns the entry of each row, and its column, that comes after (value, column): falling values, ties by column.

    This order alone marks taken entries; nothing is overwritten, so entries of -inf count like any other.
    """
    columns = lax.broadcasted_iota(jnp.int32, a.shape, 1)

    def each_column(v):
        return lax.broadcast_in_dim(v, a.shape, (0,))

    left = (a < each_column(value)) | ((a == each_column(value)) & (columns > each_column(column)))
    following = jnp.max(jnp.where(left, a, -jnp.inf), axis=1)
    right_of = jnp.where(following < value, -1, column)
    tied = (a == each_column(following)) & (columns > each_column(right_of))
    return following, jnp.min(jnp.where(tied, columns, _NONE), axis=1)


def select(
    x: Float[Array, "b d_in"],
    W: Float[Array, "d_in n"],
    bias: Float[Array, "n"],
    k: int,
    values: Float[Array, "t c b"],
    indices: Int[Array, "t c b"],
) -> tuple[Float[Array, "b k"], Int[Array, "b k"]]:
    """Returns the k best of the candidates of all tiles, and where those may not suffice the k best of the product."""
    kept, b = values.shape[1], x.shape[0]
    # Tiles lie in the order of their latents, and equal values of one tile by index: ties stay right.
    best, at = top_k.top_k(values.transpose(2, 0, 1).reshape(b, -1), k)
    chosen = jnp.take_along_axis(indices.transpose(2, 0, 1).reshape(b, -1), at, axis=1)
    if kept >= min(k, TILE):
        return best, chosen
    unsure = jnp.any(at % kept == kept - 1, axis=1)  # a tile's last candidate won: its next might have as well
    order = jnp.nonzero(unsure, size=b, fill_value=b)[0]

    def redo(block, so_far):
        rows = lax.dynamic_slice(order, (block * ROWS,), (ROWS,))
        some = x.at[rows].get(mode="clip")
        again = top_k.top_k(matmul.matmul(some, W, "bfloat16") + bias[None, :], k)
        return tuple(whole.at[rows].set(part, mode="drop") for whole, part in zip(so_far, again, strict=True))

    return lax.fori_loop(0, (jnp.sum(unsure) + ROWS - 1) // ROWS, redo, (best, chosen))
