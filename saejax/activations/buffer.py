"""Shuffle buffer: mixes rows on the devices, lane by lane, inside the compiled step.

Third station of the data path. Blocks arrive as contiguous rows of the same documents; the buffer spreads them over
many batches. Every swap takes `block_rows` random rows out of each lane and puts the new block into their slots. The
buffer is always full, and no row is lost or seen twice.

Lanes never look at each other, and a lane's random bits depend on (key, lane) only. With the lane axis sharded over
"data" no swap communicates, and every mesh yields the same rows.

The buffer stores rows as integers of their width, so a swap touches only the rows that it moves. A CPU has no bfloat16
of its own: XLA would widen the whole buffer to float32 and back to write a few rows.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt

from saejax.errors import UserError
from saejax.fields import numeric
from saejax.fields.resume_policy import Fixed


@dataclasses.dataclass(frozen=True, kw_only=True)
class BufferConfig:
    """Size of the shuffle buffer."""

    rows: Fixed[int] = 65_536
    """Rows held on the devices, all lanes together; rounded down to whole batches (>= 1 batch)."""

    def __post_init__(self):
        numeric.check(self, "buffer.")
        if self.rows < 1:
            raise UserError(f"buffer.rows = {self.rows}: at least one batch is needed")

    def n_batches(self, batch: int) -> int:
        """Batches the buffer holds; a row waits for a geometric number of steps with this mean.

        Raises:
            UserError: it does not hold a single batch of `batch` rows.
        """
        if self.rows < batch:
            raise UserError(f"buffer.rows = {self.rows}: at least the batch of {batch} rows is needed")
        return self.rows // batch


@struct.dataclass
class BufferState:
    """Rows waiting in the buffer: part of the train state, saved with it."""

    rows: jax.Array
    """[n_lanes, n_batches, block_rows, d_in] bits of the rows, unsigned; sharded over "data" by lane."""
    dtype: np.dtype = struct.field(pytree_node=False)
    """Of the rows themselves, as the source gave them."""


def create(blocks: Float[Array, "n_lanes n_batches block_rows d_in"]) -> BufferState:
    """Fill the buffer with its first records, stacked behind the lane axis.

    >>> buffer = create(jnp.zeros((8, 16, 512, 768), jnp.bfloat16))     # 16 batches of 8 x 512 rows
    >>> buffer.rows.dtype, buffer.dtype
    (dtype('uint16'), dtype(bfloat16))
    """
    dtype = np.dtype(blocks.dtype)
    return BufferState(rows=lax.bitcast_convert_type(blocks, f"uint{8 * dtype.itemsize}"), dtype=dtype)


def draw_slots(key: PRNGKeyArray, *, n_lanes: int, n_batches: int, block_rows: int) -> Int[Array, "n_lanes block_rows"]:
    """Draws, for every row position of every lane, which of its `n_batches` candidates leaves: uniform, independent.

    Row i of a block always lives in stratum i, one of `n_batches` slots, and each step empties one slot of
    every stratum. So a step's slots are distinct without a sort. Every row leaves a given step with probability 1 /
    n_batches, and rows of one block leave independently of each other.
    """

    def of_lane(lane: Int[Array, ""]) -> Int[Array, "block_rows"]:
        return jax.random.randint(jax.random.fold_in(key, lane), (block_rows,), 0, n_batches)

    return jax.vmap(of_lane)(jnp.arange(n_lanes))


def swap(
    buffer: BufferState, new: Float[Array, "n_lanes block_rows d_in"], key: PRNGKeyArray
) -> tuple[BufferState, Float[Array, "n_lanes block_rows d_in"]]:
    """Take one batch out at random and put the new record into its place. Pure; donate the buffer.

    Args:
        buffer: the waiting rows.
        new: the next record of the loader, in the dtype of the buffer's rows.
        key: a new key for every step.

    Returns:
        The buffer with the new rows, and the rows that left it, lane by lane.
    """
    n_lanes, n_batches, block_rows, _ = buffer.rows.shape
    slots = draw_slots(key, n_lanes=n_lanes, n_batches=n_batches, block_rows=block_rows)
    drawn = jax.vmap(_take)(buffer.rows, slots)
    # The minimum is `slots`, which XLA cannot know: so it must read a row before it writes there, and needs no copy
    # of the buffer to keep the old row in.
    vacated = jnp.minimum(slots, n_batches - 1 + (drawn[..., 0] >> 2).astype(jnp.int32))
    bits = lax.bitcast_convert_type(new.astype(buffer.dtype), buffer.rows.dtype)
    rows = jax.vmap(_put)(buffer.rows, vacated, bits)
    return dataclasses.replace(buffer, rows=rows), lax.bitcast_convert_type(drawn, buffer.dtype)


def _take(lane: UInt[Array, "n_batches block_rows d_in"], slots: Int[Array, " block_rows"]) -> jax.Array:
    return lane.at[slots, jnp.arange(len(slots))].get(mode="promise_in_bounds")


def _put(
    lane: UInt[Array, "n_batches block_rows d_in"], slots: Int[Array, " block_rows"], bits: jax.Array
) -> jax.Array:
    return lane.at[slots, jnp.arange(len(slots))].set(bits, unique_indices=True, mode="promise_in_bounds")
