"""The live source: the rows of a harvest without the harvest, lane by lane, to the bit after a resume."""

import dataclasses
import json

import numpy as np
import pytest

from saejax.activations.language_model.live import Live, LiveStream
from saejax.activations.source import RowIterator
from saejax.activations.store.source import Store
from saejax.errors import UserError

N_LANES, BLOCK_ROWS = 4, 24


@pytest.fixture(scope="module")
def live(small_model) -> Live:
    """The text and the rules of `small_store`."""
    return Live(
        model=str(small_model),
        corpus="pydoc",
        hook="blocks.1.hook_resid_post",
        n_tokens=8192,
        heldout_tokens=2048,
        context_length=64,
    )


def open_live(source, lanes=range(N_LANES), seed=0, block_rows=BLOCK_ROWS):
    return source.open(n_lanes=N_LANES, block_rows=block_rows, lanes=lanes, seed=seed)


def take(stream, n: int) -> np.ndarray:
    return np.stack([next(stream) for _ in range(n)])


def bits(rows) -> list[bytes]:
    """Every row as its bytes, in an order that depends on nothing else."""
    return sorted(row.tobytes() for row in rows.reshape(-1, rows.shape[-1]))


def first_epoch(stream, n_sequences: int, batch: int) -> np.ndarray:
    """The rows of the batches of sequences that deal every sequence once."""
    n_batches, rest = divmod(n_sequences, batch)
    assert rest == 0
    lanes = [lane for number in range(n_batches) for lane in [stream._lanes[number % N_LANES]]]
    return np.concatenate([lane._batch(number // N_LANES) for number, lane in enumerate(lanes)])


def test_one_epoch_is_the_harvested_store_row_by_row(live, small_store):
    reader = Store(path=str(small_store)).reader("train")
    one_each = dataclasses.replace(live, batch_sequences=reader.n_sequences // 16)
    found = first_epoch(open_live(one_each), reader.n_sequences, one_each.batch_sequences)
    expected = reader.rows(0, reader.n_rows)
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert bits(found) == bits(expected)


def test_heldout_rows_are_those_of_the_store_to_the_bit(live, small_store):
    store = Store(path=str(small_store))
    for batch, rows in ((100, None), (64, 130), (4096, 10), (7, 0)):
        found, expected = list(live.heldout(batch, rows)), list(store.heldout(batch, rows))
        assert [len(part) for part in found] == [len(part) for part in expected]
        assert [part.tobytes() for part in found] == [part.tobytes() for part in expected]


@pytest.mark.parametrize("n", [0, 1, 37])
def test_a_restored_position_continues_to_the_bit(live, n):
    stream = open_live(live)
    assert isinstance(stream, RowIterator)
    for _ in range(n):
        next(stream)
    state = json.loads(json.dumps(stream.get_state()))
    expected = take(stream, 40)
    assert state["position"] == n and len(json.dumps(state)) < 1000
    again = open_live(live)
    again.set_state(state)
    assert take(again, 40).tobytes() == expected.tobytes()
    assert again.get_state() == stream.get_state()
    assert again.record(n + 3).tobytes() == expected[3].tobytes()


def test_lanes_and_steps_cut_the_same_rows(live):
    whole = take(open_live(live), 12)
    part = take(open_live(live, lanes=range(1, 3)), 12)
    assert part.tobytes() == whole[:, 1:3].tobytes()
    wide = take(open_live(live, block_rows=3 * BLOCK_ROWS), 4)
    assert (
        wide.tobytes()
        == np.concatenate(np.split(whole, 4), axis=0)
        .reshape(4, 3, N_LANES, BLOCK_ROWS, -1)
        .swapaxes(1, 2)
        .reshape(wide.shape)
        .tobytes()
    )


def test_seeds_and_epochs_are_orders_of_the_same_sequences(live):
    first, second = (take(open_live(live, seed=seed), 4) for seed in (0, 1))
    assert first.tobytes() != second.tobytes()
    stream = open_live(live)
    lane, per_epoch = stream._lanes[0], 128 // 8 // N_LANES
    assert lane._batch(0).tobytes() != lane._batch(per_epoch).tobytes()


def test_other_streams_are_refused(live):
    state = open_live(live).get_state()
    with pytest.raises(UserError, match="seed was 0 and is 1"):
        open_live(live, seed=1).set_state(state)
    with pytest.raises(UserError, match="data was"):
        open_live(dataclasses.replace(live, sink_factor=None)).set_state(state)
    del state["lanes"]["2"]
    with pytest.raises(UserError, match="the position lacks lanes 2"):
        open_live(live).set_state(state)
    with pytest.raises(UserError, match="batch_sequences must be at most"):
        open_live(dataclasses.replace(live, batch_sequences=4096))


def test_a_lane_spans_short_batches_and_keeps_its_place():
    """Batches of 3, 0, 1, 5, 3, 0, ... rows, numbered through; records of 4."""
    sizes = [3, 0, 1, 5]

    def start(lane, number):
        begin = number // 4 * sum(sizes) + sum(sizes[: number % 4])
        rows = 100 * lane + np.arange(begin, begin + sizes[number % 4], dtype=np.float32)
        return lambda: rows[:, None]

    stream = LiveStream(start, range(2), 4, {})
    for number in range(20):
        state = stream.get_state()
        expected = np.arange(4 * number, 4 * number + 4) + np.array([[0], [100]])
        np.testing.assert_array_equal(next(stream)[..., 0], expected)
        resumed = LiveStream(start, range(2), 4, {})
        resumed.set_state(state)
        np.testing.assert_array_equal(next(resumed)[..., 0], expected)
    with pytest.raises(UserError, match="lies before row 76"):
        resumed.record(1)
