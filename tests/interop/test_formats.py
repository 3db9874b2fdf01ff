"""The registry: what is recognised, what is ambiguous, what an import measures."""

import dataclasses
import logging
import shutil

import numpy as np
import pytest

import saejax
from saejax import interop
from saejax.cli import commands
from saejax.errors import UserError


def test_every_format_has_the_same_face():
    for name, module in interop.FORMATS.items():
        assert module.name == name and module.__doc__
        assert callable(module.detect) and callable(module.load)
        assert module.export is None or callable(module.export)


@pytest.mark.parametrize("format", [name for name, module in interop.FORMATS.items() if module.export])
def test_each_recognises_its_own_and_says_so(format, trained, tmp_path, caplog):
    interop.export(trained("topk"), tmp_path / "x", format)
    fitting = [name for name, module in interop.FORMATS.items() if module.detect(tmp_path / "x")]
    assert fitting == [format]
    with caplog.at_level(logging.INFO, logger="saejax.interop"):
        assert saejax.load(tmp_path / "x").provenance["format"] == format
    assert f"read as {format}, topk with d_in=6, d_sae=20" in caplog.text


def test_strangers_and_ambiguous_folders_are_refused(trained, tmp_path):
    known = ", ".join(interop.FORMATS)
    with pytest.raises(UserError, match=f"elsewhere: no such file or directory, .*{known}"):
        interop.load(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"none of the known formats .{known}"):
        interop.load(tmp_path)
    both = interop.export(trained("topk"), tmp_path / "both", "saelens")
    shutil.copy(interop.export(trained("topk"), tmp_path / "other", "sparsify") / "sae.safetensors", both)
    with pytest.raises(UserError, match="could be saelens or sparsify; say format="):
        interop.load(both)
    assert interop.load(both, "saelens").provenance["format"] == "saelens"


def test_unknown_formats_are_named(trained, tmp_path):
    with pytest.raises(UserError, match="format=gguf: must be one of saelens"):
        interop.export(trained("topk"), tmp_path, format="gguf")
    with pytest.raises(UserError, match="format=gguf: must be one of saelens"):
        interop.load(tmp_path, format="gguf")


def test_formats_that_are_only_read_say_so(trained, tmp_path, monkeypatch):
    class ReadOnly:
        name, export = "readonly", None
        detect = load = staticmethod(lambda path: False)

    monkeypatch.setitem(interop.FORMATS._members, "readonly", ReadOnly)
    with pytest.raises(UserError, match=r"format=readonly: must be one of saelens.*\(it is only read\)"):
        interop.export(trained("topk"), tmp_path, format="readonly")


def test_the_self_check_counts_latents_and_error(trained, rows, caplog):
    sae = trained("topk")
    with caplog.at_level(logging.INFO, logger="saejax.interop"):
        found = interop.self_check(sae, rows)
    error = np.sum((rows - np.asarray(sae(rows))) ** 2) / np.sum((rows - rows.mean(axis=0)) ** 2)
    assert set(found) == {"l0", "fvu"}
    np.testing.assert_allclose([found["l0"], found["fvu"]], [4.0, error], rtol=1e-5)
    assert "l0 4, fvu" in caplog.text


def test_one_format_into_another_from_the_command_line(trained, rows, tmp_path):
    interop.export(trained("topk"), tmp_path / "a", "sparsify")
    np.save(tmp_path / "rows.npy", rows)
    to = commands.ExportConfig(
        run=str(tmp_path / "a"),
        path=str(tmp_path / "b"),
        format="dictionary_learning",
        activations=str(tmp_path / "rows.npy"),
    )
    assert "rows.npy: l0 4, fvu" in commands.export(to)
    assert interop.recognise(tmp_path / "b") == "dictionary_learning"
    with pytest.raises(UserError, match="activations = .*cfg.json: .npy or .safetensors is needed"):
        commands.export(dataclasses.replace(to, activations=str(tmp_path / "a" / "cfg.json")))
