"""Which data a source holds: equal for the same rows wherever they lie, another for every change that counts."""

import copy
import dataclasses
import hashlib
import json
import mmap
import shutil
import types

import numpy as np
import pytest
from safetensors.numpy import save_file
from test_store_source import N_ROWS, N_SHARDS, write

from saejax.activations import array_digest, array_files, source
from saejax.activations.arrays import Arrays
from saejax.activations.language_model.live import Live
from saejax.activations.store.joined_source import Joined
from saejax.activations.store.source import Store
from saejax.activations.synthetic import Kind, Synthetic
from saejax.errors import UserError

CUT = {"n_lanes": 2, "block_rows": 4, "lanes": range(2), "seed": 0}


def array_of(folder, rows, name: str = "rows.npy") -> Arrays:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).unlink(missing_ok=True)  # a file that is mapped must not shrink under its readers
    np.save(folder / name, rows)
    return Arrays(path=str(folder / name))


def recorded(thing: source.ActivationSource) -> list[dict]:
    """What a run may have of its data, as it reads it again: the identity, or the fingerprint."""
    return [json.loads(json.dumps(record)) for record in (thing.identity(), thing.fingerprint())]


def rows_of(n: int, d: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)


# Arrays ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.05, 0.4])
def test_the_middle_replaced_by_noise_is_other_data(tmp_path, share):
    """7.7 MB of which the first and the last MiB stay: refused by resume and by whoever compares."""
    rows = rows_of(30_000, 64)
    before = dataclasses.replace(array_of(tmp_path, rows), heldout_share=share)
    stream = before.open(**CUT)
    next(stream)
    state, records = json.loads(json.dumps(stream.get_state())), recorded(before)
    rows[10_000:20_000] = rows_of(10_000, 64, seed=1)
    array_of(tmp_path, rows)
    with pytest.raises(UserError, match="continue: data was .* and is"):
        before.open(**CUT).set_state(state)
    for record in records:
        assert before.differs_from(record) == "the checksums differ"


@pytest.mark.parametrize("row", [0, 17_000, 28_999, 29_999], ids=["first", "middle", "heldout", "last"])
def test_every_bit_counts(tmp_path, row):
    rows = rows_of(30_000, 64)
    before = array_of(tmp_path / "a", rows)
    rows.view(np.uint32)[row, 5] ^= 1
    after = array_of(tmp_path / "b", rows)
    assert all(after.differs_from(record) == "the checksums differ" for record in recorded(before))


def test_the_same_rows_are_the_same_data_wherever_they_lie(tmp_path):
    rows = rows_of(100, 6)
    one = array_of(tmp_path / "one", rows)
    for number, part in enumerate(np.split(rows, [1, 40, 99])):
        array_of(tmp_path / "many", part, f"part-{number}.npy")
    many = Arrays(path=str(tmp_path / "many"))
    assert one.identity() == many.identity() and str(tmp_path) not in json.dumps(one.identity())
    assert all(many.differs_from(record) is None for record in recorded(one))
    stream = one.open(**CUT)
    next(stream)
    again = many.open(**CUT)
    again.set_state(json.loads(json.dumps(stream.get_state())))
    np.testing.assert_array_equal(next(again), next(stream))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: rows[:-1], "rows was 100 and is 99, heldout_rows was 5 and is 5"),
        (lambda rows: rows[:, :5], "d_in was 6 and is 5"),
        (lambda rows: rows.astype(np.float16), "dtype was float32 and is float16"),
        (lambda rows: rows[::-1], "the checksums differ"),
    ],
)
def test_what_differs_is_said(tmp_path, change, said):
    before = array_of(tmp_path / "a", rows_of(100, 6))
    after = array_of(tmp_path / "b", change(rows_of(100, 6)))
    for record in recorded(before):
        assert after.differs_from(record) == said.removesuffix(", heldout_rows was 5 and is 5")
    halved = dataclasses.replace(before, heldout_share=0.5)
    assert halved.differs_from(before.identity()) == "heldout_rows was 5 and is 50"


def older_position(path: Arrays) -> str:
    """The hash of the data as versions up to 0.1.0 saved it with a position."""
    parts = []
    for _, part in array_files.open_table(path.path).parts:
        n = 1 + (1 << 20) // (part.shape[1] * part.dtype.itemsize)
        ends = hashlib.sha256(part[:n].tobytes() + part[-n:].tobytes()).hexdigest()
        parts.append({"shape": list(part.shape), "dtype": part.dtype.name, "sha256_of_ends": ends})
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def test_runs_of_older_versions_go_on(tmp_path):
    """They knew the ends of the files: what they knew is compared, and from then on all of the bytes are."""
    rows = rows_of(30_000, 64)
    arrays = array_of(tmp_path, rows)
    stream = arrays.open(**CUT)
    first = [next(stream) for _ in range(3)]
    state = copy.deepcopy(stream.get_state())
    assert len(first) == 3 and state["stream"]["data"] != older_position(arrays)
    state["stream"]["data"] = older_position(arrays)
    fingerprint = {key: value for key, value in arrays.fingerprint().items() if key != "identity"}
    again = arrays.open(**CUT)
    again.set_state(json.loads(json.dumps(state)))
    np.testing.assert_array_equal(next(again), next(stream))
    assert again.get_state() == stream.get_state()  # the newer form is saved from now on
    assert arrays.differs_from(json.loads(json.dumps(fingerprint))) is None
    rows[15_000] += 1  # between the ends, which is all that the older form can tell
    array_of(tmp_path, rows)
    arrays.open(**CUT).set_state(state)
    assert arrays.differs_from(fingerprint) is None
    rows[-1] += 1
    array_of(tmp_path, rows)
    with pytest.raises(UserError, match="continue: data was"):
        arrays.open(**CUT).set_state(state)
    assert arrays.differs_from(fingerprint) == "the checksums of parts 0 differ"


# What is larger than is hashed in full --------------------------------------------------------------------------------


@pytest.fixture
def sampled(monkeypatch):
    """The sizes of the hash divided by 2^14: 64 KiB are hashed in full, of more 4,096 blocks of 4 bytes."""
    for name in ("WHOLE", "SAMPLED", "BLOCK"):
        monkeypatch.setattr(array_digest, name, getattr(array_digest, name) >> 14)
    array_digest.of.cache_clear()
    yield
    array_digest.of.cache_clear()


def test_of_large_data_every_long_change_is_seen_and_a_short_one_as_often_as_said(sampled):
    """A changed place is seen exactly where it is among the hashed ones, which are SAMPLED / bytes of all."""
    n, longest = (
        2**17,
        2 * 2**17 // 4096,
    )  # 512 KiB; one of 4,096 stretches lies within so many rows wherever they begin
    rows = rows_of(n, 1)
    hashed = np.zeros(n, bool)
    for start, stop in array_digest.spans(n, 1, 4, array_digest.SAMPLED):
        hashed[start:stop] = True
    assert hashed.mean() == array_digest.SAMPLED / rows.nbytes == 1 / 32
    assert np.lib.stride_tricks.sliding_window_view(hashed, longest).any(axis=1).all()
    before = array_digest.of(array_files.Table([("", rows)]))
    rng = np.random.default_rng(0)
    for place in (0, n - 1, *rng.choice(np.flatnonzero(hashed), 8), *rng.choice(np.flatnonzero(~hashed), 8)):
        changed = rows.copy()
        changed[place] += 1
        assert (array_digest.of(array_files.Table([("", changed)])) != before) == hashed[place]


def test_of_large_data_the_hash_does_not_depend_on_the_files(sampled, tmp_path):
    rows = rows_of(2**15, 3)
    whole = array_digest.of(array_files.Table([("", rows)]))
    assert (
        array_digest.of(array_files.Table([(str(i), part) for i, part in enumerate(np.split(rows, [1, 999]))])) == whole
    )
    lies_otherwise = array_files.Table([("", np.asfortranarray(rows))])
    assert array_digest.of(lies_otherwise) != whole  # as documented; but it is one hash
    rows[-1] += 1
    assert array_digest.of(array_files.Table([("", np.asfortranarray(rows))])) != array_digest.of(lies_otherwise)


@pytest.mark.parametrize("name", ["a.npy", "a.safetensors"])
def test_nothing_is_read_ahead_of_the_sampled_places(name, sampled, tmp_path, monkeypatch):
    """The system is told so for the map of every file, and then told otherwise again."""
    rows = rows_of(2**15, 3)
    save_file({"a": rows}, tmp_path / "a.safetensors")
    np.save(tmp_path / "a.npy", rows)
    table = array_files.open_table(tmp_path / name)
    mapped = array_digest._map_of(table.parts[0][1])
    assert isinstance(mapped, mmap.mmap)
    said = []
    monkeypatch.setattr(array_digest, "_map_of", lambda part: types.SimpleNamespace(madvise=said.append))
    assert array_digest.of(table) == array_digest.of(array_files.Table([("", rows)]))
    assert said == [mmap.MADV_RANDOM, mmap.MADV_NORMAL] * 2


@pytest.mark.parametrize("shape", [(2**40, 768), (3 * 10**8, 4096), (1000, 2**20), (10**12, 1)])
def test_the_cost_has_a_bound(shape):
    """Of terabytes as many bytes and places are read as of gigabytes; a row of its own size at least."""
    n, width = shape
    spans = array_digest.spans(n, width, 4, array_digest.SAMPLED)
    read = sum(stop - start for start, stop in spans) * width * 4
    assert read <= max(array_digest.SAMPLED, width * 4) and len(spans) <= 2 * 4096 and len(spans) >= min(n, 1)
    assert spans[0][0] == 0 and (len(spans) == 1 or spans[-1][1] == n)
    assert all(a < b <= c for (a, b), (c, _) in zip(spans, [*spans[1:], (n, n)], strict=True))
    if width * 4 <= array_digest.BLOCK:
        assert len(spans) >= 4096


def test_a_file_that_is_written_anew_is_read_anew(tmp_path):
    arrays = array_of(tmp_path, rows_of(100, 6))
    before = arrays.identity()
    array_of(tmp_path, rows_of(90, 6))
    assert arrays.identity()["rows"] == 90 != before["rows"]


# Stores ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "a" / "train", 0)
    write(tmp_path / "a" / "heldout", 100)
    return tmp_path / "a"


def test_a_moved_store_is_the_same_data(folder, tmp_path):
    before = Store(path=str(folder))
    moved = Store(path=str(shutil.copytree(folder, tmp_path / "b")))
    assert moved.identity() == before.identity() and str(tmp_path) not in json.dumps(before.identity())
    assert all(moved.differs_from(record) is None for record in recorded(before))


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_other_rows_in_either_split_are_other_data(folder, split):
    records = recorded(Store(path=str(folder)))
    shutil.rmtree(folder / split)
    write(folder / split, 7)
    assert [Store(path=str(folder)).differs_from(record) for record in records] == [
        f"the checksums of {split} differ"
    ] * 2


@pytest.mark.parametrize("growing", [("train",), ("heldout",), ("train", "heldout")])
def test_a_store_that_has_grown_is_the_same_as_far_as_it_was_there(tmp_path, growing, caplog):
    for split, first in (("train", 0), ("heldout", 100)):
        write(tmp_path / split, first, shards=range(2) if split in growing else range(N_SHARDS))
    records = recorded(Store(path=str(tmp_path)))
    for split, first in (("train", 0), ("heldout", 100)):
        write(tmp_path / split, first)
    grown = Store(path=str(tmp_path))
    with caplog.at_level("INFO"):
        assert all(grown.differs_from(record) is None for record in records)
    assert all(f"{split} has grown from 32 to {N_ROWS} rows" in caplog.text for split in growing)
    complete = recorded(grown)
    for split in growing:
        shutil.rmtree(tmp_path / split)
        write(tmp_path / split, 5)
    assert [grown.differs_from(record) for record in records] == [f"the checksums of {', '.join(growing)} differ"] * 2
    for split in growing:
        shutil.rmtree(tmp_path / split)
        write(tmp_path / split, 0 if split == "train" else 100, shards=range(2))
    shrunk = ", ".join(f"{split} rows was {N_ROWS} and is 32" for split in growing)
    assert [grown.differs_from(record) for record in complete] == [shrunk] * 2


def resealed(folder, sealed, **changes) -> None:
    """Stores of other facts, such that every checksum is that of what they say."""
    for split in ("train", "heldout"):
        file = folder / split / "manifest.json"
        file.write_text(sealed(json.loads(file.read_text()) | changes))


def test_another_hook_or_dtype_is_named(folder, sealed):
    records = recorded(Store(path=str(folder)))
    resealed(folder, sealed, hook="blocks.1.hook_resid_post")
    for record in records:
        said = Store(path=str(folder)).differs_from(record)
        assert said == "hook was blocks.0.hook_resid_post and is blocks.1.hook_resid_post"
    resealed(folder, sealed, hook="blocks.0.hook_resid_post", dtype="float16")
    assert all("dtype was bfloat16 and is float16" == Store(path=str(folder)).differs_from(r) for r in records)


def older(fingerprint: dict) -> dict:
    """What versions up to 0.1.0 recorded: no identity."""
    return {key: value for key, value in json.loads(json.dumps(fingerprint)).items() if key != "identity"}


def test_stores_of_older_records_are_compared_by_what_those_say(folder, tmp_path, sealed):
    then = older(Store(path=str(folder)).fingerprint())
    moved = Store(path=str(shutil.copytree(folder, tmp_path / "b")))
    assert moved.differs_from(then) is None
    write(tmp_path / "c" / "train", 0, shards=range(2))
    write(tmp_path / "c" / "heldout", 100)
    growing = Store(path=str(tmp_path / "c"))
    then_growing = older(growing.fingerprint())
    write(tmp_path / "c" / "train", 0)
    assert growing.differs_from(then_growing) is None  # its manifests have changed; the loader knows the rows
    shutil.rmtree(tmp_path / "b" / "heldout")
    write(tmp_path / "b" / "heldout", 101)
    assert moved.differs_from(then) == "the checksums differ"
    resealed(tmp_path / "b", sealed, hook="elsewhere")
    assert moved.differs_from(then) == "hook was blocks.0.hook_resid_post and is elsewhere"


# Others ---------------------------------------------------------------------------------------------------------------


def test_joined_stores_are_compared_one_by_one(tmp_path):
    for name, first in (("a", 0), ("b", 50), ("c", 70)):
        write(tmp_path / name / "train", first)
        write(tmp_path / name / "heldout", first)
    a, b, c = (str(tmp_path / name) for name in "abc")
    before = Joined(paths=(a, b))
    moved = Joined(paths=(str(shutil.copytree(a, tmp_path / "d")), b))
    assert moved.identity() == before.identity() and str(tmp_path) not in json.dumps(before.identity())
    for record in (
        *recorded(before),
        older(before.fingerprint()) | {"stores": list(map(older, before.fingerprint()["stores"]))},
    ):
        assert moved.differs_from(record) is None
        assert Joined(paths=(a, c)).differs_from(record).startswith("store 2: the checksums")
        assert Joined(paths=(b, a)).differs_from(record).startswith("store 1: the checksums")
        assert Joined(paths=(a, b, c)).differs_from(record) is not None


@pytest.mark.parametrize(
    "change",
    [
        {"d_in": 32},
        {"noise": 0.2},
        {"feature_seed": 1},
        {"heldout_rows": 7},
        {"kind": Kind.hierarchical},
        {"sites": (32, 32)},
    ],
    ids=str,
)
def test_generated_data_are_their_settings(change):
    one = Synthetic()
    assert one.identity() == Synthetic().identity()
    (name, value), *_ = change.items()
    for record in recorded(one):
        assert one.differs_from(record) is None
        said = dataclasses.replace(one, **change).differs_from(record)
        assert said is not None and f"{name}" in said


def test_a_live_model_is_its_weights_and_its_tokens(small_model, tmp_path):
    """Other names of files are the same data; another text, hook or weight is not."""
    corpora = tmp_path / "one.txt", tmp_path / "two"
    corpora[1].mkdir()
    documents = [json.dumps({"text": f"document {i} " + "word " * 20}) for i in range(60)]
    corpora[0].with_suffix(".jsonl").write_text("\n".join(documents))
    shutil.copy(corpora[0].with_suffix(".jsonl"), corpora[1] / "text.jsonl")
    common = {"hook": "blocks.1.hook_resid_post", "context_length": 32, "heldout_share": 0.2}
    one = Live(model=str(small_model), corpus=str(corpora[0].with_suffix(".jsonl")), **common)
    records = recorded(one)
    moved = Live(model=str(shutil.copytree(small_model, tmp_path / "model")), corpus=str(corpora[1]), **common)
    assert moved.identity() == records[0] and str(tmp_path) not in json.dumps(records[0])
    assert all(moved.differs_from(record) is None for record in records)
    other_hook = dataclasses.replace(moved, hook="blocks.0.hook_resid_post")
    assert all("hook was" in str(other_hook.differs_from(record)) for record in records)
    (corpora[1] / "text.jsonl").write_text("\n".join(documents).replace("word", "wort"))
    other_text = dataclasses.replace(moved, batch_sequences=4)  # another object, for the model is kept
    assert "train sequences was" in str(other_text.differs_from(records[0]))  # which are held out is a hash of them
    (corpora[1] / "text.jsonl").write_text("\n".join(documents))
    file = tmp_path / "model" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    other_weights = dataclasses.replace(moved, batch_sequences=2)
    assert other_weights.differs_from(records[0]) == "the checksums of model differ"


@pytest.mark.parametrize(
    "saved", [{}, {"type": "store"}, {"type": 3, "identity": []}, {"identity": {}}, {"parts": [1]}]
)
def test_whatever_a_record_says_is_compared(saved, folder, tmp_path):
    """It may be damaged, or of another version: it is another identity, and no error."""
    stores = Store(path=str(folder)), Joined(paths=(str(folder), str(folder)))
    for thing in (*stores, Synthetic(), array_of(tmp_path / "x", rows_of(9, 2))):
        assert isinstance(thing.differs_from(saved), str)


def test_other_types_are_said_first():
    assert Synthetic().differs_from({"type": "store", "hook": "a"}) == "type was store and is synthetic"
