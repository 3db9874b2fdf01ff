"""What vouches for a store stands in its manifest: where it is missing, nothing in the store is believed."""

import json

import pytest
from test_store_damage import flip
from test_store_source import N_ROWS, write

from saejax.activations import store
from saejax.activations.store import files as store_format
from saejax.activations.store.source import Store
from saejax.errors import UserError

CUT = {"n_lanes": 2, "block_rows": 4, "lanes": range(2), "seed": 0}


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "a" / "train", 0)
    write(tmp_path / "a" / "heldout", 100)
    return tmp_path / "a"


def stripped(manifest: dict) -> dict:
    """A manifest as the first stores had them: without checksums of itself and of the shards' records."""
    shards = [{key: value for key, value in shard.items() if key != "json_sha256"} for shard in manifest["shards"]]
    manifest = {key: value for key, value in manifest.items() if key not in ("sha256", "sealed")} | {"shards": shards}
    return manifest | {"fingerprint": store_format.fingerprint(manifest)}


def without(manifest: dict, *keys: str) -> dict:
    return {key: value for key, value in manifest.items() if key not in keys}


def without_in_shards(manifest: dict, key: str) -> dict:
    return manifest | {"shards": [without(shard, key) for shard in manifest["shards"]]}


FORGED = {
    "no sha256": lambda m: without(m, "sha256"),
    "no sha256, dtype": lambda m: without(m, "sha256") | {"dtype": "float16"},
    "no sha256, d_in": lambda m: without(m, "sha256") | {"d_in": 2, "rows": 96},
    "no checksums": lambda m: without_in_shards(without(m, "sha256"), "json_sha256"),
    "no checksums, not sealed": lambda m: without_in_shards(without(m, "sha256", "sealed"), "json_sha256"),
    "no checksums, dtype": lambda m: (
        without_in_shards(without(m, "sha256", "sealed"), "json_sha256") | {"dtype": "float16"}
    ),
    "null": lambda m: m | {"sha256": None},
    "empty": lambda m: m | {"sha256": ""},
    "other": lambda m: m | {"sha256": "0" * 64},
    "shard": lambda m: without_in_shards(without(m, "sha256"), "sha256"),
    "older, shard": lambda m: without_in_shards(stripped(m), "sha256"),
    "older, dtype": lambda m: stripped(m) | {"dtype": "float16"},
    "older, hook": lambda m: stripped(m) | {"hook": "blocks.1.hook_resid_post"},
    "older, rows": lambda m: stripped(m) | {"shards": [s | {"rows": 8} for s in stripped(m)["shards"]]},
    "older, file": lambda m: (
        stripped(m) | {"shards": [s | {"sha256": dict.fromkeys(s["sha256"], "0" * 64)} for s in stripped(m)["shards"]]}
    ),
    "growing, dtype": lambda m: without(m, "sha256") | {"complete": False, "shards": [], "rows": 0, "dtype": "float16"},
    "growing, d_in": lambda m: without(m, "sha256") | {"complete": False, "shards": [], "rows": 0, "d_in": 2},
}


@pytest.mark.parametrize("forge", FORGED.values(), ids=FORGED)
def test_a_manifest_without_what_vouches_for_it_is_not_trusted(folder, forge):
    file = folder / "train" / "manifest.json"
    file.write_text(json.dumps(forge(json.loads(file.read_text()))))
    for use in (
        lambda: store.Reader(folder / "train"),
        lambda: Store(path=str(folder)).open(**CUT),
        lambda: Store(path=str(folder)).identity(),
        lambda: store.info(folder / "train"),
    ):
        with pytest.raises(UserError, match="manifest.json is damaged|manifest.json: d_in must be"):
            use()
    assert any("manifest.json" in problem for problem in store.verify(folder))


@pytest.mark.parametrize("name", ["shard-00001.rows", "shard-00000.index", "shard-00002.tokens"])
@pytest.mark.parametrize("change", [lambda sums, name: sums.pop(name), lambda sums, name: sums.update({name: "12"})])
def test_a_shard_without_a_checksum_is_not_trusted(tmp_path, name, change):
    """In the record of a growing store, and in the table of a complete one."""
    write(tmp_path / "train", 0, shards=range(3))
    write(tmp_path / "heldout", 0)
    file = tmp_path / "train" / f"{name[:11]}.json"
    whole = file.read_text()
    record = json.loads(whole)
    change(record["sha256"], name)
    manifest = json.loads((tmp_path / "train" / "manifest.json").read_text())
    growing = without(manifest, "sha256") | {"complete": False, "shards": [], "rows": 0}
    (tmp_path / "train" / "manifest.json").write_text(json.dumps(growing))
    file.write_text(json.dumps(record))
    with pytest.raises(UserError, match=f"it lacks the sha256 of {name}"):
        Store(path=str(tmp_path)).open(**CUT)
    assert any(name in problem for problem in store.verify(tmp_path / "train"))


def test_the_first_stores_are_still_read(folder):
    """Complete, without checksums of the manifest and of the records: those are read, and hold."""
    for split in ("train", "heldout"):
        file = folder / split / "manifest.json"
        file.write_text(json.dumps(stripped(json.loads(file.read_text()))))
    assert store.verify(folder) == []
    reader = Store(path=str(folder)).reader("train")
    assert reader.n_rows == N_ROWS and reader.rows(0, N_ROWS).shape[0] == N_ROWS
    flip(folder / "train" / "shard-00001.rows")
    with pytest.raises(UserError, match="shard-00001.rows: the checksum"):
        store.Reader(folder / "train").rows(0, N_ROWS)


def test_an_unfinished_store_of_older_versions_is_continued(folder, tmp_path):
    write(tmp_path / "old", 0, shards=range(2))
    file = tmp_path / "old" / "manifest.json"
    begun = without(json.loads(file.read_text()), "sealed")
    file.write_text(json.dumps(begun | {"fingerprint": store_format.fingerprint(begun)}))
    write(tmp_path / "old", 0)
    assert store.verify(tmp_path / "old") == []
    assert store.Reader(tmp_path / "old").identity() == store.Reader(folder / "train").identity()
