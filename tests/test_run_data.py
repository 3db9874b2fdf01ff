"""What is read for a run is what it was trained on: other data at its path are refused, or taken with a word."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import saejax
from saejax import cli, config, report
from saejax.activations.store.source import Store
from saejax.cli import commands
from saejax.errors import UserError
from saejax.report import records
from saejax.runs import directory, run

SETTINGS = ["train.n_tokens=1024", "train.batch=256", "buffer.rows=512", "train.eval_rows=256", "mesh=single"]
SETTINGS += ["sae.d_sae=64", "sae.k=4"]


@pytest.fixture(scope="module")
def folder(small_store, tmp_path_factory) -> Path:
    """A store, an array, and a run on each; copied before anything in it is changed."""
    root = tmp_path_factory.mktemp("run_data")
    shutil.copytree(small_store, root / "store")
    np.save(root / "rows.npy", np.random.default_rng(0).standard_normal((3000, 24)).astype(np.float32))
    for kind, path in (("store", "store"), ("arrays", "rows.npy")):
        overrides = [f"source={kind}", f"source.path={root / path}", *SETTINGS]
        run.train(config.load("train", config.Config, overrides), root / f"on_{kind}")
    return root


@pytest.fixture
def moved(folder, tmp_path) -> Path:
    """The folder in a place of its own, where its runs look for their data."""
    root = Path(shutil.copytree(folder, tmp_path / "moved"))
    for name in ("on_store", "on_arrays"):
        file = root / name / "config.yaml"
        file.write_text(file.read_text().replace(str(folder), str(root)))
    return root


def other_hook(root: Path, sealed) -> None:
    for split in ("train", "heldout"):
        file = root / "store" / split / "manifest.json"
        file.write_text(sealed(json.loads(file.read_text()) | {"hook": "blocks.0.hook_resid_post"}))


def splits_swapped(root: Path, sealed) -> None:
    (root / "store" / "train").rename(root / "aside")
    (root / "store" / "heldout").rename(root / "store" / "train")
    (root / "aside").rename(root / "store" / "heldout")


def other_heldout(root: Path, sealed) -> None:
    shutil.rmtree(root / "store" / "heldout")
    shutil.copytree(root / "store" / "train", root / "store" / "heldout")


OTHERS = {
    "hook": (other_hook, "hook was blocks.1.hook_resid_post and is blocks.0.hook_resid_post"),
    "swapped": (splits_swapped, "train rows was"),
    "heldout": (other_heldout, "the checksums of heldout differ"),
}

DOORS = {
    "evaluate": lambda run_dir, **more: commands.evaluate(
        commands.EvaluateConfig(run=str(run_dir), language_model=False, **more)
    ),
    "report": lambda run_dir, **more: commands.report(commands.ReportConfig(run=str(run_dir), **more)),
    "export": lambda run_dir, **more: commands.export(
        commands.ExportConfig(run=str(run_dir), format="neuronpedia", path=str(run_dir) + "_out", **more)
    ),
}
"""Everything that reads data for a run."""


@pytest.mark.parametrize("door", DOORS)
def test_moved_data_are_the_same_data(moved, door):
    DOORS[door](moved / "on_store")
    found = records.read(moved / "on_store")
    assert "other_data" not in found.evaluation.get("data", {}) and not found.problems


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("other", OTHERS)
def test_other_data_are_refused_by_what_differs(moved, sealed, door, other):
    change, said = OTHERS[other]
    change(moved, sealed)
    with pytest.raises(UserError, match=rf"{moved}/store holds other data than .*: .*{said}.*any_data=true") as caught:
        DOORS[door](moved / "on_store")
    assert "\n" not in str(caught.value)
    assert not any((moved / "on_store" / name).exists() for name in ("eval.json", "report.html"))


@pytest.mark.parametrize(
    "door", ["evaluate", *(pytest.param(d, marks=pytest.mark.nightly) for d in ("report", "export"))]
)
def test_other_data_are_taken_where_that_is_asked_for(moved, sealed, door, caplog):
    other_hook(moved, sealed)
    DOORS[door](moved / "on_store", any_data=True)
    assert "hook was blocks.1.hook_resid_post and is blocks.0.hook_resid_post; continuing" in caplog.text


def test_what_was_measured_on_other_data_says_so_wherever_it_is_read(moved, sealed):
    """In eval.json, on the page, in the table of a sweep; and no figure of it comes on a model card."""
    other_heldout(moved, sealed)
    run_dir = moved / "on_store"
    commands.evaluate(commands.EvaluateConfig(run=str(run_dir), any_data=True, language_model=False))
    data = json.loads((run_dir / "eval.json").read_text())["data"]
    assert "the checksums of heldout differ" in data["other_data"]
    assert data["source"] == json.loads(json.dumps(Store(path=str(moved / "store")).fingerprint()))
    found = records.read(run_dir)
    assert any("measured on other data than the run was trained on (" in said for said in found.problems)
    assert "measured on other data" in report.build(run_dir).read_text()
    figures, origin = commands._figures(run_dir, data["step"])
    assert "while training" in origin and figures


def test_the_middle_of_an_array_is_compared_too(moved):
    """R5 through evaluate and resume: rows between the ends replaced."""
    rows = np.load(moved / "rows.npy")
    rows[1000:2000] = np.random.default_rng(1).standard_normal((1000, 24))
    (moved / "rows.npy").unlink()
    np.save(moved / "rows.npy", rows)
    with pytest.raises(UserError, match="rows.npy holds other data than .*: the checksums differ; restore the data"):
        commands.evaluate(commands.EvaluateConfig(run=str(moved / "on_arrays")))
    again = config.from_run(moved / "on_arrays", ["train.n_tokens=2048"])
    with pytest.raises(UserError, match="rows.npy holds other data than .*: the checksums differ; a run continues"):
        run.train(again, moved / "on_arrays", resume=True)
    commands.evaluate(commands.EvaluateConfig(run=str(moved / "on_arrays"), any_data=True))


@pytest.mark.parametrize("other", OTHERS)
def test_a_run_does_not_go_on_with_other_data(moved, sealed, other):
    change, said = OTHERS[other]
    change(moved, sealed)
    again = config.from_run(moved / "on_store", ["train.n_tokens=2048"])
    with pytest.raises(UserError, match=f"holds other data than .*: .*{said}"):
        run.train(again, moved / "on_store", resume=True)


def test_the_identity_is_recorded_with_every_checkpoint(folder):
    for name, source in (("on_store", Store(path=str(folder / "store"))),):
        (step,) = [int(path.name) for path in (folder / name / "checkpoints").iterdir() if path.name.isdigit()][-1:]
        assert directory.data_of(folder / name, step)["identity"] == json.loads(json.dumps(source.identity()))


def test_runs_of_older_versions_are_compared_by_their_fingerprint(moved, sealed, monkeypatch):
    """They have no identity, and say what they saw in run.json."""
    monkeypatch.setattr(directory.checkpoint, "read_record", lambda run_dir, step=None: None)
    for name in ("on_store", "on_arrays"):
        file = moved / name / "run.json"
        record = json.loads(file.read_text())
        del record["source"]["identity"]
        file.write_text(json.dumps(record))
        assert directory.data_differ(moved / name, config.from_run(moved / name).source) is None
    other_hook(moved, sealed)
    said = directory.data_differ(moved / "on_store", config.from_run(moved / "on_store").source)
    assert said is not None and "hook was" in said


def test_a_run_without_a_record_is_looked_at_with_a_word(moved, monkeypatch, caplog):
    monkeypatch.setattr(directory.checkpoint, "read_record", lambda run_dir, step=None: None)
    for name in ("run.json", "report.html"):
        (moved / "on_store" / name).unlink(missing_ok=True)
    DOORS["report"](moved / "on_store")
    assert "has no record of its data: whether these are the same cannot be told" in caplog.text


def test_without_the_store_a_run_is_reported_and_handed_over_without_text(moved, caplog):
    shutil.rmtree(moved / "store")
    DOORS["report"](moved / "on_store")
    DOORS["export"](moved / "on_store")
    assert "without text: the store of the run is no longer at" in caplog.text
    assert (moved / "on_store" / "report.html").is_file() and (moved / "on_store_out").is_dir()
    assert cli.main(["evaluate", f"run={moved / 'on_store'}", f"activations={moved / 'rows.npy'}"]) == 0
    with pytest.raises(UserError, match="no train/ store in it"):
        DOORS["evaluate"](moved / "on_store")


def test_a_store_that_has_grown_is_evaluated(folder, tmp_path):
    """A run that began on the first shards is evaluated, and goes on, when the harvest has ended."""
    whole, growing = folder / "store", tmp_path / "growing"
    shutil.copytree(whole, growing)
    for split, n in (("train", 2), ("heldout", 1)):  # the heldout store has one shard
        file = growing / split / "manifest.json"
        manifest = json.loads(file.read_text())
        del manifest["sha256"]
        file.write_text(json.dumps(manifest | {"complete": False, "rows": 0, "shards": []}))
        for number in range(n, manifest["n_shards"]):
            (growing / split / f"shard-{number:05d}.json").unlink()
    overrides = ["source=store", f"source.path={growing}", *SETTINGS]
    run.train(config.load("train", config.Config, overrides), tmp_path / "run")
    before = directory.data_of(tmp_path / "run")["identity"]
    shutil.rmtree(growing)
    shutil.copytree(whole, growing)
    now = Store(path=str(growing)).identity()
    assert before["train"]["rows"] < now["train"]["rows"]
    commands.evaluate(commands.EvaluateConfig(run=str(tmp_path / "run"), language_model=False))
    data = json.loads((tmp_path / "run" / "eval.json").read_text())["data"]
    assert "other_data" not in data and data["rows"] == now["heldout"]["rows"]
    run.train(config.from_run(tmp_path / "run", ["train.n_tokens=2048"]), tmp_path / "run", resume=True)
    assert saejax.load(tmp_path / "run").provenance["tokens"] == 2048


def test_any_data_is_a_key_of_every_command_that_reads_them():
    for command in (commands.EvaluateConfig, commands.ExportConfig, commands.ReportConfig):
        (field,) = [field for field in dataclasses.fields(command) if field.name == "any_data"]
        assert field.default is False
