"""A harvested store as a source: its own rows in its own dtype, train/ and heldout/ kept apart."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest

from saejax.activations import store
from saejax.activations.store.source import Store
from saejax.errors import UserError

D_IN, CONTEXT, N_SHARDS, SHARD_SEQUENCES = 4, 8, 3, 2
N_ROWS = N_SHARDS * SHARD_SEQUENCES * CONTEXT


def write(path, first: int, shards=range(N_SHARDS)) -> None:
    """A store of rows that carry their own number, counted from `first`; every token is kept."""
    facts = {
        "hook": "blocks.0.hook_resid_post",
        "dtype": "bfloat16",
        "d_in": D_IN,
        "context_length": CONTEXT,
        "shard_sequences": SHARD_SEQUENCES,
        "n_shards": N_SHARDS,
        "sink": {"factor": 10.0, "median_norm": 1.0},
    }
    with store.Writer(path, facts) as writer:
        for number in shards:
            with writer.shard(number) as shard:
                for sequence in range(number * SHARD_SEQUENCES, (number + 1) * SHARD_SEQUENCES):
                    numbers = np.arange(CONTEXT) + CONTEXT * sequence
                    index = np.stack([numbers, np.arange(CONTEXT), numbers * 0, numbers * 0 + sequence], axis=1)
                    tokens = np.stack([numbers, numbers * 0 + 1], axis=1)[None]
                    shard.append(
                        rows=np.repeat(first + numbers[:, None], D_IN, axis=1).astype(np.float32),
                        index=index.astype(np.int32),
                        tokens=tokens.astype(np.int32),
                        segment_documents=[[0]],
                        masked={"position_zero": 0, "sink": 0},
                    )
        if len(shards) == N_SHARDS:
            writer.finish()


@pytest.fixture
def source(tmp_path) -> Store:
    write(tmp_path / "train", 0)
    write(tmp_path / "heldout", 100)
    return Store(path=str(tmp_path))


def test_an_epoch_is_the_training_store_in_its_own_dtype(source):
    stream = source.open(n_lanes=2, block_rows=6, lanes=range(2), seed=0)  # 16-row shards: blocks cross borders
    records = np.stack([next(stream) for _ in range(4)])
    assert records.dtype == ml_dtypes.bfloat16 and source.d_in == D_IN
    assert stream.n_rows == N_ROWS
    np.testing.assert_array_equal(np.sort(records[..., 0].astype(int).ravel()), np.arange(N_ROWS))


def test_heldout_rows_are_those_of_the_other_store(source):
    batches = list(source.heldout(20))
    assert [len(batch) for batch in batches] == [20, 20, 8]
    np.testing.assert_array_equal(np.concatenate(batches)[:, 0].astype(int), 100 + np.arange(N_ROWS))
    assert sum(len(batch) for batch in source.heldout(20, max_rows=30)) == 30


def test_a_growing_store_serves_what_is_published_and_says_so(tmp_path, caplog):
    write(tmp_path / "train", 0, shards=range(2))
    source = Store(path=str(tmp_path))
    stream = source.open(n_lanes=1, block_rows=4, lanes=range(1), seed=0)
    assert stream.n_rows == 2 * SHARD_SEQUENCES * CONTEXT
    assert "is not finished" in caplog.text
    next(stream)
    state = stream.get_state()
    expected = np.stack([next(stream) for _ in range(20)])
    write(tmp_path / "train", 0)  # the harvest goes on: the third shard, and the manifest is complete
    grown = source.open(n_lanes=1, block_rows=4, lanes=range(1), seed=0)
    assert grown.n_rows == N_ROWS
    grown.set_state(state)
    np.testing.assert_array_equal(np.stack([next(grown) for _ in range(20)]), expected)
    shutil.rmtree(tmp_path / "train")
    write(tmp_path / "train", 1)
    with pytest.raises(UserError, match="continue: data was .* resume needs the same data"):
        source.open(n_lanes=1, block_rows=4, lanes=range(1), seed=0).set_state(state)


def test_a_run_continues_exactly_on_a_moved_store_and_not_on_another(source, tmp_path):
    cut = {"n_lanes": 2, "block_rows": 6, "lanes": range(2), "seed": 0}
    stream = source.open(**cut)
    for _ in range(3):
        next(stream)
    state = json.loads(json.dumps(stream.get_state()))
    expected = np.stack([next(stream) for _ in range(10)])
    shutil.copytree(tmp_path / "train", tmp_path / "moved" / "train")
    moved = Store(path=str(tmp_path / "moved")).open(**cut)
    next(moved)
    moved.set_state(state)
    np.testing.assert_array_equal(np.stack([next(moved) for _ in range(10)]), expected)
    write(tmp_path / "other" / "train", 1)
    with pytest.raises(UserError, match="continue: data was"):
        Store(path=str(tmp_path / "other")).open(**cut).set_state(state)


def test_the_fingerprint_changes_with_the_rows(source, tmp_path):
    before = json.loads(json.dumps(source.fingerprint()))
    assert before["hook"] == "blocks.0.hook_resid_post" and before["rows"] == N_ROWS
    assert source.fingerprint() == before
    shutil.rmtree(tmp_path / "heldout")
    write(tmp_path / "heldout", 101)
    assert source.fingerprint() != before


def test_a_path_without_stores_says_what_to_do(tmp_path):
    source = Store(path=str(tmp_path))
    with pytest.raises(UserError, match="no train/ store in it; saejax harvest"):
        source.open(n_lanes=2, block_rows=2, lanes=range(2), seed=0)
    with pytest.raises(UserError, match="no heldout/ store in it"):
        next(source.heldout(4))
