"""Exports fill their folder whole or not at all, and leave alone what is not theirs."""

import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import published_examples
import pytest

from saejax import cli, interop
from saejax.errors import UserError
from saejax.interop import folder, neuronpedia

WRITERS = [name for name, module in interop.FORMATS.items() if module.export]


def content(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.mark.parametrize("format", WRITERS)
def test_an_export_replaces_its_own_and_nothing_else(format, trained, rows, tmp_path):
    sae = trained("topk")
    interop.export(sae, tmp_path / "x", format)
    first = content(tmp_path / "x")
    for name in first:
        (tmp_path / "x" / name).write_text("broken")
    assert content(interop.export(sae, tmp_path / "x", format)) == first
    (tmp_path / "x" / ".env").write_text("secret")
    before = content(tmp_path / "x")
    with pytest.raises(UserError, match=r"x: holds something else \(\.env\), and stays as it is"):
        interop.export(trained("topk", k=3), tmp_path / "x", format)
    assert content(tmp_path / "x") == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="must be a directory to write, and is a file"):
        interop.export(sae, tmp_path / "file", format)


@pytest.mark.parametrize("format", WRITERS)
def test_an_export_that_fails_leaves_nothing(format, trained, tmp_path, monkeypatch):
    written = interop.export(trained("topk"), tmp_path / "there", format)
    before = content(written)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pathlib.Path, "write_text", full)
    for path in (tmp_path / "new", written):
        with pytest.raises(OSError, match="No space"):
            interop.export(trained("topk", k=3), path, format)
    assert not (tmp_path / "new").exists()
    assert content(written) == before and not list(written.glob(".part*"))


def test_links_are_replaced_and_not_written_through(trained, tmp_path):
    (tmp_path / "elsewhere").write_text("mine")
    (tmp_path / "x").mkdir()
    os.symlink(tmp_path / "elsewhere", tmp_path / "x" / "cfg.json")
    interop.export(trained("topk"), tmp_path / "x")
    assert (tmp_path / "elsewhere").read_text() == "mine"
    assert not (tmp_path / "x" / "cfg.json").is_symlink()
    os.symlink(tmp_path, tmp_path / "x" / "out")
    with pytest.raises(UserError, match="holds something else"), folder.filled(tmp_path / "x", ("cfg.json", "out/")):
        pass


def test_the_command_never_writes_over_what_it_reads(trained, tmp_path, capsys):
    source = interop.export(trained("topk"), tmp_path / "sae", "dictionary_learning")
    before = content(tmp_path)
    for arguments, message in (
        ([f"run={source}", f"path={source}"], "is where the SAE is read from"),
        ([f"run={source / 'ae.pt'}", f"path={source}"], "is where the SAE is read from"),
        ([f"run={source / 'ae.pt'}"], "say path=DIRECTORY"),
    ):
        assert cli.main(["export", *arguments, "format=dictionary_learning"]) == 2
        assert message in capsys.readouterr().err
    assert content(tmp_path) == before


@pytest.mark.parametrize("data", [b"", b"\x93NUMPY\1\0\2\0{\n", b"PK\5\6" + b"\0" * 18])
def test_rows_that_are_no_array_are_one_line(data, trained, tmp_path, capsys):
    source = interop.export(trained("topk"), tmp_path / "sae")
    (tmp_path / "rows.npy").write_bytes(data)
    assert cli.main(["evaluate", f"run={source}", f"activations={tmp_path / 'rows.npy'}"]) == 2
    assert "rows.npy: not a readable .npy file" in capsys.readouterr().err


@pytest.mark.parametrize("rows", [np.ones(6, np.float32), np.array([["a"]]), np.ones((4, 5), np.float32)])
def test_rows_of_another_kind_are_one_line(rows, trained, tmp_path, capsys):
    source = interop.export(trained("topk"), tmp_path / "sae")
    np.save(tmp_path / "rows.npy", rows)
    assert cli.main(["evaluate", f"run={source}", f"activations={tmp_path / 'rows.npy'}"]) == 2
    assert re.search(r"saejax evaluate: activations = .*rows.npy: .* needed.*\n$", capsys.readouterr().err)


def test_a_folder_on_the_way_makes_no_transcoder(tmp_path):
    (tmp_path / "transcoder-study" / "gemma-scope-2b-pt-res").mkdir(parents=True)
    path, _ = published_examples.gemma_1(tmp_path / "transcoder-study" / "gemma-scope-2b-pt-res")
    assert interop.load(path).config.family.name == "sae"


@pytest.mark.parametrize("model", ["a b", "x\n# Evil", "y|z"])
def test_names_of_models_say_nothing_else(model, trained):
    with pytest.raises(UserError, match=r"neuronpedia.model=.*takes letters"):
        neuronpedia.names(trained("topk"), neuronpedia.NeuronpediaConfig(model=model))


def test_what_a_file_says_of_its_model_may_be_anything(trained, tmp_path):
    path = interop.export(trained("topk"), tmp_path / "x")
    config = (path / "cfg.json").read_text()
    (path / "cfg.json").write_text(config.replace('"model_name": "tiny"', '"model": 3, "hook": [1], "source": "s"'))
    assert interop.export(interop.load(path), tmp_path / "y").is_dir()


def test_one_export_at_a_time_and_what_a_killed_one_left_is_no_hindrance(tmp_path):
    script = "import os, pathlib, sys, time\nfrom saejax.interop import folder\n"
    script += "with folder.filled(sys.argv[1], {'cfg.json'}) as part:\n"
    script += "    (part / 'cfg.json').write_text('first')\n    print(part, flush=True)\n    sys.stdin.readline()\n"
    first = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "x")], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    part = pathlib.Path(first.stdout.readline().strip())
    with pytest.raises(UserError, match="x: another export fills it; wait for that one"):
        with folder.filled(tmp_path / "x", {"cfg.json"}):
            raise AssertionError("two at once")
    assert (part / "cfg.json").read_text() == "first"
    first.kill()
    first.communicate()
    with folder.filled(tmp_path / "x", {"cfg.json"}) as part:
        (part / "cfg.json").write_text("second")
    assert content(tmp_path / "x") == {"cfg.json": b"second"} and len(list((tmp_path / "x").iterdir())) == 1
