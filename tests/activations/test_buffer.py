"""The shuffle buffer: nothing lost, nothing doubled, well mixed, the same on every mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from saejax.activations import buffer
from saejax.activations.buffer import BufferConfig
from saejax.errors import UserError

N_LANES, N_BATCHES, BLOCK_ROWS, D_IN = 8, 4, 6, 3
SWAP = jax.jit(buffer.swap, donate_argnums=0)


def numbered_records(n: int, *, block_rows: int = BLOCK_ROWS, dtype=np.float32) -> np.ndarray:
    """Records [n, N_LANES, block_rows, D_IN]; every row carries its own number, counted within its lane."""
    rows = np.arange(n * block_rows).reshape(n, 1, block_rows, 1) + 10_000 * np.arange(N_LANES)[:, None, None]
    return np.broadcast_to(rows, (n, N_LANES, block_rows, D_IN)).astype(dtype)


def filled(records: np.ndarray, n_batches: int = N_BATCHES) -> buffer.BufferState:
    return buffer.create(jnp.asarray(np.swapaxes(records[:n_batches], 0, 1)))


def run(records, *, n_batches=N_BATCHES, mesh=None, seed=0):
    """Swap all records through one buffer; return the batches, one a step, and the rows that still wait."""
    state = filled(records, n_batches)
    if mesh is not None:
        state = jax.device_put(state, NamedSharding(mesh, P("data")))
    batches = []
    for step, record in enumerate(records[n_batches:]):
        new = record if mesh is None else jax.device_put(record, NamedSharding(mesh, P("data")))
        state, batch = SWAP(state, new, jax.random.fold_in(jax.random.key(seed), step))
        batches.append(np.asarray(batch))
    return np.stack(batches), np.asarray(state.rows).view(state.dtype)


def test_every_row_that_came_in_left_once_or_waits():
    records = numbered_records(60)
    batches, left = run(records)
    for lane in range(N_LANES):
        seen = np.concatenate([batches[:, lane].reshape(-1, D_IN), left[lane].reshape(-1, D_IN)])
        np.testing.assert_array_equal(np.sort(seen[:, 0]), records[:, lane, :, 0].ravel())
        assert (seen == seen[:, :1]).all()


def test_bfloat16_rows_keep_their_bits():
    records = numbered_records(20, dtype=np.float32) % 199  # all exact in bfloat16
    exact, _ = run(records)
    batches, left = run(records.astype(jnp.bfloat16))
    assert batches.dtype == left.dtype == jnp.bfloat16
    np.testing.assert_array_equal(batches.astype(np.float32), exact)


def make_mesh(n_data: int, n_latent: int) -> Mesh:
    devices = np.asarray(jax.devices()[: n_data * n_latent]).reshape(n_data, n_latent)
    return Mesh(devices, ("data", "latent"), axis_types=(AxisType.Auto,) * 2)


@pytest.mark.parametrize("shape", [(1, 1), (8, 1), (4, 2), (2, 4), (1, 8)])
def test_every_mesh_yields_the_same_rows(shape):
    records = numbered_records(12)
    expected, expected_left = run(records)
    mesh = make_mesh(*shape)
    with jax.set_mesh(mesh):
        batches, left = run(records, mesh=mesh)
    np.testing.assert_array_equal(batches, expected)
    np.testing.assert_array_equal(left, expected_left)


@pytest.mark.parametrize("shape", [(8, 1), (4, 2)])
def test_a_swap_never_communicates(shape):
    mesh = make_mesh(*shape)
    sharding = NamedSharding(mesh, P("data"))
    records = numbered_records(N_BATCHES + 1)
    with jax.set_mesh(mesh):
        state = jax.device_put(filled(records), sharding)
        compiled = SWAP.lower(state, jax.device_put(records[-1], sharding), jax.random.key(0)).compile()
    hlo = compiled.as_text()
    for operation in ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter"):
        assert operation not in hlo
    new_state, batch = compiled.output_shardings
    assert new_state.rows.is_equivalent_to(sharding, 4) and batch.is_equivalent_to(sharding, 3)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_a_swap_moves_the_rows_it_draws_and_copies_nothing_else(dtype):
    """What a compiled swap needs besides its arguments is a few batches, far from the size of the buffer."""
    rows = jax.ShapeDtypeStruct((N_LANES, 256, BLOCK_ROWS, 64), dtype)
    batch = jax.ShapeDtypeStruct((N_LANES, BLOCK_ROWS, 64), dtype)
    state, key = jax.eval_shape(buffer.create, rows), jax.eval_shape(lambda: jax.random.key(0))
    analysis = SWAP.lower(state, batch, key).compile().memory_analysis()
    assert analysis.alias_size_in_bytes >= rows.size * rows.dtype.itemsize
    assert analysis.temp_size_in_bytes < 8 * batch.size * batch.dtype.itemsize + 4096


def reference_swap(rows, new, key):
    """The same draw, written as a pass over the whole buffer in the rows' own dtype."""
    slots = buffer.draw_slots(key, n_lanes=N_LANES, n_batches=rows.shape[1], block_rows=BLOCK_ROWS)
    places = np.arange(N_LANES)[:, None], np.asarray(slots), np.arange(BLOCK_ROWS)[None]
    batch, rows = rows[places], rows.copy()
    rows[places] = new
    return rows, batch


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_bits_of_every_row_survive(dtype):
    """Rows of random bits, infinities and NaNs with payloads among them, against the plain form of the swap."""
    bits = np.random.default_rng(0).integers(0, 256, (9, N_LANES, BLOCK_ROWS, D_IN * 4), np.uint8)
    records = bits.view(np.uint16 if np.dtype(dtype).itemsize == 2 else np.uint32).view(dtype)
    rows = np.swapaxes(records[:N_BATCHES], 0, 1)
    state = buffer.create(jnp.asarray(rows))
    for step, new in enumerate(records[N_BATCHES:]):
        key = jax.random.key(step)
        rows, expected = reference_swap(rows, new, key)
        state, batch = SWAP(state, new, key)
        assert batch.dtype == dtype and np.asarray(batch).tobytes() == expected.tobytes()
        assert np.asarray(state.rows).tobytes() == rows.tobytes()


def test_rows_of_one_block_leave_as_the_ideal_says():
    """A row waits a geometric number of steps, and rows of one block leave independently of each other.

    With S batches in the buffer, p_t = P(leaves t steps after it came) = (1 - 1/S)^(t-1) / S. The B rows of
    one block reach an expected sum_t 1 - (1 - p_t)^B distinct batches, with a variance below the mean
    (occupancy counts are negatively associated): the mean over blocks lies within 5 standard errors of that.
    """
    n_batches, block_rows, steps = 8, 32, 200
    records = numbered_records(steps, block_rows=block_rows)
    batches, _ = run(records, n_batches=n_batches)
    came = (batches[..., 0] % 10_000).astype(int) // block_rows
    left = np.broadcast_to(np.arange(len(batches))[:, None, None] + n_batches, came.shape)
    waits, reached = [], []
    for lane in range(N_LANES):
        for block in range(n_batches, steps - 100):  # the chance that a row waits 100 steps is 2e-6
            when = left[:, lane][came[:, lane] == block] - block
            assert len(when) == block_rows
            waits.append(when)
            reached.append(len(np.unique(when)))
    t = np.arange(1, 400)
    p = (1 - 1 / n_batches) ** (t - 1) / n_batches
    ideal = (1 - (1 - p) ** block_rows).sum()
    assert abs(np.mean(reached) - ideal) < 5 * np.sqrt(ideal / len(reached))
    std = np.sqrt((1 - 1 / n_batches) * n_batches**2)  # of the geometric law
    assert abs(np.mean(waits) - n_batches) < 5 * std / np.sqrt(np.size(waits))
    assert ideal > 15  # a run of 32 rows of one document reaches 15 batches instead of 1


def test_lanes_and_steps_draw_independently():
    draw = jax.vmap(lambda key: buffer.draw_slots(key, n_lanes=4, n_batches=16, block_rows=64))
    slots = np.asarray(draw(jax.random.split(jax.random.key(0), 200)))
    assert slots.min() == 0 and slots.max() == 15
    z = (slots - slots.mean()) / slots.std()
    n = 200 * 64
    for a, b in [(z[:, 0], z[:, 1]), (z[:, 2], z[:, 3]), (z[:-1, 0], z[1:, 0]), (z[:, 0, 1:], z[:, 0, :-1])]:
        assert abs((a * b).mean()) < 5 / np.sqrt(n * 0.9)
    counts = np.bincount(slots.ravel(), minlength=16)
    chi2 = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    assert chi2 < 15 + 5 * np.sqrt(2 * 15)


def test_config_counts_whole_batches_and_refuses_less_than_one():
    assert BufferConfig(rows=1000).n_batches(300) == 3
    with pytest.raises(UserError, match="buffer.rows = 100: at least the batch of 300"):
        BufferConfig(rows=100).n_batches(300)
    with pytest.raises(UserError, match="buffer.rows = 0"):
        BufferConfig(rows=0)
