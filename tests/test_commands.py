"""Evaluation with the language model: the same figures for any batch, and never with another model."""

import json
import shutil
import types

import jax
import pytest

from saejax.activations import language_model, store
from saejax.activations.store import source as store_source
from saejax.cli import commands
from saejax.errors import UserError
from saejax.parallel import sharding
from saejax.runs import run_data
from saejax.sae import Family, l1, model


@pytest.fixture(scope="module")
def sae() -> model.SAE:
    """Without a top-k: its choice may flip with the last bit of a sum, and sums depend on the shape."""
    config = l1.L1(d_in=24, d_sae=64)
    return model.SAE(config, config.init(jax.random.key(0)), {})


@pytest.fixture(scope="module")
def heldout(small_store) -> store.Reader:
    return store.Reader(small_store / "heldout")


@pytest.fixture
def moved(small_model, heldout, tmp_path, sealed) -> store.Reader:
    """A held-out store whose model may be changed without harm."""
    shutil.copytree(small_model, tmp_path / "model")
    shutil.copytree(heldout.path, tmp_path / "heldout")
    file = tmp_path / "heldout" / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["harvest"]["model"] = str(tmp_path / "model")
    file.write_text(sealed(manifest))
    return store.Reader(tmp_path / "heldout")


@pytest.mark.parametrize("n_data", [1, 8])
def test_the_figures_do_not_depend_on_the_batch(sae, heldout, small_model, n_data):
    backend = language_model.load(small_model, mesh=sharding.make_mesh(n_data))
    found = []
    for size in (3, 4, 12):
        cfg = commands.EvaluateConfig(run="x", splice_batch=size, splice_sequences=None)
        found.append(commands._spliced(sae, backend, heldout, cfg))
    assert heldout.n_sequences % 3 and not heldout.n_sequences % 4
    _, segments = heldout.sequences(0, heldout.n_sequences)
    for result in found:
        assert result.data["lm_tokens"] == (segments > 0).sum()  # all of the text, the last sequences too
        clean = found[0]["ce_clean"]
        for name, value in found[0].items():
            # What is a difference of losses, or a ratio of them, carries the losses' own rounding.
            difference = 1e-5 * clean if name.startswith(("delta", "recovered")) else 0
            assert result[name] == pytest.approx(value, rel=1e-5, abs=difference), name


def test_at_most_the_sequences_asked_for(sae, heldout, small_model):
    backend = language_model.load(small_model)
    cfg = commands.EvaluateConfig(run="x", splice_batch=4, splice_sequences=6)
    _, segments = heldout.sequences(0, 6)
    assert commands._spliced(sae, backend, heldout, cfg).data["lm_tokens"] == (segments > 0).sum()


def test_the_model_is_loaded_on_all_devices_in_the_format_of_the_harvest(moved, sealed):
    file = moved.path / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["harvest"]["model_dtype"] = "bfloat16"
    file.write_text(sealed(manifest))
    backend = commands._backend(store.Reader(moved.path))
    assert backend is not None and backend.dtype == "bfloat16"
    assert backend.mesh.shape == {"data": jax.local_device_count(), "latent": 1}


def test_another_model_under_the_same_name_is_refused(moved, tmp_path):
    file = tmp_path / "model" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    before = moved.manifest["model"]["sha256"]["model.safetensors"]
    file.write_bytes(content)
    with pytest.raises(
        UserError, match=f"model.safetensors had sha256 {before}, has (?!{before}).*language_model=false"
    ):
        commands._backend(moved)


def test_a_store_of_several_hooks_has_no_splice_and_a_line_says_so(sae, moved, tmp_path, sealed, caplog):
    trained = types.SimpleNamespace(source=store_source.Store(path=str(tmp_path)), sae=sae.config)
    assert run_data.heldout_store(trained) is not None and not caplog.records
    manifest = moved.manifest | {"sites": [{"hook": "a", "d_in": 12}, {"hook": "b", "d_in": 12}]}
    (moved.path / "manifest.json").write_text(sealed(manifest))
    assert run_data.heldout_store(trained) is None
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.endswith(f"need a store of one hook: {moved.path} has a and b")


def test_a_family_that_cannot_be_spliced_has_no_splice_and_a_line_says_so(moved, tmp_path, caplog):
    halves = l1.L1(d_in=12, d_sae=64, family=Family.transcoder, sites=(12, 12))
    trained = types.SimpleNamespace(source=store_source.Store(path=str(tmp_path)), sae=halves)
    assert run_data.heldout_store(trained) is None
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.endswith("need family=sae: this run is of family=transcoder")


def test_renamed_files_are_the_same_model():
    then = {"sha256": {"a.gguf": "1", "b": "2"}}
    commands._check_same_files("m", {"sha256": {"c.gguf": "1", "b": "2"}}, then)
    for now in ({"a.gguf": "1"}, {"c.gguf": "1", "b": "3"}):
        with pytest.raises(UserError, match="model m has changed"):
            commands._check_same_files("m", {"sha256": now}, then)


@pytest.mark.parametrize("name, message", [("torch:somewhere", "PyTorch"), ("nowhere", "not found")])
def test_a_model_that_cannot_be_spliced_is_left_out_with_a_line(moved, name, message, caplog):
    moved.manifest["harvest"]["model"] = name
    assert commands._backend(moved) is None
    (line,) = [record.getMessage() for record in caplog.records if "without the language model" in record.getMessage()]
    assert message in line and "\n" not in line
