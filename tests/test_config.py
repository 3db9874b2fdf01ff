"""Every YAML composes into its objects; every mistake ends in one line that names the key and what is allowed."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

from saejax import config
from saejax.activations.language_model import harvest
from saejax.cli import commands, help_text, preflight
from saejax.errors import UserError
from saejax.sae import base, l1, topk

CONF = Path(config.conf_dir())
ROOTS = {
    "train": config.Config,
    "harvest": harvest.HarvestConfig,
    **{name: root for name, (root, _) in commands.NAMES.items()},
}
# What a command cannot do without.
REQUIRED = {"evaluate": ["run=x"], "export": ["run=x"], "report": ["run=x"]}
PARTS = sorted(str(p.relative_to(CONF).with_suffix("")) for p in CONF.glob("*/*.yaml"))


@pytest.fixture
def array(tmp_path):
    """A file of activations, for the sources that need a path."""
    path = tmp_path / "rows.npy"
    np.save(path, np.random.default_rng(0).normal(size=(4096, 24)).astype(np.float32))
    return path


@pytest.mark.parametrize("root", sorted(p.stem for p in CONF.glob("*.yaml")))
def test_every_root_composes(root):
    assert isinstance(config.load(root, ROOTS[root], REQUIRED.get(root, [])), ROOTS[root])


@pytest.mark.parametrize("part", PARTS)
def test_every_part_composes(part, array, small_store):
    group, choice = part.split("/")
    overrides = [f"experiment={choice}" if group == "experiment" else f"{group}={choice}"]
    text = (CONF / f"{part}.yaml").read_text()
    if "source: store" in text or part == "source/store":
        overrides += [f"source.path={small_store}"]
    if part == "source/joined":  # a store beside itself: rows of two sites
        overrides += [f"source.paths=[{small_store},{small_store}]", "sae.family=crosscoder"]
    if part == "source/arrays":
        overrides += [f"source.path={array}"]
    if part == "text/files":
        overrides += ["text.path=x"]
    root = "harvest" if group == "text" else "train"
    composed = config.load(root, ROOTS[root], overrides)
    if group in ("sae", "source"):
        kind = text.split("_schema")[0].split()[-1].lstrip("[")
        assert type(getattr(composed, group)) is config.GROUPS[group][kind]


def test_the_width_comes_from_the_source(array):
    cfg = config.load("train", config.Config, ["source=arrays", f"source.path={array}"])
    assert cfg.sae.d_in == cfg.source.d_in == 24


def test_objects_are_the_architectures_themselves():
    cfg = config.load("train", config.Config, ["sae=l1", "sae.l1_coef=2", "seed=3"])
    assert cfg.sae == l1.L1(d_in=64, d_sae=256, l1_coef=2.0) and cfg.seed == 3
    assert hash(cfg) == hash(config.load("train", config.Config, ["sae=l1", "sae.l1_coef=2", "seed=3"]))
    # Each architecture brings the scale that its coefficients were made for.
    assert cfg.normalize.mode.name == "sqrt_d"
    assert config.load("train", config.Config, []).normalize.mode.name == "unit"


MISTAKES = [
    (["sae.kk=3"], r"unknown key sae.kk; did you mean sae.k\?"),
    (["foo=3"], "unknown key foo; Config has sae, source"),
    (["optim.lrr=3"], r"unknown key optim.lrr; did you mean optim.lr\?"),
    (["sae=l1", "sae.k=8"], "unknown key sae.k: it is of sae=abs_topk, .* sae=topk$"),
    (["+sae.kk=3"], "unknown key kk"),
    (["++sae.kk=3"], "unknown key kk"),
    (["sae=topkk"], "sae=topkk: no such choice; choose one of abs_topk, batch_topk, gated, "),
    (["sae.k=abc"], "sae.k must be a whole number, got abc"),
    (["train.n_tokens=1e6"], "train.n_tokens must be a whole number, got 1000000.0"),
    (["normalize.mode=unity"], "normalize.mode: Invalid value 'unity', expected one of"),
    (["sae.k=999"], r"sae.k must be in \[1, d_sae=256\], got 999"),
    (["sae.d_in=3"], "sae.d_in must equal the width of the source, 64, got 3"),
    (["source=store"], "source.path must be given"),
    (["source=store", "source.path=/nowhere"], "no train/ store"),
    (["train.batch=100"], "train.batch must be a multiple of train.n_lanes=8, got 100"),
    (["train.n_tokens=5"], "train.n_tokens must be at least train.batch=512, got 5"),
    (["buffer.rows=5"], "buffer.rows"),
    (["optim.lr=0"], "optim.lr must be above 0"),
    (["optim.warmup_share=0.7", "optim.decay_share=0.7"], "must not exceed 1"),
    (["mesh.data=3"], "mesh.data must divide train.n_lanes=8, got 3"),
    (["mesh.latent=3"], "mesh.latent must divide sae.d_sae=256, got 3"),
    (["mesh.data=0"], "mesh.data must be at least 1, got 0"),
    (["checkpoint.keep_last=0"], "checkpoint.keep_last must be at least 1"),
]


@pytest.mark.parametrize("overrides, message", MISTAKES, ids=lambda v: v if isinstance(v, str) else " ".join(v))
def test_a_mistake_ends_in_one_line(overrides, message):
    with pytest.raises(UserError, match=message) as caught:
        config.load("train", config.Config, overrides)
    assert "\n" not in str(caught.value)


def test_a_wrong_point_of_a_sweep_stops_it_before_the_first_job():
    preflight.check(["-m", "sae.k=4,8", "seed=0,1"])
    preflight.check(["--cfg", "job", "sae.k=4"])  # a question to Hydra, not a job
    with pytest.raises(UserError, match=r"sae.k must be in .* got 9999 \(in the job sae.k=9999 seed=0; no job was"):
        preflight.check(["-m", "sae.k=4,9999", "seed=0,1"])


@pytest.mark.parametrize("architecture", sorted(base.ARCHITECTURES))
def test_a_run_directory_describes_itself(architecture, tmp_path):
    cfg = config.load("train", config.Config, [f"sae={architecture}", "sae.d_sae=96", "optim.lr=3e-4", "seed=7"])
    (tmp_path / "config.yaml").write_text(config.to_yaml(cfg))
    assert config.from_run(tmp_path) == cfg
    assert config.from_run(tmp_path, ["seed=8"]) == dataclasses.replace(cfg, seed=8)
    with pytest.raises(UserError, match="unknown key sae.kk"):
        config.from_run(tmp_path, ["sae.kk=1"])
    with pytest.raises(UserError, match="not a run directory"):
        config.from_run(tmp_path / "elsewhere")


@pytest.mark.parametrize("name", sorted(ROOTS))
def test_every_field_is_documented_and_shown_by_help(name):
    text = help_text.of_command(name, ROOTS[name])
    classes = [ROOTS[name], topk.TopK, l1.L1] if name == "train" else [ROOTS[name]]
    classes += [
        f.default_factory
        for f in dataclasses.fields(ROOTS[name])
        if dataclasses.is_dataclass(f.default_factory) and f.name not in config.GROUPS
    ]
    for cls in classes:
        docs = help_text.field_docs(cls)
        for field in dataclasses.fields(cls):
            assert docs.get(field.name), f"{cls.__name__}.{field.name} has no documentation"
            assert field.name in text


def shown_by_help(name):
    """Section of the help text -> {key: value} as printed; the section of keys outside any part is ''."""
    shown, section = {"": {}}, ""
    for line in help_text.of_command(name, ROOTS[name]).splitlines():
        if heading := re.match(r"  ([\w.]+(?:=\w+)?): ", line):
            section = heading[1]
            shown[section] = {}
        elif entry := re.match(r"    ([\w.]+) = (.*)$", line):
            shown[section][entry[1]] = entry[2]
    return shown


def test_help_shows_the_values_of_conf():
    shown = shown_by_help("train")
    assert shown["sae=topk"]["sae.k"] == "4" and shown["sae=topk"]["sae.d_sae"] == "256"
    assert shown["buffer"]["buffer.rows"] == "16384"
    assert shown["normalize"]["normalize.mode"] == "auto"  # as composed, not as an architecture resolves it
    assert shown["train"]["train.dead_after_tokens"] == "null"


def with_source(sae, source):
    """Every source with one architecture, and those with most keys; the other pairs run nightly."""
    quick = sae == "topk" or (source == "synthetic" and sae in ("jumprelu", "p_anneal"))
    return pytest.param(sae, source, marks=() if quick else pytest.mark.nightly)


SOURCES = ("arrays", "store", "synthetic")


@pytest.mark.parametrize(("sae", "source"), [with_source(a, s) for s in SOURCES for a in sorted(base.ARCHITECTURES)])
def test_saying_what_help_shows_changes_nothing(sae, source, array, small_store):
    shown = shown_by_help("train")
    needed = {"arrays": [f"source.path={array}"], "store": [f"source.path={small_store}"], "synthetic": []}[source]
    chosen = [f"sae={sae}", f"source={source}", *needed]
    parts = [part for part in shown if "=" not in part] + [f"sae={sae}", f"source={source}"]
    said = [f"{key}={value}" for part in parts for key, value in shown[part].items()]
    plain = config.load("train", config.Config, chosen)
    assert config.load("train", config.Config, [*chosen, *said]) == plain
    # Every key is there: those without a value are those that have to be given.
    keys = {option.split("=")[0] for option in said + needed}
    assert keys == {key for key in flat(config.to_plain(plain)) if not key.endswith(".type")}


@pytest.mark.parametrize("name", sorted(set(ROOTS) - {"train"}))
def test_saying_what_help_shows_changes_no_other_command(name):
    given = REQUIRED.get(name, [])
    taken = {option.split("=")[0] for option in given}
    shown = shown_by_help(name)
    parts = [part for part in shown if "=" not in part] + (["text=wikipedia"] if name == "harvest" else [])
    said = [f"{key}={value}" for part in parts for key, value in shown[part].items() if key not in taken]
    assert config.load(name, ROOTS[name], [*given, *said]) == config.load(name, ROOTS[name], given)


def test_help_lists_every_choice_and_what_it_is():
    text = help_text.of_command("train", config.Config)
    for part in PARTS:
        group, choice = part.split("/")
        assert group == "text" or re.search(rf"^  [* ] {group}={choice} +[A-Z\w]", text, re.MULTILINE), part
    assert "* sae=topk " in text and re.search(r"  experiment=sb_iid_topk +Known features, independent: TopK", text)
    assert "* text=wikipedia " in help_text.of_command("harvest", ROOTS["harvest"])


def test_help_does_without_a_composition(monkeypatch):
    def broken(**kwargs):
        raise config.HydraException("broken")

    monkeypatch.setattr(config, "compose", broken)
    assert shown_by_help("train")["sae=topk"]["sae.k"] == str(topk.TopK.k)


def flat(plain, prefix=""):
    """Dotted keys of nested dicts."""
    for key, value in plain.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"
