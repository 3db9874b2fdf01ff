"""Paths: refused or made absolute at every door, quoted for Hydra, printed so that they can be pasted."""

import ast
import dataclasses
import itertools
import os
import random
import shlex
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from test_config import ROOTS

import saejax
from saejax import cli, config, interop
from saejax.activations import arrays, language_model, store, text
from saejax.activations.language_model import live, torch_source
from saejax.activations.store import joined_source
from saejax.activations.store import source as store_source
from saejax.activations.store import writer as store_writer
from saejax.cli import commands, preflight
from saejax.errors import UserError
from saejax.fields import command_line, paths
from saejax.interop import hub
from saejax.lab.experiments import harness
from saejax.report import corpus, dashboards, page, records, sweep
from saejax.runs import run

ADDRESSES = ("gs://bucket/x", "s3://bucket/x", "hf://owner/x", "https://host/x", "file:///tmp/x", "gs:/bucket/x")

ODD = (
    "a=b", "a,b", "a#b", "run(2)", "a b", "it's", 'say "x"', "{x}", "[v1]", "模型", "é", "null", "2024", "007", "1e3",
    "true", "$HOME", "a;b", "a&b", "~x", "a\\b", "a\\", "\\'", "-x", "+x", "a:b", "%d", "a|b", "*", "`x`",
    "sae.k=2,x=1", "'quoted", "a  b", "!x", "@x", "choice(a,b)", "C:x",
)  # fmt: skip
"""Names of folders, each of which some parser between the keyboard and the program would read as something else."""

PATH_KEYS = {
    name: {key: known for key, known in command_line.path_keys(root, config.GROUPS).items()}
    for name, root in ROOTS.items()
}


def refused(call) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- Addresses

LINES = [
    ["train", "source=store", "source.path={}"],
    ["train", "source=arrays", "source.path={}"],
    ["train", "source=joined", "source.paths=[{},x]"],
    ["train", "source=joined", "source.paths=[x,{}]"],
    ["train", "source=language_model", "source.corpus={}"],
    ["train", "source=language_model", "source.model={}"],
    ["train", "source=language_model", "source.model=torch:{}"],
    ["train", "--dry-run", "source=arrays", "source.path={}"],
    ["train", "-m", "source=arrays", "source.path={},/nowhere.npy"],
    ["train", "resume={}"],
    ["train", "hydra.run.dir={}"],
    ["train", "hydra.run.dir={}/${{now:%H}}"],
    ["train", "hydra.output_subdir={}"],
    ["train", "-m", "hydra.sweep.dir={}", "sae.k=2,4"],
    ["train", "-m", "sweep.fold=true", "hydra.sweep.dir={}", "seed=0,1", "data_seed=0"],
    ["harvest", "path={}"],
    ["harvest", "text=files", "text.path={}"],
    ["harvest", "model={}"],
    ["harvest", "model=torch:{}"],
    ["evaluate", "run={}"],
    ["evaluate", "run=x", "activations={}"],
    ["export", "run={}"],
    ["export", "run=x", "path={}"],
    ["export", "run=x", "activations={}"],
    ["report", "run={}"],
    ["report", "sweep={}"],
    ["report", "run=x", "out={}"],
    ["store", "info", "{}"],
    ["store", "verify", "{}"],
    ["experiment", "synth/sb_iid", "quick=true", "out={}"],
    ["experiment", "all_quick", "out={}"],
]


@pytest.mark.parametrize("line", LINES, ids=" ".join)
def test_an_address_is_refused_wherever_a_command_takes_a_path(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main([word.format("gs://bucket/x") for word in line]) == 2
    said = capsys.readouterr()
    key = next(word.partition("=")[0] for word in line if "{}" in word)
    assert said.err.count("\n") == 1 and f"{key.replace('{}', 'PATH')} must be a path of this machine" in said.err
    assert not said.out and not list(tmp_path.iterdir())


def test_every_path_key_is_among_those_lines():
    tried = {(line[0], word.partition("=")[0]) for line in LINES for word in line if "{}" in word}
    known = {(name, key) for name, keys in PATH_KEYS.items() for key in keys}
    assert known | {("train", key) for key in ("resume", "hydra.run.dir", "hydra.sweep.dir")} <= tried


def test_every_key_that_says_it_is_a_path_is_one():
    """By the words of its documentation, so that a new field cannot be forgotten."""
    from saejax.cli import help_text

    words = ("directory", "a .npy file", "file of", "file to write", "path of")
    roots = [*ROOTS.values(), *(cls for group in config.GROUPS.values() for cls in group.values())]
    missing = [
        f"{cls.__name__}.{name}"
        for cls in roots
        for name, said in help_text.field_docs(cls).items()
        if any(word in said.lower() for word in words) and name not in paths.kinds(cls)
        if name in {field.name for field in dataclasses.fields(cls)}
    ]
    assert not missing


SAE = object()
DOORS = {
    "saejax.__init__.load": saejax.load,
    "saejax.__init__.export": lambda path: saejax.export(SAE, path),
    "saejax.runs.run.load": run.load,
    "saejax.interop.__init__.export": lambda path: interop.export(SAE, path),
    "saejax.interop.__init__.load": interop.load,
    "saejax.interop.__init__.recognise": interop.recognise,
    "saejax.interop.hub.upload": lambda path: hub.upload(path, "owner/name"),
    "saejax.report.page.build": page.build,
    "saejax.report.page.build(out)": lambda path: page.build(RUN_WITH_NOTHING, out=path),
    "saejax.report.records.read": records.read,
    "saejax.report.sweep.read_sweep": sweep.read_sweep,
    "saejax.report.sweep.build_sweep": sweep.build_sweep,
    "saejax.report.dashboards.write": lambda path: dashboards.write(None, None, None, path, None),
    "saejax.lab.experiments.harness.run_experiment": lambda path: harness.run_experiment(None, path),
    "saejax.activations.store.reader.Reader": store.Reader,
    "saejax.activations.store.writer.Writer": lambda path: store.Writer(path, {}),
    "saejax.activations.store.writer.admitted": store_writer.admitted,
    "saejax.report.corpus.StoreCorpus": corpus.StoreCorpus,
    "saejax.activations.language_model.torch_source.load": torch_source.load,
    "saejax.activations.store.check.verify": store.verify,
    "saejax.activations.store.check.describe": store.describe,
    "saejax.activations.store.check.info": store.info,
    "saejax.activations.store.check.stores_under": store.stores_under,
    "saejax.activations.store.manifest_schema.read_manifest": store.read_manifest,
    "saejax.activations.language_model.torch_source.write_images": lambda path: torch_source.write_images(
        None, [], "x", path
    ),
    "saejax.activations.language_model.loading.load": language_model.load,
    "saejax.activations.language_model.loading.read_config": language_model.read_config,
    **{
        f"saejax.interop.{name}.load": module.load
        for name, module in ((module.__name__.rpartition(".")[2], module) for module in interop.FORMATS.values())
    },
}
INNER = {
    "saejax.fields.paths": "the door itself",
    "saejax.evals.result": "into the directory of a run that was loaded",
    "saejax.storage.lock": "takes what a door made",
    "saejax.storage.atomic": "writes where it was told, after the door",
    "saejax.activations.store.files": "parts of a store that is open",
    "saejax.activations.array_files": "of a source, whose path is settled",
    "saejax.runs.run_data": "of a command, whose paths are settled",
    "saejax.interop.torch_file": "called by the formats",
    "saejax.interop.folder": "called by the formats",
}
"""Modules whose functions come after a door."""
RUN_WITH_NOTHING = Path(__file__).parent


@pytest.mark.parametrize("door", DOORS)
def test_an_address_is_refused_wherever_python_takes_a_path(door, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if door.endswith("(out)"):
        (tmp_path / "metrics.jsonl").write_text("")
        monkeypatch.setitem(globals(), "RUN_WITH_NOTHING", tmp_path)
    before = sorted(tmp_path.iterdir())
    assert "gs:/" in refused(lambda: DOORS[door]("gs://bucket/x"))
    assert sorted(tmp_path.iterdir()) == before


def test_every_public_function_that_takes_any_path_is_among_those_doors():
    found = set()
    for file in (Path(saejax.__file__).parent).rglob("*.py"):
        module = ".".join(file.relative_to(Path(saejax.__file__).parent.parent).with_suffix("").parts)
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                for inner in node.body:
                    if isinstance(inner, ast.FunctionDef) and inner.name == "__init__" and _takes_any_path(inner):
                        found.add(f"{module}.{node.name}")
            elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and _takes_any_path(node):
                found.add(f"{module}.{node.name}")
    found = {name for name in found if name.rpartition(".")[0] not in INNER}
    formats = {module.__name__ for module in interop.FORMATS.values()}
    found -= {f"{module}.export" for module in formats}  # after interop.export, and see the test of every format
    assert sorted(found - set(DOORS)) == []


def _takes_any_path(function: ast.FunctionDef) -> bool:
    hints = [ast.unparse(a.annotation) for a in (*function.args.args, *function.args.kwonlyargs) if a.annotation]
    return any("PathLike" in hint or "str | Path" in hint or "str | pathlib.Path" in hint for hint in hints)


@pytest.mark.parametrize("address", ADDRESSES)
def test_what_an_address_is(address):
    assert f"got {address}: object storage" in refused(lambda: paths.local(address, "path"))


@pytest.mark.parametrize("drive", ["C:\\data", "C:/data", "./gs:/x", "a:b", "torch"])
def test_what_only_looks_like_an_address_is_a_path(drive, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert paths.local(drive, "path") == tmp_path / drive


@pytest.mark.parametrize("bad", ["", "a\0b", "a${b}", "\udc80"])
def test_what_is_no_path_is_refused_in_one_line(bad):
    refused(lambda: paths.local(bad, "path")).encode()


# --- Relative paths

CONFIGS = {
    "store": lambda path: store_source.Store(path=path),
    "arrays": lambda path: arrays.Arrays(path=path),
    "joined": lambda path: joined_source.Joined(paths=(path, path)),
    "corpus": lambda path: live.Live(corpus=path),
    "model": lambda path: live.Live(model=path),
    "torch": lambda path: live.Live(model=f"torch:{path}"),
    "text": lambda path: text.TextFiles(path=path),
    "harvest": lambda path: ROOTS["harvest"](path=path, model=path),
    "evaluate": lambda path: commands.EvaluateConfig(run=path, activations=path),
    "export": lambda path: commands.ExportConfig(run=path, path=path, activations=path),
    "report": lambda path: commands.ReportConfig(run=path, out=path),
    "sweep": lambda path: commands.ReportConfig(sweep=path),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("typed", ["x/y", "./x/y", "../here/x/y", "~/x/y"])
def test_what_is_stored_is_absolute(name, typed, tmp_path, monkeypatch):
    here = tmp_path / "here"
    (here / "x" / "y").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(here))
    monkeypatch.chdir(here)
    held = [v for key, v in vars(CONFIGS[name](typed)).items() if key in paths.kinds(type(CONFIGS[name](typed)))]
    monkeypatch.chdir("/")
    places = [v for value in held if value for v in ([value] if isinstance(value, str) else value)]
    places = [place.removeprefix("torch:") for place in places if place not in ("smollm2", "wikipedia")]
    assert places and all(os.path.isabs(p) and Path(p).resolve() == (here / "x" / "y").resolve() for p in places)


def test_names_are_no_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert ROOTS["harvest"](model="torch:gpt2").model == "torch:gpt2"
    assert ROOTS["harvest"](model="torch:owner/name").model == "torch:owner/name"
    assert ROOTS["harvest"]().model == "smollm2"
    assert live.Live(corpus="pydoc").corpus == "pydoc"


def test_a_path_behind_a_link_is_not_shortened(tmp_path, monkeypatch):
    """x/../y is not y where x is a link to a folder elsewhere."""
    (tmp_path / "far" / "x").mkdir(parents=True)
    (tmp_path / "far" / "y").write_text("far")
    (tmp_path / "y").write_text("near")
    (tmp_path / "x").symlink_to(tmp_path / "far" / "x")
    monkeypatch.chdir(tmp_path)
    assert paths.local("x/../y", "path").read_text() == "far"


def test_a_store_goes_on_that_an_older_version_began_with_relative_paths(small_model, tmp_path, monkeypatch):
    import json

    monkeypatch.chdir(tmp_path)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "a.txt").write_text("a")
    wanted = {
        "harvest": ROOTS["harvest"](model="m", text=text.TextFiles(path="c")).settings(),
        "text": text.TextFiles(path="c").identity(),
    }
    wanted = json.loads(json.dumps(wanted))
    older = json.loads(json.dumps(wanted).replace(f"{tmp_path}/", ""))
    assert older != wanted
    store_writer.check_same(wanted, older, tmp_path)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="model is .*m', but the store .* was begun with 'm'"):
        store_writer.check_same(wanted, older, tmp_path)


# --- Quoting


def spelled(text: str) -> str:
    """What Hydra and OmegaConf make of a value."""
    value = OverridesParser.create().parse_override(f"key={text}").value()
    return str(OmegaConf.create({"key": value}).key)


@pytest.mark.parametrize("name", ODD)
def test_hydra_reads_back_what_was_quoted(name):
    assert spelled(paths.for_hydra(name)) == name
    assert command_line.unquoted(paths.for_hydra(name)) == name
    ((word,),) = [shlex.split(paths.typed("run", name))]
    assert spelled(word.removeprefix("run=")) == name
    assert shlex.split(paths.typed("resume", name)) == [f"resume={name}"]


def test_hydra_reads_back_random_names():
    rng, letters = random.Random(0), "ab/=#(){}[],: '\"\\$é模~%?*|&;!<>\t\n.-+0@^`"
    for _ in range(5000):
        name = "".join(rng.choices(letters, k=rng.randint(1, 10)))
        assert spelled(paths.for_hydra(name)) == name
        if "${" in name:
            assert spelled(paths.for_hydra("\\" + name)) == "\\" + name


OPTIONAL = {("evaluate", "activations"), ("export", "path"), ("export", "activations"), ("report", "out")}


QUICK = ("null", "sae.k=2,x=1", "it's")
PAIRS = [
    pytest.param(command, key, name, marks=() if key == "run" or name in QUICK else pytest.mark.nightly)
    for command, key in [("evaluate", "run"), *sorted(OPTIONAL)]
    for name in ODD
]
"""Every name at one key, and some names at every key; the other pairs run nightly."""


@pytest.mark.parametrize("command, key, name", PAIRS)
def test_a_path_needs_no_quotes(command, key, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    more = [] if key in ("run", "sweep") else ["run=x"]
    for word in (f"{key}={name}", *shlex.split(paths.typed(key, name)), f"{key}={tmp_path / name}"):
        found = getattr(config.load(command, ROOTS[command], [word, *more]), key)
        if word.endswith("=null") and (command, key) in OPTIONAL:
            assert found is None
        else:
            assert found == str(paths.local(name, key))


@pytest.mark.parametrize("name", [name for name in ODD if "," not in name])
def test_paths_in_a_list_and_in_dot_lists(name):
    keys = {"source.paths": command_line.PathKey(many=True), "source.path": command_line.PathKey()}
    (word,) = command_line.for_hydra([f"source.paths=[{name},b=c]"], keys)
    if not any(bracket in name for bracket in "([{'\""):
        assert OverridesParser.create().parse_override(word).value() == [name, "b=c"]
    (word,) = command_line.for_dotlist([f"source.path={name}"], keys)
    assert OmegaConf.from_dotlist([word]).source.path == name


@pytest.mark.parametrize("value", ["'a=b'", '"a=b"', "${oc.env:HOME}", "runs/${now:%Y}"])
def test_what_is_quoted_or_interpolated_stays(value):
    (word,) = command_line.for_hydra([f"run={value}"], {"run": command_line.PathKey()})
    assert spelled_raw(word) == value.strip("'\"")


def spelled_raw(word: str) -> str:
    return OverridesParser.create().parse_override(word).value()


def test_commas_separate_the_points_of_a_sweep_unless_the_path_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    typed = lambda value: command_line.for_hydra([f"run={value}"], {"run": command_line.PathKey()}, sweep=True)  # noqa: E731
    assert typed("a=1,b=2") == ["run='a=1','b=2'"]
    assert typed("choice(a,b)") == ["run=choice(a,b)"]
    assert typed("a,,b") == ["run=a,,b"]
    (tmp_path / "a=1,b=2").mkdir()
    assert typed("a=1,b=2") == ["run='a=1,b=2'"]


@pytest.mark.parametrize("line", ["-m seed=0,1 sae.k=2", "seed=0,1 sae.k=2 -m", "seed=0,1 -m sae.k=2"])
def test_flags_stand_anywhere(line):
    """Hydra reads one group of words; what saejax adds at the end must not become a second."""
    assert preflight.typed(line.split()) == ["-m", "seed=0,1", "sae.k=2"]


def test_the_points_of_a_sweep_keep_their_paths(tmp_path, monkeypatch):
    """Through the sweeper: what arrives at each job is the path as it was typed."""
    monkeypatch.chdir(tmp_path)
    names = [name for name in ODD if "," not in name and name[0] not in "'\""]
    typed = preflight.typed(["-m", "source=arrays", *[f"source.path={name}" for name in names[:1]]])
    for first, second in itertools.pairwise(names):
        typed = preflight.typed(["-m", "source=arrays", f"source.path={first},{second}"])
        if any(bracket in first + second for bracket in "([{"):
            continue  # brackets hold commas together
        jobs = preflight._jobs(typed)
        found = [spelled_raw(word) for job in jobs for word in job if word.startswith("source.path=")]
        assert found == [first, second]


# --- What is printed


def test_no_command_is_printed_with_a_bare_path():
    """Every printed `key=PATH` of a command goes through `typed`."""
    import re

    bare = re.compile(r"(saejax (evaluate|report|export|train) |alone with |continue[^,]* with:? )\w+=(\{|%s)")
    root = Path(saejax.__file__).parent
    lines = [(f.name, line) for f in root.rglob("*.py") for line in f.read_text(encoding="utf-8").splitlines()]
    assert not [found for found in lines if bare.search(found[1])]
