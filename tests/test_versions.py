"""Every released format is read: one small run and store of each version, as that version wrote them.

Format 1 of checkpoints and of stores is that of saejax 0.1.0; format 2 of checkpoints added their record of checksums,
and kept the rows of the buffer as floats; format 3 says in the record of which step and run a checkpoint is.
"""

import json
import logging
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

import saejax
from saejax import config, report
from saejax.activations import store
from saejax.activations.store import source as store_source
from saejax.errors import UserError
from saejax.runs import directory, run
from saejax.storage import checkpoint, checkpoint_record, json_yaml

FIXTURES = Path(__file__).parent / "fixtures"


def expected(name: str) -> dict:
    """What the version that wrote a fixture read from it."""
    return json.loads((FIXTURES / name / "expected.json").read_text())


@pytest.fixture(params=[1, 2, 3])
def old_run(request, tmp_path) -> Path:
    """A run of an old checkpoint format, in a folder that may be written."""
    return Path(shutil.copytree(FIXTURES / f"run_format_{request.param}", tmp_path / f"run_format_{request.param}"))


def test_every_format_has_its_fixtures():
    assert {path.name for path in FIXTURES.iterdir()} == {
        "frozen",
        *(f"run_format_{n}" for n in range(1, checkpoint.FORMAT_VERSION + 1)),
        *(f"store_format_{n}" for n in range(1, store.FORMAT_VERSION + 1)),
    }
    for folder in FIXTURES.iterdir():
        assert sum(file.stat().st_size for file in folder.rglob("*")) < 200_000


def test_a_run_of_an_old_format_is_loaded_as_it_was(old_run, caplog):
    then = expected(old_run.name)
    with caplog.at_level(logging.WARNING):
        sae = saejax.load(old_run)
    assert sae.provenance["step"] == then["step"]
    np.testing.assert_allclose(sae(np.array(then["x"], np.float32)), then["recon"], rtol=1e-6, atol=1e-7)
    said = "is of format 1, without checksums" in caplog.text
    assert said == (old_run.name == "run_format_1")
    assert report.build(old_run, sae=sae).is_file()


def test_a_run_of_an_old_format_goes_on(old_run):
    then = expected(old_run.name)
    cfg = config.from_run(old_run)
    assert directory.look(cfg, old_run).stage is directory.Stage.finished
    again = config.from_run(old_run, [f"train.n_tokens={(then['step'] + 2) * cfg.train.batch}"])
    outcome = run.train(again, old_run, resume=True)
    assert outcome.step == then["step"] + 2
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(outcome.state.params))
    lines = [json.loads(line) for line in (old_run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(1, then["step"] + 3))


def test_a_store_of_format_1_is_read():
    then, reader = expected("store_format_1"), store.Reader(FIXTURES / "store_format_1" / "train")
    assert reader.n_rows == then["rows"]
    rows = np.asarray(reader.rows(0, reader.n_rows), np.float64)
    assert rows.sum() == pytest.approx(then["sum"], rel=1e-12)
    np.testing.assert_array_equal(rows[-1], then["last"])
    assert reader.trace(reader.n_rows - 1).token == then["token"]
    assert store.verify(FIXTURES / "store_format_1") == []
    assert store_source.Store(path=str(FIXTURES / "store_format_1")).d_in == reader.d_in


def edited(file: Path, change: dict) -> None:
    """A JSON file with some fields changed."""
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


def test_a_store_of_a_newer_format_is_refused(tmp_path):
    shutil.copytree(FIXTURES / "store_format_1", tmp_path / "store")
    edited(tmp_path / "store" / "train" / "manifest.json", {"format_version": 7})
    with pytest.raises(UserError, match=r"was written by a newer saejax: this one reads up to 1, install .* got 7"):
        store.Reader(tmp_path / "store" / "train")


def test_a_run_of_a_newer_format_is_refused_and_left_alone(tmp_path):
    run_dir = shutil.copytree(FIXTURES / "run_format_2", tmp_path / "run")
    file = run_dir / "config.yaml"
    cfg, text = config.from_run(run_dir), file.read_text()
    file.write_text(f"format_version: 9\nsaejax_version: 3.1.0\nnew_part: {{key: 1}}\n{text}")
    for use in (config.from_run, saejax.load, lambda path: run.train(cfg, path, resume=True)):
        with pytest.raises(UserError, match=r"was written by saejax 3.1.0 in format 9; this is .* up to 2: install a"):
            use(run_dir)
    assert checkpoint.steps(run_dir) == [6] and not (run_dir / "checkpoints_broken").exists()


def test_a_config_carries_its_version(tmp_path):
    cfg = config.from_run(FIXTURES / "run_format_1")
    (tmp_path / "config.yaml").write_text(config.to_yaml(cfg))
    assert (tmp_path / "config.yaml").read_text().startswith("format_version: 1\nsaejax_version: ")
    assert config.from_run(tmp_path) == cfg and json_yaml.read_run(tmp_path)[1] == json_yaml.Stamp()
    (tmp_path / "config.yaml").write_text(config.to_yaml(cfg, json_yaml.Stamp("abc", 6)))
    assert (tmp_path / "config.yaml").read_text().startswith("format_version: 2\nsaejax_version: ")
    assert config.from_run(tmp_path) == cfg and json_yaml.read_run(tmp_path)[1] == json_yaml.Stamp("abc", 6)
    assert "format_version" not in json_yaml.read_run_config(tmp_path)


def test_a_checkpoint_of_another_saejax_says_so(tmp_path, monkeypatch, caplog):
    run_dir = shutil.copytree(FIXTURES / "run_format_2", tmp_path / "run")
    monkeypatch.setattr(checkpoint_record, "VERSION", "0.7.0")
    with caplog.at_level(logging.INFO, logger="saejax"):
        checkpoint.load_arrays(run_dir, ("params",))
    assert "was written by saejax 0.1.0, this is 0.7.0" in caplog.text
    record = ocp.load_checkpointables(str(run_dir / "checkpoints" / "6"), {"record": None})["record"]
    assert record["format_version"] == 2 and record["saejax_version"] == "0.1.0"
