"""The stream of blocks: same rows for every split over processes, every block once an epoch, exact resume."""

import copy
import json

import ml_dtypes
import numpy as np
import pytest

from saejax.activations.loader import Identity, digest, open_rows
from saejax.activations.source import RowIterator
from saejax.activations.synthetic import Synthetic
from saejax.errors import UserError

N_LANES, BLOCK_ROWS, D_IN = 4, 5, 3


def numbered(n: int, dtype=np.float32) -> np.ndarray:
    """Rows [n, D_IN] that carry their own number."""
    return np.repeat(np.arange(n, dtype=np.float32)[:, None], D_IN, axis=1).astype(dtype)


def open_numbered(n=118, lanes=range(N_LANES), seed=0, prefetch=2, offset=0, **cut):
    rows = numbered(n) + offset
    sizes = {"n_lanes": N_LANES, "block_rows": BLOCK_ROWS} | cut
    identity = Identity(lambda m: digest(rows[:m].tolist()))
    return open_rows(rows, identity=identity, lanes=lanes, seed=seed, prefetch=prefetch, **sizes)


def open_synthetic(lanes=range(N_LANES), seed=0, prefetch=2):
    source = Synthetic(d_in=8, n_features=16)
    return source.open(n_lanes=N_LANES, block_rows=BLOCK_ROWS, lanes=lanes, seed=seed, prefetch=prefetch)


def take(stream, n: int) -> np.ndarray:
    return np.stack([next(stream) for _ in range(n)])


OPENERS = pytest.mark.parametrize("open_stream", [open_numbered, open_synthetic])


@OPENERS
@pytest.mark.parametrize("n_processes", [2, 4])
def test_any_split_of_lanes_over_processes_reads_the_same_stream(open_stream, n_processes):
    whole = take(open_stream(), 20)
    share = N_LANES // n_processes
    parts = [take(open_stream(lanes=range(p * share, (p + 1) * share)), 20) for p in range(n_processes)]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


@OPENERS
@pytest.mark.parametrize("prefetch", [0, 3])
def test_a_restored_position_continues_exactly(open_stream, prefetch):
    stream = open_stream(prefetch=prefetch)
    take(stream, 9)  # in the middle of the second epoch, with records read ahead
    state = json.loads(json.dumps(stream.get_state()))
    expected = take(stream, 10)
    assert state["position"] == 9 and type(state["position"]) is int
    fresh = open_stream(prefetch=3 - prefetch)
    fresh.set_state(state)
    np.testing.assert_array_equal(take(fresh, 10), expected)
    stream.set_state(state)
    np.testing.assert_array_equal(take(stream, 10), expected)


@OPENERS
def test_a_process_of_another_split_continues_the_same_stream(open_stream):
    stream = open_stream()
    take(stream, 7)
    expected = next(stream)
    part = open_stream(lanes=range(2, 4))
    part.set_state({**stream.get_state(), "position": 7})
    np.testing.assert_array_equal(next(part), expected[2:4])


@OPENERS
def test_a_position_in_another_stream_is_refused(open_stream):
    state = open_stream(seed=1).get_state()
    with pytest.raises(UserError, match="seed was 1 and is 0; resume needs the same data"):
        open_stream(seed=0).set_state(state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"offset": 1}, "continue: data was [0-9a-f]{12} and is [0-9a-f]{12}; resume"),
        ({"n": 100}, "rows was 115 and is 100, data was"),
        ({"block_rows": 4}, "rows was 115 and is 116, block_rows was 5 and is 4, data was"),
        ({"n": 1000, "block_rows": 200}, "block_rows was 5 and is 200"),
        ({"n_lanes": 2, "lanes": range(2)}, "continue: lanes was 4 and is 2; resume"),
        ({"n": 400, "offset": 1}, "continue: data was"),
    ],
)
def test_what_differs_is_named(changes, message):
    state = open_numbered().get_state()
    with pytest.raises(UserError, match=message):
        open_numbered(**changes).set_state(state)


def test_other_generated_data_is_refused_but_more_heldout_rows_are_not():
    cut = {"n_lanes": N_LANES, "block_rows": BLOCK_ROWS, "lanes": range(N_LANES), "seed": 0}
    state = Synthetic(d_in=8, n_features=16).open(**cut).get_state()
    Synthetic(d_in=8, n_features=16, heldout_rows=5).open(**cut).set_state(state)
    with pytest.raises(UserError, match="continue: data was"):
        Synthetic(d_in=8, n_features=16, noise=0.5).open(**cut).set_state(state)


def test_a_source_that_has_grown_continues_with_the_rows_it_had(caplog):
    stream = open_numbered(118)
    take(stream, 9)
    state = json.loads(json.dumps(stream.get_state()))
    expected = take(stream, 30)
    grown = open_numbered(400)
    next(grown)
    with caplog.at_level("INFO", logger="saejax.activations.loader"):
        grown.set_state(state)
    assert "the first 115 of now 400 rows" in caplog.text and grown.n_rows == 115
    np.testing.assert_array_equal(take(grown, 30), expected)
    again = grown.get_state()
    assert again["position"] == 39 and again["stream"] == state["stream"]


def test_a_state_of_another_version_is_refused_in_one_line():
    with pytest.raises(UserError, match="rows was None and is 115"):
        open_numbered().set_state({"position": 3, "stream": "23 blocks of 5 rows, 4 lanes, seed 0"})


def test_every_epoch_reads_every_block_once_in_an_order_of_its_own():
    n_blocks, epochs = 23, 4  # 118 rows: 23 blocks and a tail of 3; 23 is no multiple of the 4 lanes
    records = take(open_numbered(), n_blocks * epochs // N_LANES)
    starts = records[..., 0, 0].ravel()
    np.testing.assert_array_equal(
        records[..., 0], starts.reshape(-1, N_LANES, 1) + np.arange(BLOCK_ROWS, dtype=np.float32)
    )
    orders = starts.reshape(epochs, n_blocks)
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), BLOCK_ROWS * np.arange(n_blocks))
    assert len({tuple(order) for order in orders}) == epochs
    assert open_numbered().n_rows == 115


def test_blocks_are_shuffled_uniformly():
    """Mean place of each block over many epochs: (n - 1) / 2 with variance (n^2 - 1) / 12 per epoch."""
    n_blocks, epochs = 8, 400
    starts = take(open_numbered(40, prefetch=0), n_blocks * epochs // N_LANES)[..., 0, 0].ravel()
    places = np.argsort(starts.reshape(epochs, n_blocks), axis=1)
    error = np.sqrt((n_blocks**2 - 1) / 12 / epochs)
    np.testing.assert_allclose(places.mean(axis=0), (n_blocks - 1) / 2, atol=5 * error)


def test_seeds_give_other_orders_of_the_same_blocks():
    first, second = (take(open_numbered(seed=seed), 23)[..., 0, 0].ravel() for seed in (0, 1))
    assert (first != second).any()
    np.testing.assert_array_equal(np.sort(first), np.sort(second))


def test_bfloat16_rows_pass_unchanged():
    rows = numbered(100, ml_dtypes.bfloat16)
    stream = open_rows(rows, identity=Identity(str), n_lanes=2, block_rows=10, lanes=range(2), seed=0)
    record = next(stream)
    assert record.dtype == ml_dtypes.bfloat16 and record.shape == (2, 10, D_IN)
    assert isinstance(stream, RowIterator)


def test_too_little_data_is_refused_and_a_dropped_tail_is_logged(caplog):
    with pytest.raises(UserError, match=r"19 training rows: a step takes 20 \(4 lanes x 5 rows\)"):
        open_numbered(19)
    with caplog.at_level("INFO", logger="saejax.activations.loader"):
        open_numbered(118)
    assert "the last 3 of 118 rows" in caplog.text


@pytest.mark.parametrize("lanes", [range(0), range(2, 6)])
def test_lanes_outside_the_run_are_refused(lanes):
    with pytest.raises(UserError, match="lanes = "):
        open_numbered(lanes=lanes)


def test_an_error_in_the_reading_thread_reaches_the_caller():
    class Broken:
        shape, dtype = (100, D_IN), np.dtype(np.float32)

        def __getitem__(self, rows):
            raise UserError("row 3 is broken")

    with pytest.raises(UserError, match="row 3 is broken"):
        next(open_rows(Broken(), identity=Identity(str), n_lanes=2, block_rows=10, lanes=range(2), seed=0))


def test_a_position_of_a_stream_that_knows_no_older_form_is_compared_as_it_is():
    rows, cut = np.zeros((64, 2), np.float32), {"n_lanes": 2, "block_rows": 4, "lanes": range(2), "seed": 0}
    stream = open_rows(rows, identity=Identity(lambda n: "new"), **cut)
    state = copy.deepcopy(stream.get_state())
    state["stream"]["data"] = "old"
    with pytest.raises(UserError, match="continue: data was old and is new"):
        stream.set_state(state)
    again = open_rows(rows, identity=Identity(lambda n: "new", lambda n: "old"), **cut)
    again.set_state(state)
    assert again.get_state()["stream"]["data"] == "new"
    state["stream"]["data"] = "other"
    with pytest.raises(UserError, match="continue: data was other and is new"):
        again.set_state(state)
