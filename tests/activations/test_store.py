"""The store keeps what it is given, survives being killed, refuses to lie, and knows when it is damaged."""

import json
import os
import pathlib
import pickle
import resource
import signal
import subprocess
import sys
import textwrap

import ml_dtypes
import numpy as np
import pytest

from saejax.activations import packing, store
from saejax.activations.store import files as store_format
from saejax.errors import UserError

D_IN, CONTEXT, SHARD_SEQUENCES, N_SEQUENCES = 5, 8, 3, 10
N_SHARDS = 4  # three full ones and one sequence


def _facts(**changes) -> dict:
    return {
        "hook": "blocks.0.hook_resid_post",
        "dtype": "float32",
        "d_in": D_IN,
        "context_length": CONTEXT,
        "shard_sequences": SHARD_SEQUENCES,
        "n_shards": N_SHARDS,
        "sink": {"factor": 10.0, "median_norm": 1.5},
        "harvest": {"hook": "blocks.0.hook_resid_post", "model": "tiny"},
    } | changes


def _sequences() -> list[packing.Sequence]:
    rng = np.random.default_rng(0)
    documents = [(7 * i, rng.integers(1, 100, rng.integers(1, 14)).tolist()) for i in range(40)]
    return list(packing.Packer(CONTEXT, bos_id=0).pack(documents))[:N_SEQUENCES]


def _content(number: int, sequence: packing.Sequence) -> dict:
    """Position 0 of each segment is left out; a row holds numbers that name its token."""
    kept = (sequence.segments > 0) & (packing.positions(sequence.segments) > 0)
    position, document = packing.positions(sequence.segments), sequence.documents()
    columns = sequence.tokens, position, document, np.full(CONTEXT, number)
    index = np.stack(columns, axis=-1).astype(np.int32)[kept]
    rows = np.concatenate([index, index[:, :1] * 0.1], axis=1).astype(np.float32)
    masked = int((sequence.segments > 0).sum() - kept.sum())
    tokens = np.stack([sequence.tokens, sequence.segments], axis=-1)[None]
    documents = [list(sequence.segment_documents)]
    return {
        "rows": rows, "index": index, "tokens": tokens,
        "segment_documents": documents, "masked": {"position_zero": masked, "sink": 0},
    }  # fmt: skip


def _write(path, process=0, n_processes=1, facts=None, only=None) -> list[int]:
    sequences = _sequences()
    with store.Writer(path, facts or _facts(), process=process, n_processes=n_processes) as writer:
        done = [number for number in writer.missing() if only is None or number in only]
        for number in done:
            with writer.shard(number) as shard:
                first = number * SHARD_SEQUENCES
                for sequence in range(first, min(first + SHARD_SEQUENCES, N_SEQUENCES)):
                    shard.append(**_content(sequence, sequences[sequence]))
        writer.finish()
    return done


def _expected() -> tuple[np.ndarray, np.ndarray]:
    contents = [_content(number, sequence) for number, sequence in enumerate(_sequences())]
    return np.concatenate([c["rows"] for c in contents]), np.concatenate([c["index"] for c in contents])


def _bytes(path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir()) if not file.name.startswith(".")}


def test_what_is_written_is_read(tmp_path):
    _write(tmp_path)
    reader = store.Reader(tmp_path)
    rows, index = _expected()
    assert reader.complete and reader.n_rows == len(rows) and reader.n_sequences == N_SEQUENCES
    assert reader.d_in == D_IN and reader.dtype == np.float32
    for start in range(0, len(rows) + 1):
        for stop in (start, start + 1, start + 9, len(rows)):
            if start <= stop <= len(rows):
                assert np.array_equal(reader.rows(start, stop), rows[start:stop])
                assert np.array_equal(reader.index(start, stop), index[start:stop])
    blocks = [reader.block(i, 4) for i in range(-(-len(rows) // 4))]
    assert np.array_equal(np.concatenate(blocks), rows)
    tokens, segments = reader.sequences(2, 9)
    sequences = _sequences()
    assert np.array_equal(tokens, [s.tokens for s in sequences[2:9]])
    assert np.array_equal(segments, [s.segments for s in sequences[2:9]])
    with pytest.raises(IndexError):
        reader.rows(0, len(rows) + 1)
    with pytest.raises(ValueError, match="read-only"):
        reader.rows(0, 2)[:] = 0
    assert np.array_equal(pickle.loads(pickle.dumps(reader)).rows(0, 7), rows[:7])


def test_every_row_traces_back_to_its_token(tmp_path):
    _write(tmp_path)
    reader = store.Reader(tmp_path)
    rows, index = _expected()
    columns = [np.flatnonzero((s.segments > 0) & (packing.positions(s.segments) > 0)) for s in _sequences()]
    for row, column in enumerate(np.concatenate(columns)):
        origin = reader.trace(row)
        assert origin == (*index[row], column)
        assert reader.tokens(origin.sequence)[0][origin.column] == origin.token
        document = _sequences()[origin.sequence].documents()[origin.column]
        assert origin.document == document and tuple(rows[row, :4]) == origin[:4]


def test_ten_lines_of_numpy_in_the_docs_read_a_store(tmp_path):
    _write(tmp_path, facts=_facts(dtype="bfloat16"))
    docs = pathlib.Path(__file__).parents[2] / "docs" / "formats.md"
    code = docs.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    names: dict = {}
    exec(code.replace('"store/train"', repr(str(tmp_path))), names)
    rows, index = _expected()
    assert np.array_equal(names["rows"], rows.astype(ml_dtypes.bfloat16).astype(np.float32))
    assert np.array_equal(names["index"], index)
    assert len(code.strip().splitlines()) <= 10


def test_two_writers_write_what_one_writes(tmp_path):
    _write(tmp_path / "one")
    assert _write(tmp_path / "two", process=1, n_processes=2) == [1, 3]
    assert not store.Reader(tmp_path / "two").complete
    assert _write(tmp_path / "two", process=0, n_processes=2) == [0, 2]
    assert _bytes(tmp_path / "one") == _bytes(tmp_path / "two")


def test_resume_writes_only_what_is_missing(tmp_path):
    _write(tmp_path / "straight")
    assert _write(tmp_path / "broken", only={0, 2}) == [0, 2]
    assert _write(tmp_path / "broken") == [1, 3]
    assert _write(tmp_path / "broken") == []
    assert _bytes(tmp_path / "straight") == _bytes(tmp_path / "broken")


def test_a_growing_store_shows_its_unbroken_run_of_shards(tmp_path):
    rows, _ = _expected()
    _write(tmp_path, only={2})
    reader = store.Reader(tmp_path)
    assert reader.n_rows == 0 and not reader.complete
    _write(tmp_path, only={0})
    first = reader.refresh()
    assert 0 < first < len(rows) and np.array_equal(reader.rows(0, first), rows[:first])
    _write(tmp_path, only={1})
    reader.refresh()
    assert reader.n_sequences == 9 and np.array_equal(reader.rows(0, reader.n_rows), rows[: reader.n_rows])
    reader.trace(reader.n_rows - 1)
    _write(tmp_path)
    assert reader.refresh() == len(rows) and reader.complete


@pytest.mark.parametrize("after", [0, 1, 2])
def test_killed_between_any_two_steps_a_shard_exists_whole_or_not_at_all(tmp_path, after):
    """SIGKILL while appending, before the data files are renamed, and before the record appears."""
    script = f"""
        import os, pathlib, signal, sys
        sys.path.insert(0, {str(pathlib.Path(__file__).parent)!r})
        import test_store as t
        from saejax.activations import store
        from saejax.activations.store import files as store_format
        die = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
        t._write({str(tmp_path)!r}, only={{0}})
        if {after} == 0:
            store.ShardWriter._stored = die
        elif {after} == 1:
            pathlib.Path.replace = die
        else:
            store_format.write_json = die
        t._write({str(tmp_path)!r})
    """
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env=environment, timeout=100)
    assert killed.returncode == -signal.SIGKILL
    assert store_format.published(tmp_path) == [0]
    reader = store.Reader(tmp_path)
    assert np.array_equal(reader.rows(0, reader.n_rows), _expected()[0][: reader.n_rows])
    assert reader.n_sequences == SHARD_SEQUENCES
    assert _write(tmp_path) == [1, 2, 3]
    _write(tmp_path.parent / "straight")
    assert _bytes(tmp_path) == _bytes(tmp_path.parent / "straight")


def test_an_exception_leaves_no_trace(tmp_path):
    with store.Writer(tmp_path, _facts()) as writer:
        with pytest.raises(RuntimeError), writer.shard(0) as shard:
            shard.append(**_content(0, _sequences()[0]))
            raise RuntimeError
        assert [file.name for file in tmp_path.iterdir() if not file.name.endswith(".lock")] == ["manifest.json"]


def test_full_disk_is_said_and_nothing_is_half_published(tmp_path):
    _write(tmp_path, only={0})
    largest = max(file.stat().st_size for file in tmp_path.glob("shard-*"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest // 2, before[1]))
    try:
        with pytest.raises(UserError, match="File too large; .* run the same command again"):
            _write(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert store_format.published(tmp_path) == [0]
    assert not [file.name for file in tmp_path.iterdir() if "partial" in file.name]
    assert _write(tmp_path) == [1, 2, 3] and store.verify(tmp_path) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"harvest": {"hook": "blocks.1.hook_resid_post", "model": "tiny"}}, "hook is 'blocks.1"),
        ({"dtype": "bfloat16"}, "dtype is 'bfloat16', but .* was begun with 'float32'"),
        ({"sink": {"factor": None, "median_norm": 1.5}}, "sink.factor is None, but .* was begun with 10.0"),
    ],
)
def test_another_configuration_is_not_mixed_in(tmp_path, changes, message):
    _write(tmp_path, only={0})
    before = _bytes(tmp_path)
    with pytest.raises(UserError, match=message):
        store.Writer(tmp_path, _facts(**changes))
    assert _bytes(tmp_path) == before


def test_the_median_of_the_first_harvest_stays(tmp_path):
    _write(tmp_path, only={0})
    with store.Writer(tmp_path, _facts(sink={"factor": 10.0, "median_norm": 1.7})) as writer:
        assert writer.manifest["sink"]["median_norm"] == 1.5


@pytest.mark.parametrize(
    ("value", "dtype", "fits"),
    [
        (65504.0, "float16", True),
        (65536.0, "float16", False),
        (-7e4, "float16", False),
        (7e4, "bfloat16", True),
        (3.4e38, "bfloat16", False),  # finite in float32, rounds to infinity in bfloat16
        (3.4e38, "float32", True),
        (np.nan, "float32", True),  # stored as it came: float32 rows are not looked at
        (np.nan, "bfloat16", False),
    ],
)
def test_a_dtype_that_overflows_is_refused(tmp_path, value, dtype, fits):
    with store.Writer(tmp_path, _facts(dtype=dtype)) as writer:
        content = _content(0, _sequences()[0])
        content["rows"][2, 3] = value
        if fits:
            with writer.shard(0) as shard:
                shard.append(**content)
            return
        with pytest.raises(UserError) as caught, writer.shard(0) as shard:
            shard.append(**content)
    assert "blocks.0.hook_resid_post" in str(caught.value) and "\n" not in str(caught.value)
    if np.isfinite(value):
        assert f"{abs(value):.6g}" in str(caught.value) and dtype in str(caught.value)
    assert store_format.published(tmp_path) == []


def test_bfloat16_rounds_to_nearest(tmp_path):
    _write(tmp_path, facts=_facts(dtype="bfloat16"))
    reader = store.Reader(tmp_path)
    assert reader.dtype == ml_dtypes.bfloat16
    rows, _ = _expected()
    got = reader.rows(0, len(rows)).astype(np.float32)
    assert np.all(np.abs(got - rows) <= 2.0**-8 * np.abs(rows))  # 8 significand bits: half a unit is 2^-8


def _flip(path):
    file = path / "shard-00001.rows"
    data = bytearray(file.read_bytes())
    data[13] ^= 4
    file.write_bytes(data)


def _edit_record(path):
    file = path / "shard-00002.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rows": 3}))


@pytest.mark.parametrize(
    ("damage", "messages"),
    [
        (_flip, ["shard-00001.rows: sha256 is"]),
        (lambda p: os.truncate(p / "shard-00000.index", 20), ["shard-00000.index has 20 bytes, expected"]),
        (lambda p: (p / "shard-00002.json").unlink(), ["shard-00002.json is missing"]),
        (lambda p: (p / "shard-00003.tokens").unlink(), ["shard-00003.tokens is missing"]),
        (lambda p: (p / "shard-00003.json").write_text("{"), ["shard-00003.json is damaged"]),
        (lambda p: (p / "shard-00003.json").write_text("{}"), ["shard-00003 lacks name"]),
        (_edit_record, ["rows is 3, the manifest says", "rows has", "index has", "the manifest says"]),
        (lambda p: (p / "manifest.json").write_text("[]"), ["manifest.json is damaged"]),
        (
            lambda p: (p / "shard-00007.json").write_text("{}"),
            ["shard-00007.json is not in the manifest"],
        ),
    ],
)
def test_verify_says_exactly_what_is_wrong(tmp_path, damage, messages):
    _write(tmp_path)
    assert store.verify(tmp_path) == []
    damage(tmp_path)
    problems = store.verify(tmp_path)
    assert len(problems) == len(messages), problems
    for problem, message in zip(problems, messages, strict=True):
        assert message in problem


def test_verify_and_info_of_an_unfinished_store(tmp_path):
    _write(tmp_path, only={0, 2})
    assert len(store.verify(tmp_path)) == 1 and "2 of 4 shards" in store.verify(tmp_path)[0]
    facts = store.info(tmp_path)
    assert facts["shards"] == 2 and facts["sequences"] == 6 and not facts["complete"]
    assert "growing: 2 of 4 shards" in store.describe(tmp_path)


def test_info_counts(tmp_path):
    _write(tmp_path / "train")
    facts = store.info(tmp_path / "train")
    rows, _ = _expected()
    tokens = sum(sequence.n_tokens for sequence in _sequences())
    assert facts["rows"] == len(rows) and facts["tokens"] == tokens
    assert facts["masked"] == {"position_zero": tokens - len(rows)}
    data = [file for file in (tmp_path / "train").iterdir() if file.suffix in store_format.DATA_SUFFIXES]
    assert facts["bytes"] == sum(file.stat().st_size for file in data)
    assert f"{len(rows):,} x {D_IN} float32" in store.describe(tmp_path)
    assert store.verify(tmp_path) == []


def test_what_is_no_store_is_refused(tmp_path):
    with pytest.raises(UserError, match="not an activation store"):
        store.Reader(tmp_path)
    with pytest.raises(UserError, match="not an activation store"):
        store.describe(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": "other"}')
    with pytest.raises(UserError, match="format must be 'saejax-activations', got 'other'"):
        store.Reader(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": "saejax-activations", "format_version": 2}')
    with pytest.raises(UserError, match="format_version must be 1, got 2"):
        store.Reader(tmp_path)


def test_a_damaged_shard_is_not_read_silently(tmp_path):
    _write(tmp_path)
    os.truncate(tmp_path / "shard-00001.rows", 7)
    reader = store.Reader(tmp_path)
    with pytest.raises(UserError, match="shard-00001.rows has 7 bytes, expected"):
        reader.rows(0, reader.n_rows)
