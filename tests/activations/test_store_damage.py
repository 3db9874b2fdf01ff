"""No damaged shard is ever handed out: it is named and refused, or left out and counted when that is asked for."""

import json
import shutil

import numpy as np
import pytest
from test_store_source import CONTEXT, N_ROWS, N_SHARDS, SHARD_SEQUENCES, write

from saejax.activations import store
from saejax.activations.loader import Identity, open_rows
from saejax.activations.store.source import Store, Verify
from saejax.errors import UserError

SHARD_ROWS = SHARD_SEQUENCES * CONTEXT


def flip(file, bit: int = 0) -> None:
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def cut(file) -> None:
    file.write_bytes(file.read_bytes()[:-1])


DAMAGE = {"flipped": flip, "cut": cut, "missing": lambda file: file.unlink()}


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "train", 0)
    write(tmp_path / "heldout", 100)
    return tmp_path


def epoch(source: Store, lanes: int = 2, block: int = 4) -> np.ndarray:
    """The numbers that the rows of one epoch carry, in order."""
    stream = source.open(n_lanes=lanes, block_rows=block, lanes=range(lanes), seed=0)
    records = [next(stream) for _ in range(stream.n_rows // (lanes * block))]
    return np.concatenate([record[..., 0].astype(int).ravel() for record in records])


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("verify", [Verify.first_use, Verify.start])
def test_a_damaged_shard_is_named_and_refused(folder, kind, verify):
    source = Store(path=str(folder), verify=verify)
    assert len(epoch(source)) == N_ROWS
    DAMAGE[kind](folder / "train" / "shard-00001.rows")  # also after it was found sound once
    with pytest.raises(UserError, match="shard-00001.rows.*(checksum|has|missing).*run the same harvest again"):
        epoch(source)
    assert len(list(source.heldout(20))) == 3
    DAMAGE[kind](folder / "heldout" / "shard-00000.rows")
    with pytest.raises(UserError, match="heldout/shard-00000.rows"):
        list(source.heldout(20))


def test_start_looks_at_every_shard_before_the_first_row(folder):
    for number in (0, 2):
        flip(folder / "train" / f"shard-0000{number}.rows")
    with pytest.raises(UserError, match="2 damaged: .*shard-00000.*shard-00002.*source.skip_damaged=true"):
        Store(path=str(folder), verify=Verify.start).open(n_lanes=1, block_rows=1, lanes=range(1), seed=0)
    assert len(epoch(Store(path=str(folder), verify=Verify.never))) == N_ROWS


@pytest.mark.parametrize("damaged", [[0], [1], [2], [0, 2]])
def test_what_is_left_out_is_left_out_everywhere_and_counted(folder, damaged, caplog):
    for number in damaged:
        flip(folder / "train" / f"shard-0000{number}.rows", 31)
    source = Store(path=str(folder), skip_damaged=True)
    kept = [n for n in range(N_SHARDS) if n not in damaged]
    rows = np.concatenate([np.arange(n * SHARD_ROWS, (n + 1) * SHARD_ROWS) for n in kept])
    np.testing.assert_array_equal(np.sort(epoch(source)), rows)
    assert source.skipped() == {"train": [f"shard-0000{n}" for n in damaged], "heldout": []}
    assert "left out, with its rows: shard-0000" in caplog.text
    # Slices of any place, across the gaps too.
    view = source.rows("train")
    for start in range(len(rows) + 1):
        for stop in (start, start + 1, start + 19, len(rows)):
            np.testing.assert_array_equal(view[start:stop][:, 0].astype(int), rows[start:stop])


def test_a_position_is_one_in_the_rows_that_are_left(folder):
    """Same damage, same stream; other damage than when the run began is refused, by name of the field."""
    opened = dict(n_lanes=2, block_rows=4, lanes=range(2), seed=0)
    whole = Store(path=str(folder)).open(**opened)
    next(whole)
    flip(folder / "train" / "shard-00001.rows")
    source = Store(path=str(folder), skip_damaged=True)
    stream = source.open(**opened)
    first = [next(stream) for _ in range(3)]
    again = source.open(**opened)
    again.set_state(stream.get_state())
    np.testing.assert_array_equal(next(again), next(stream))
    assert len(first) == 3
    with pytest.raises(UserError, match="rows was 48 and is 32, data was"):
        source.open(**opened).set_state(whole.get_state())


def test_identity_of_a_prefix_knows_the_gaps_before_it_only(folder):
    sound = Store(path=str(folder)).rows("train").identity(SHARD_ROWS)
    flip(folder / "train" / "shard-00001.rows")
    rows = Store(path=str(folder), skip_damaged=True).rows("train")
    assert rows.identity(SHARD_ROWS) != rows.identity(2 * SHARD_ROWS)
    opened = open_rows(rows, identity=Identity(rows.identity), n_lanes=1, block_rows=4, lanes=range(1), seed=0)
    assert opened.n_rows == 2 * SHARD_ROWS
    last = shutil.copytree(folder, folder / "copy")
    shutil.copy(last / "heldout" / "shard-00001.rows", last / "train" / "shard-00002.rows")
    rows = Store(path=str(last), skip_damaged=True).rows("train")
    assert rows.without == ["shard-00001", "shard-00002"] and rows.identity(SHARD_ROWS) == sound


def test_no_bit_of_a_store_can_flip_unseen(folder):
    """Every bit of the rows, a sample of the manifest: refused, or the same rows."""
    expected = epoch(Store(path=str(folder)))
    rng = np.random.default_rng(0)
    for name in ("shard-00000.rows", "manifest.json"):
        file = folder / "train" / name
        content = file.read_bytes()
        refused = 0
        for bit in rng.choice(8 * len(content), 60, replace=False):
            flip(file, int(bit))
            try:
                np.testing.assert_array_equal(epoch(Store(path=str(folder))), expected)
            except UserError:
                refused += 1
            file.write_bytes(content)
        assert refused == 60 if name.endswith(".rows") else refused >= 50, name


def test_settings_and_manifests_that_cannot_be(folder):
    with pytest.raises(UserError, match="source.skip_damaged=true needs source.verify=first_use or start, got never"):
        Store(path=str(folder), skip_damaged=True, verify=Verify.never)
    file = folder / "train" / "manifest.json"
    manifest = json.loads(file.read_text())
    file.write_text(json.dumps(manifest | {"hook": "blocks.1.hook_resid_post"}))
    with pytest.raises(UserError, match="manifest.json is damaged: its checksum"):
        store.Reader(folder / "train")


def test_the_same_harvest_writes_a_lost_shard_again(folder):
    before = {file.name: file.read_bytes() for file in (folder / "train").glob("*")}
    (folder / "train" / "shard-00001.rows").unlink()
    cut(folder / "train" / "shard-00002.index")
    write(folder / "train", 0)
    assert {file.name: file.read_bytes() for file in (folder / "train").glob("*")} == before
