"""Stores side by side: every row joins what the stores hold at one token, and other tokens are refused."""

import dataclasses
import json
import shutil

import ml_dtypes
import numpy as np
import pytest

from saejax import config
from saejax.activations import store
from saejax.activations.store.joined_source import Joined
from saejax.activations.store.source import Store
from saejax.errors import UserError
from saejax.runs import directory

CONTEXT, SHARDS = 8, 3
N_ROWS = SHARDS * 2 * CONTEXT
CUT = {"n_lanes": 2, "block_rows": 6, "lanes": range(2), "seed": 0}


def write(path, *, first: float, d_in: int, dtype="float32", token=0, shards=SHARDS, sites=None) -> None:
    """Stores whose rows hold `first` + their own number; one token of the last shard can be another."""
    facts = {
        "hook": "a", "dtype": dtype, "d_in": d_in, "context_length": CONTEXT, "shard_sequences": 2, "n_shards": SHARDS,
        **({"sites": sites} if sites else {}),
    }  # fmt: skip
    for split in ("train", "heldout"):
        with store.Writer(path / split, facts) as writer:
            for shard in range(shards):
                with writer.shard(shard) as out:
                    numbers = np.arange(2 * CONTEXT) + 2 * CONTEXT * shard
                    index = np.stack([numbers, numbers % CONTEXT, numbers * 0, numbers // CONTEXT], axis=1)
                    index[-1, 0] += token * (shard == SHARDS - 1)
                    out.append(
                        rows=np.repeat(first + numbers[:, None], d_in, axis=1).astype(np.float32),
                        index=index.astype(np.int32),
                        tokens=np.stack([numbers, numbers * 0 + 1], axis=1).reshape(2, CONTEXT, 2).astype(np.int32),
                        segment_documents=[[0], [0]],
                        masked={},
                    )
            writer.finish()


@pytest.fixture
def source(tmp_path) -> Joined:
    write(tmp_path / "a", first=0, d_in=4)
    write(tmp_path / "b", first=1000, d_in=3)
    return Joined(paths=(str(tmp_path / "a"), str(tmp_path / "b")))


def test_every_row_joins_one_token(source):
    assert source.d_in == 7 and source.site_widths == (4, 3)
    stream = source.open(**CUT)
    assert stream.n_rows == N_ROWS
    rows = np.stack([next(stream) for _ in range(N_ROWS // 12)]).reshape(-1, 7)
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(np.sort(rows[:, 0]), np.arange(N_ROWS))
    np.testing.assert_array_equal(rows, rows[:, :1] + np.array([[0, 0, 0, 0, 1000, 1000, 1000]]))
    batches = list(source.heldout(20))
    assert [len(batch) for batch in batches] == [20, 20, 8]
    np.testing.assert_array_equal(np.concatenate(batches)[:, [3, 6]], np.arange(N_ROWS)[:, None] + [[0, 1000]])
    assert sum(len(batch) for batch in source.heldout(20, max_rows=30)) == 30


def test_sites_of_the_stores_stay_apart_and_dtypes_meet_in_float32(source, tmp_path):
    sites = [{"hook": "x", "d_in": 1}, {"hook": "y", "d_in": 2}]
    write(tmp_path / "c", first=0, d_in=3, dtype="bfloat16", sites=sites)
    three = dataclasses.replace(source, paths=(*source.paths, str(tmp_path / "c")))
    assert three.site_widths == (4, 3, 1, 2)
    assert next(three.heldout(5)).dtype == np.float32
    same = Joined(paths=(str(tmp_path / "c"),) * 2)
    assert next(same.heldout(5)).dtype == ml_dtypes.bfloat16


def test_a_run_continues_exactly_on_moved_stores_and_not_on_others(source, tmp_path):
    stream = source.open(**CUT)
    next(stream)
    state = json.loads(json.dumps(stream.get_state()))
    expected = np.stack([next(stream) for _ in range(6)])
    shutil.copytree(tmp_path / "b", tmp_path / "moved")
    moved = dataclasses.replace(source, paths=(source.paths[0], str(tmp_path / "moved")))
    stream = moved.open(**CUT)
    stream.set_state(state)
    np.testing.assert_array_equal(np.stack([next(stream) for _ in range(6)]), expected)
    with pytest.raises(UserError, match="continue: data was"):
        dataclasses.replace(source, paths=source.paths[::-1]).open(**CUT).set_state(state)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"token": 1}, "b/.* has rows of other tokens than .*a/.*; harvest the same text .* sink_factor=null"),
        ({"shards": 2}, "the harvest of .*b/.* is not finished"),
    ],
)
def test_other_tokens_are_refused(source, tmp_path, change, message):
    shutil.rmtree(tmp_path / "b")
    write(tmp_path / "b", first=0, d_in=3, **change)
    for use in (lambda: source.d_in, lambda: source.open(**CUT), lambda: next(source.heldout(4))):
        with pytest.raises(UserError, match=message) as caught:
            use()
        assert "\n" not in str(caught.value)


def test_heldout_rows_are_compared_too(source, tmp_path):
    shutil.rmtree(tmp_path / "b" / "heldout")
    write(tmp_path / "other", first=0, d_in=3, token=1)
    shutil.copytree(tmp_path / "other" / "heldout", tmp_path / "b" / "heldout")
    assert source.d_in == 7
    with pytest.raises(UserError, match="heldout has rows of other tokens"):
        next(source.heldout(4))


def test_the_fingerprint_is_that_of_the_stores_in_order(source):
    found = json.loads(json.dumps(source.fingerprint()))
    assert found["stores"] == [Store(path=path).fingerprint() for path in source.paths]
    assert found != dataclasses.replace(source, paths=source.paths[::-1]).fingerprint()


def test_from_the_command_line_and_back_from_a_run(source, tmp_path):
    chosen = [f"source.paths=[{','.join(source.paths)}]", "sae.family=crosscoder", "sae.d_sae=8", "sae.k=2"]
    before = config.load("train", config.Config, ["source=joined", *chosen])
    assert before.source == source
    (tmp_path / "config.yaml").write_text(config.to_yaml(before))
    assert config.from_run(tmp_path).source == source
    shutil.copytree(tmp_path / "b", tmp_path / "moved")
    moved = config.from_run(tmp_path, [f"source.paths=[{source.paths[0]},{tmp_path}/moved]"])
    assert moved.source != source
    directory.check_resumable(before, moved)
    with pytest.raises(UserError, match="source.paths = .*at least 2 stores"):
        Joined(paths=source.paths[:1])
    with pytest.raises(UserError, match="source.paths must be given"):
        config.load("train", config.Config, ["source=joined"])
