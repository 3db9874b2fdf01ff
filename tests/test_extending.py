"""CONTRIBUTING's own code: an architecture, a metric and a source from outside pass through every command."""

import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import saejax
from saejax import cli, config
from saejax.errors import UserError
from saejax.evals import reconstruction
from saejax.fields import leaves, registry
from saejax.parallel import sharding
from saejax.runs import ensembles, run
from saejax.sae import base, topk

TEXT = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text()
PYTHON, TOML = (re.search(rf"```{kind}\n(.*?)```", TEXT, re.S)[1] for kind in ("python", "toml"))  # pyright: ignore


def commands() -> list[list[str]]:
    """The lines that CONTRIBUTING gives to `saejax`."""
    block = next(b for b in re.findall(r"```console\n(.*?)```", TEXT, re.S) if registry.PLUGINS in b)
    lines = block.replace("\\\n", " ").splitlines()
    return [shlex.split(line.removeprefix("$ "), comments=True) for line in lines if line.startswith("$ saejax")]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with my_saes.py in which all commands of CONTRIBUTING have run."""
    path = tmp_path_factory.mktemp("extending")
    (path / "my_saes.py").write_text(PYTHON)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.setenv(registry.PLUGINS, "my_saes.py")
        patch.setattr(registry, "_loaded", [])
        before = {kind: dict(found._members) for kind, found in registry.REGISTRIES.items()}
        axes, declared = dict(leaves.LATENT_AXIS), dict(leaves._declared)
        for _, *arguments in commands():
            assert cli.main(arguments) == 0, arguments
        yield path
        for kind, members in before.items():
            registry.REGISTRIES[kind]._members = members
        leaves.LATENT_AXIS.clear()
        leaves.LATENT_AXIS.update(axes)
        leaves._declared.clear()
        leaves._declared.update(declared)
        for group, name in (("sae", "group_topk"), ("source", "pairs")):
            for node in (f"{name}.yaml", f"{name}_schema.yaml"):
                config.ConfigStore.instance().repo[group].pop(node, None)
        sys.modules.pop("my_saes", None)


def test_the_commands_are_the_whole_way(home):
    verbs = [(words[1], words[2].partition("=")[0]) for words in commands()]
    assert verbs == [
        ("train", "sae"), ("train", "resume"), ("train", "-m"), ("evaluate", "run"), ("report", "run"),
        ("report", "sweep"), ("export", "run"),
    ]  # fmt: skip
    assert json.loads((home / "runs" / "mine" / "run.json").read_text())["mesh"] == {"data": 2, "latent": 2}


def test_a_resumed_run_on_a_mesh_is_the_uninterrupted_one(home):
    cfg = config.from_run(home / "runs" / "mine")
    assert cfg.train.n_tokens == 61440
    every = dataclasses.replace(cfg, checkpoint=dataclasses.replace(cfg.checkpoint, save_every_steps=100, keep_last=3))
    run.train(every, home / "straight")
    straight = saejax.load(home / "straight")
    shutil.rmtree(home / "straight" / "checkpoints" / "240")
    assert cli.main(["train", "resume=straight"]) == 0
    for a, b in zip(*(jax.tree.leaves(sae.params) for sae in (straight, saejax.load(home / "straight"))), strict=True):
        np.testing.assert_array_equal(a, b)
    assert 0.05 < float(straight.params.extra["rate"].mean()) < 0.2  # k / d_sae = 0.125, and `track` was called


def test_the_sweep_was_folded_and_its_members_are_runs_of_their_own(home):
    found = [json.loads((home / "runs" / "sweep" / name / "run.json").read_text()) for name in ("0", "1")]
    assert [record["ensemble_members"] for record in found] == [2, 2]
    member = home / "runs" / "sweep" / "1"
    cfg = config.from_run(member)
    assert cfg.sae.group_coef == 0.1
    run.train(cfg, home / "alone")
    for a, b in zip(*(jax.tree.leaves(saejax.load(p).params) for p in (member, home / "alone")), strict=True):
        np.testing.assert_array_equal(a, b)  # members of the unrolled form are the runs that they would be alone


def test_members_of_a_stacked_step_differ_in_its_own_knob(home):
    cfgs = {home / f"stacked{c}": _with(config.from_run(home / "alone"), group_coef=c) for c in (0.0, 0.1)}
    ensembles.train_members(cfgs, form=ensembles.ensemble_config.Form.vmap)
    alone, stacked = (saejax.load(home / name).params for name in ("alone", "stacked0.1"))
    np.testing.assert_allclose(stacked.W_dec, alone.W_dec, rtol=1e-3, atol=1e-4)
    assert not np.allclose(saejax.load(home / "stacked0.0").params.W_dec, alone.W_dec, atol=1e-3)


def _with(cfg, **fields):
    return dataclasses.replace(cfg, sae=dataclasses.replace(cfg.sae, **fields))


def test_the_metric_is_measured_and_reported(home):
    found = json.loads((home / "runs" / "mine" / "eval.json").read_text())
    sae, cfg = saejax.load(home / "runs" / "mine"), config.from_run(home / "runs" / "mine")
    rows = np.concatenate(list(cfg.source.heldout(256)))
    assert found["metrics"]["largest_latent"] == pytest.approx(
        np.asarray(sae.encode(rows)).max(axis=1).mean(), rel=1e-5
    )
    assert found["definitions"]["largest_latent"].startswith("Mean over rows")
    assert saejax.evaluate(sae, rows, metrics=["largest_latent"]).keys() == {"largest_latent"}
    assert "group_topk" in (home / "runs" / "mine" / "report.html").read_text()
    assert "group_coef" in (home / "runs" / "sweep" / "sweep.html").read_text()


def test_what_is_exported_is_the_topk_that_computes_the_same(home):
    sae, exported = saejax.load(home / "runs" / "mine"), saejax.load(home / "runs" / "mine" / "export_saelens")
    rows = np.random.default_rng(0).normal(size=(64, 16)).astype(np.float32)
    assert exported.config.name == "topk"
    np.testing.assert_allclose(exported(rows), sae(rows), rtol=1e-4, atol=1e-5)


def test_latents_are_split_as_declared(home):
    cfg = config.from_run(home / "runs" / "mine")
    mesh = sharding.make_mesh(2, 2)
    params = sharding.placed(mesh, cfg.sae.init(jax.random.key(0)))
    assert params.extra["rate"].sharding.spec == jax.P("latent")
    with pytest.raises(UserError, match="leaf speed has no placement: name it in the `leaves`"):
        sharding.tree_shardings(mesh, {"extra": {"speed": np.zeros(4)}})


def test_help_names_what_comes_from_outside(home, capsys):
    assert cli.main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    assert "sae=group_topk" in text and "sae.group_size" in text and "source=pairs" in text


def test_an_installed_package_declares_its_own(tmp_path):
    """Entry points of a package on the path are enough; no variable is set."""
    (tmp_path / "my_saes.py").write_text(PYTHON.replace("@saejax.register\n", ""))
    info = tmp_path / "my_saes-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-saes\nVersion: 1.0\n")
    points = TOML.replace("project.entry-points.", "").replace('["', "[").replace('"]', "]").replace('"', "")
    (info / "entry_points.txt").write_text(points)
    code = "from saejax import config; print(config.GROUPS['sae']['group_topk'].__module__)"
    environment = {k: v for k, v in os.environ.items() if k != registry.PLUGINS}
    environment["PYTHONPATH"] = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"

    def ran(*command: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, *command]
        return subprocess.run(words, capture_output=True, text=True, env=environment, cwd=tmp_path)

    found = ran("-c", code)
    assert found.stdout == "my_saes\n", found.stderr
    (tmp_path / "my_saes.py").write_text("\nimport nowhere")
    line = (
        "package my-saes: the architecture group_topk cannot be loaded: ModuleNotFoundError: No module named 'nowhere'"
    )
    line += f" ({tmp_path / 'my_saes.py'}, line 2)\n"
    asked = ran("-m", "saejax", "train", "sae=group_topk")
    assert asked.returncode == 2 and asked.stderr.endswith(f"saejax train: {line}")
    other = ran("-m", "saejax", "train", "sae.k=0")  # needs nothing of the package
    assert other.stderr.endswith("saejax train: sae.k must be in [1, d_sae=256], got 0\n"), other.stderr
    assert line in other.stderr


@pytest.mark.parametrize("named, said", [
    ("nowhere_at_all", "SAEJAX_PLUGINS: nowhere_at_all cannot be imported: ModuleNotFoundError"),
    ("gone.py", "SAEJAX_PLUGINS: gone.py cannot be imported: FileNotFoundError"),
    ("statistics.py", "SAEJAX_PLUGINS: statistics.py cannot be imported: a module statistics is there already"),
    ("a.b.py", "SAEJAX_PLUGINS: a.b.py cannot be imported: a file that is imported has a name of letters"),
    ("two_lines.py", "SAEJAX_PLUGINS: two_lines.py cannot be imported: ValueError: a b (two_lines.py, line 2)\n"),
])  # fmt: skip
def test_a_plugin_that_cannot_be_imported_is_one_line(named, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("statistics.py", "two_lines.py"):
        Path(name).write_text("\nraise ValueError('a\\nb')")
    said = said.replace("(two_lines.py", f"({tmp_path / 'two_lines.py'}")
    monkeypatch.setenv(registry.PLUGINS, named)
    monkeypatch.setattr(registry, "_loaded", [])
    assert cli.main(["train", "sae.k=3"]) == 2
    assert capsys.readouterr().err.startswith(f"saejax train: {said}")


def _frozen(**members):
    base = members.pop("base", topk.TopK)
    return dataclasses.dataclass(frozen=True, kw_only=True)(type("Mine", (base,), {"__annotations__": {}} | members))


@pytest.mark.parametrize("make, said", [
    (lambda: 3, "builtins.int must derive from Sparsifier, ActivationSource, TextCorpus or Metric, or be a format"),
    (lambda: type("Mine", (), {}), "Mine must derive from Sparsifier, ActivationSource, TextCorpus or Metric"),
    (lambda: _frozen(name="Mine"), "Mine.name must be lower case letters, digits and _, got 'Mine'"),
    (lambda: _frozen(name="topk"), "Mine: the architecture topk is already saejax.sae.topk.TopK"),
    (lambda: _frozen(name="mine", base=base.Sparsifier), "Mine must define activate, objective to be an architecture"),
    (lambda: type("Mine", (topk.TopK,), {"name": "mine"}), "Mine must be a frozen dataclass"),
    (lambda: _frozen(name="mine", leaves={"threshold": 1}), "leaf threshold must have its latents along axis 0"),
    (lambda: _frozen(name="mine", leaves={"rate": -1}), "leaf rate must have an axis of at least 0, or None, got -1"),
    (lambda: _frozen(name="mine", leaves={"W_enc": 1}), "leaf W_enc must have a name other than W_enc, b_enc"),
    (lambda: _frozen(name="mine", __annotations__={"w": "nowhere.Array"}, w=1), "Mine: the type of a field is not"),
    (lambda: _frozen(name="mine", __annotations__={"w": set}, w=1), "Mine.w: its type must be int, float, bool, str"),
    (lambda: _frozen(name="mine", knobs=("kk",)), "Mine.knobs must be a tuple of fields (d_in, d_sae"),
    (lambda: _frozen(name="mine", preferred_norm="unti"), "Mine.preferred_norm must be unit or sqrt_d, got 'unti'"),
    (lambda: _frozen(name="mine", __annotations__={"name": str}), "Mine.name must be annotated as ClassVar"),
    (lambda: _frozen(name="default", base=reconstruction.Reconstruction), "Mine.name must not be default"),
])  # fmt: skip
def test_what_cannot_be_registered_is_refused(make, said):
    before = dict(base.ARCHITECTURES)
    with pytest.raises(UserError, match=re.escape(said)):
        saejax.register(make())
    assert dict(base.ARCHITECTURES) == before


def test_a_class_that_is_defined_again_takes_the_place_of_the_first():
    """As in a notebook, also with another axis of its array."""
    before = dict(base.ARCHITECTURES._members)
    try:
        for axis in (1, 0):
            made = saejax.register(_frozen(name="mine", leaves={"rate_of_mine": axis}))
            assert base.ARCHITECTURES["mine"] is made and leaves.LATENT_AXIS["rate_of_mine"] == axis
    finally:
        base.ARCHITECTURES._members = before
        leaves.declare(registry.full_name(made), {})


def test_names_of_every_training_are_taken():
    assert set(leaves.TAKEN) == set(sharding.SPECS)


@pytest.mark.parametrize("leaves_, shape, said", [
    ({}, (16,), "Mine.leaves must name rate, which extra() returns"),
    ({"rate": 0}, (8,), "Mine.leaves: axis 0 of rate must have d_sae=16 entries, got (8,)"),
    ({"rate": 1}, (16,), "Mine.leaves: axis 1 of rate must have d_sae=16 entries, got (16,)"),
])  # fmt: skip
def test_an_array_that_is_not_declared_is_an_error(leaves_, shape, said):
    made = _frozen(name="mine", leaves=leaves_, extra=lambda self: {"rate": np.zeros(shape)})
    with pytest.raises(UserError, match=re.escape(said)):
        made(d_in=4, d_sae=16, k=2).init(jax.random.key(0))
