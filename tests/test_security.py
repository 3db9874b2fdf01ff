"""What files from elsewhere can do to whoever reads them: nothing but be read, and within their folder.

The readers of foreign SAEs have their own tests in tests/interop; these are about our runs, stores, configs and pages.
"""

import ast
import contextlib
import json
import os
import re
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest

import saejax
from saejax import config, report
from saejax.activations import store
from saejax.cli import commands
from saejax.errors import UserError
from saejax.interop import folder
from saejax.report import records, sweep
from saejax.runs import directory
from saejax.storage import json_yaml, tracking

ROOT = Path(__file__).resolve().parents[1]
FIXTURES = Path(__file__).parent / "fixtures"
SOURCES = sorted(path for place in ("saejax", "scripts", "benchmarks") for path in (ROOT / place).rglob("*.py"))

PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
RUNS_CODE = {"eval", "exec", "compile", "__import__"}
# Reads PyTorch's files with an unpickler that knows containers and tensors only; see tests/interop/test_hostile.py.
READS_PICKLES = "saejax/interop/torch_file.py"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_unpickles_evaluates_or_loads_yaml_unsafely(path):
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Import(names=names):
                found += [name.name for name in names if name.name.split(".")[0] in PICKLES]
            case ast.ImportFrom(module=str(module)):
                found += [module] * (module.split(".")[0] in PICKLES)
            case ast.Call(func=ast.Name(id=name)) if name in RUNS_CODE:
                found.append(name)
            case ast.Call(func=ast.Attribute(value=ast.Name(id="yaml"), attr=name)) if name in (
                "unsafe_load",
                "full_load",
                "load",
                "load_all",
            ):
                loader = [key.value for key in node.keywords if key.arg == "Loader"]
                safe = len(loader) == 1 and getattr(loader[0], "id", "") == "_PlainYaml"
                found += [] if safe else [f"yaml.{name}"]
            case ast.keyword(arg="allow_pickle", value=ast.Constant(value=True)):
                found.append("allow_pickle=True")
            case ast.keyword(arg="shell", value=ast.Constant(value=True)):
                found.append("shell=True")
            case ast.keyword(arg="trust_remote_code", value=ast.Constant(value=True)):
                found.append("trust_remote_code=True")
            case ast.keyword(arg="weights_only", value=ast.Constant(value=False)):
                found.append("weights_only=False")
            case ast.Attribute(attr="extractall" | "extract", value=ast.Name()):
                found.append("extract")
            case ast.Call(func=ast.Attribute(value=ast.Name(id="os"), attr="system")):
                found.append("os.system")
    assert found == (["pickle"] if path == ROOT / READS_PICKLES else [])


def test_the_one_unpickler_names_what_it_allows():
    text = (ROOT / READS_PICKLES).read_text()
    assert set(re.findall(r"pickle\.(\w+)", text)) <= {"Unpickler", "UnpicklingError"} and "def find_class" in text


def test_no_yaml_of_ours_names_a_python_object():
    for path in (ROOT / "conf").rglob("*.yaml"):
        assert "_target_" not in path.read_text() and "!!" not in path.read_text(), path


@pytest.mark.parametrize("key", ["+_target_", "+sae._target_", "+source._target_", "+train._target_"])
def test_a_target_of_hydra_is_refused(key, tmp_path):
    with pytest.raises(UserError, match="_target_"):
        config.load("train", config.Config, [f"{key}=os.system"])
    run_dir = tmp_path / "run"
    shutil.copytree(FIXTURES / "run_format_2", run_dir)
    with pytest.raises(UserError, match="_target_"):
        config.from_run(run_dir, [f"{key.lstrip('+')}=os.system"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("seed: ${oc.env:HOME}", "must hold values, not interpolations"),
        ("seed: '${oc.decode:1}'", "must hold values, not interpolations"),
        ("_target_: os.system", "unknown key _target_"),
        ("seed: !!python/object/apply:os.getcwd []", "no valid YAML"),
        ("seed: &a [1]\nother: *a", "no valid YAML .aliases are not read"),
        ("seed: " + "[" * 3000, "no valid YAML"),
    ],
)
def test_the_config_of_a_run_says_values_only(line, message, tmp_path):
    text = (FIXTURES / "run_format_2" / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(re.sub(r"^seed: 0\n", "", text, flags=re.MULTILINE) + line + "\n")
    with pytest.raises(UserError, match=message) as caught:
        config.from_run(tmp_path)
    assert "\n" not in str(caught.value)
    records.read(tmp_path)  # a report of it is possible, and executes as little


@pytest.fixture
def a_store(tmp_path):
    """A store that may be harmed, and a file beside it that is none of its business."""
    (tmp_path / "secret").write_bytes((FIXTURES / "store_format_1/train/shard-00000.rows").read_bytes())
    return Path(shutil.copytree(FIXTURES / "store_format_1" / "train", tmp_path / "store"))


@pytest.mark.parametrize("name", ["shard-00000.rows", "shard-00001.tokens", "manifest.json", "shard-00000.json"])
def test_no_link_leads_out_of_a_store(name, a_store):
    outside = a_store.parent / "outside"
    (a_store / name).rename(outside)
    (a_store / name).symlink_to(outside)
    with pytest.raises(UserError, match=rf"{name}: leads out of its folder, to .*outside"):
        reader = store.Reader(a_store)
        reader.rows(0, reader.n_rows), reader.sequences(0, reader.n_sequences), reader._record(0)["segment_documents"]


def test_links_within_a_store_and_in_the_cache_of_a_hub_are_followed(a_store, tmp_path):
    (a_store / "shard-00000.rows").rename(a_store / "elsewhere")
    (a_store / "shard-00000.rows").symlink_to("elsewhere")
    expected = store.Reader(a_store).rows(0, 8).tobytes()
    blobs, snapshot = tmp_path / "cache" / "blobs", tmp_path / "cache" / "snapshots" / "abc"
    blobs.mkdir(parents=True), snapshot.mkdir(parents=True)
    for number, file in enumerate((FIXTURES / "store_format_1" / "train").iterdir()):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert store.Reader(snapshot).rows(0, 8).tobytes() == expected


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "shard-00001", "shard-00000/../../secret"])
def test_no_name_in_a_manifest_becomes_a_path(name, a_store):
    file = a_store / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["shards"][0]["name"] = name
    file.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="name must be shard-00000, got"):
        store.Reader(a_store)


def test_what_is_no_regular_file_is_not_opened(a_store):
    import os

    (a_store / "shard-00000.rows").unlink()
    os.mkfifo(a_store / "shard-00000.rows")  # opening it would wait for ever
    with pytest.raises(UserError, match="is missing"):
        store.Reader(a_store).rows(0, 8)


def test_an_export_replaces_links_and_follows_none(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "cfg.json").symlink_to(tmp_path / "precious")
    with folder.filled(tmp_path / "out", {"cfg.json"}) as part:
        (part / "cfg.json").write_text("{}")
    assert (tmp_path / "precious").read_text() == "mine"
    assert (tmp_path / "out" / "cfg.json").read_text() == "{}" and not (tmp_path / "out" / "cfg.json").is_symlink()


def test_a_run_writes_through_no_link(tmp_path):
    (tmp_path / "precious").write_text("mine")
    run_dir = tmp_path / "run"
    shutil.copytree(FIXTURES / "run_format_2", run_dir)
    for name in ("metrics.jsonl", "eval.json"):
        (run_dir / name).unlink(missing_ok=True)
        (run_dir / name).symlink_to(tmp_path / "precious")
    tracking.Tracker(run_dir, tracking.TrackerConfig(), {}).close()
    assert (tmp_path / "precious").read_text() == "mine"


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl", "eval.json", "config.yaml"])
@pytest.mark.timeout(60)
def test_what_has_the_name_of_a_file_of_a_run_and_is_none(make, name, tmp_path):
    """Read it would be waited for; written at the end it would be found after all the work."""
    run_dir = tmp_path / "run"
    shutil.copytree(FIXTURES / "run_format_2", run_dir)
    cfg = config.from_run(run_dir)
    (run_dir / name).unlink(missing_ok=True)
    make(run_dir / name)
    if name == "config.yaml":
        with pytest.raises(UserError, match="is not a run directory"):
            config.from_run(run_dir)
    else:
        assert any(name in problem for problem in records.read(run_dir).problems)
    if name != "eval.json":
        with contextlib.ExitStack() as stack, pytest.raises((UserError, IsADirectoryError)):
            directory.take(cfg, run_dir, True, stack)
    for read in (json_yaml.read_json, json_yaml.read_yaml):
        with pytest.raises((UserError, IsADirectoryError)):
            read(run_dir / name)
    if name == "metrics.jsonl":
        with pytest.raises((UserError, IsADirectoryError)):
            tracking.read(run_dir)


HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)>{{7*7}}${7*7}"


def test_a_page_escapes_whatever_a_run_says(tmp_path):
    run_dir = tmp_path / "run<b>"
    shutil.copytree(FIXTURES / "run_format_2", run_dir)
    cfg = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(f"{json.dumps(HOSTILE)}: {json.dumps(HOSTILE)}\n{cfg}")
    record = {"versions": {HOSTILE: HOSTILE}, "device": HOSTILE, "finished": True}
    (run_dir / "run.json").write_text(json.dumps(record))
    evaluation = {"metrics": {"fvu": 0.1, HOSTILE: 0.2}, "definitions": {"fvu": HOSTILE}, "data": {HOSTILE: HOSTILE}}
    (run_dir / "eval.json").write_text(json.dumps(evaluation | {"arrays": {}}))
    pages = [report.build(run_dir).read_text(), report.build_sweep(tmp_path).read_text()]
    assert "alert(1)" in pages[0]
    for page in pages:
        assert "<script>alert" not in page and "<img src=x" not in page and "run<b>" not in page
        assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", page)  # nothing is fetched by the page
    assert "\x1b" not in sweep.text(sweep.read_sweep(tmp_path))


def test_the_terminal_is_told_plain_text(a_store, sealed):
    file = a_store / "manifest.json"
    manifest = json.loads(file.read_text())
    file.write_text(sealed(manifest | {"hook": "\x1b[2J\nblocks"}))
    assert "\x1b" not in store.describe(a_store) and "\nblocks" not in store.describe(a_store)


def test_nothing_is_fetched_unless_asked(tmp_path, monkeypatch):
    def no_network(*arguments, **named):
        raise AssertionError(f"something asked the network for {arguments}")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    run_dir = Path(shutil.copytree(FIXTURES / "run_format_2", tmp_path / "run"))
    sae = saejax.load(run_dir)
    assert np.isfinite(np.asarray(sae(np.ones((2, 8), np.float32)))).all()
    commands.export(commands.ExportConfig(run=str(run_dir), path=str(tmp_path / "out")))
    saejax.load(tmp_path / "out")
    report.build(run_dir, sae=sae)
    with pytest.raises(UserError):
        saejax.load("someone/some-sae")  # the name of a repository is not an address
    assert json_yaml.read_json(tmp_path / "out" / "cfg.json")
