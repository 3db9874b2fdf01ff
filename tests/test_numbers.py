"""Every number of every config, with every kind of value that is none: a valid config, or one line with the field.

The classes are found from the roots of the commands, so that a new field or a new experiment is tested by itself.
"""

import copy
import dataclasses
import functools
import math
import typing

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from saejax import config
from saejax.activations import text
from saejax.activations.language_model import harvest_config
from saejax.cli import commands
from saejax.errors import UserError
from saejax.evals import metric
from saejax.fields import key_value, numeric
from saejax.lab.experiments import all_experiments, harness

ROOTS = {
    "train": config.Config,
    "harvest": harvest_config.HarvestConfig,
    "evaluate": commands.EvaluateConfig,
    "export": commands.ExportConfig,
    "report": commands.ReportConfig,
}
NEEDED = {
    config.base.Sparsifier: {"d_in": 8, "d_sae": 64},
    config.arrays.Arrays: {"path": "rows.npy"},
    config.store_source.Store: {"path": "store"},
    config.joined_source.Joined: {"paths": ("one", "two")},
    config.live.Live: {"model": "model", "corpus": "corpus", "hook": "blocks.0.hook_resid_post"},
    harvest_config.HarvestConfig: {
        "model": "model", "text": text.Pydoc(), "path": "out", "hook": "blocks.0.hook_resid_post"
    },
    text.TextFiles: {"path": "corpus"},
    commands.EvaluateConfig: {"run": "run"},
    commands.ExportConfig: {"run": "run"},
    commands.ReportConfig: {"run": "run"},
}  # fmt: skip
"""Fields without a default; a class takes those of its bases."""

NEVER = [math.nan, math.inf, -math.inf, 1e39, -1e39, 1e-50, 10**400, "x", "", True, np.bool_(True), 1j, [1], {}]
"""What no number field holds."""
NOT_WHOLE = [0.5, 3.0, np.float32(2), "3"]
SOME = [-1, 0, 1, 3, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, -(2**31), -(2**63)]


def nested(cls: type) -> set[type]:
    """The config classes that a config is made of, itself among them; of a group all members."""
    found = {cls}
    for hint in typing.get_type_hints(cls).values():
        for group in config.GROUPS.values():
            if isinstance(hint, type) and any(issubclass(member, hint) for member in group.values()):
                found |= set(group.values())
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            found |= nested(hint)
    return found


CLASSES = set().union(*(nested(cls) for cls in [*ROOTS.values(), *all_experiments().values()]))
CLASSES = sorted(
    (cls for cls in CLASSES if not getattr(cls, "__abstractmethods__", ())), key=lambda cls: cls.__qualname__
)
FIELDS = [(cls, name) for cls in CLASSES for name in numeric._kinds(cls)]


def needed(cls: type) -> dict:
    """What a class cannot do without."""
    if cls is config.Config:
        return {"sae": config.topk.TopK(d_in=8, d_sae=64), "source": config.synthetic.Synthetic(d_in=8)}
    return functools.reduce(dict.__or__, (more for base, more in NEEDED.items() if issubclass(cls, base)), {})


def made(cls: type, name: str, value):
    """An instance, or the one line that refuses it, which names the field."""
    try:
        return cls(**needed(cls) | {name: value})
    except UserError as error:
        assert "\n" not in str(error) and name in str(error), error
        return None


def ids(case):
    return case.__name__ if isinstance(case, type) else None


def test_the_walk_finds_what_there_is():
    names = {cls.__name__ for cls in CLASSES}
    assert {"Config", "TopK", "PAnneal", "Synthetic", "Live", "OptimConfig", "MeshConfig", "LatentPage"} <= names
    assert {"DashboardConfig", "HarvestConfig", "Wikipedia", "DigitPairs", "EnsembleConfig"} <= names
    assert len(FIELDS) > 200


@pytest.mark.parametrize(("cls", "name"), FIELDS, ids=ids)
def test_no_number_field_takes_what_is_no_number(cls, name):
    kind = numeric._kinds(cls)[name]
    assert cls(**needed(cls)) is not None
    for value in NEVER + (NOT_WHOLE if kind.number is int else []):
        held = [value] if kind.many else value
        assert made(cls, name, held) is None, value
    if not kind.optional:
        assert made(cls, name, None) is None
    if kind.many:
        assert made(cls, name, 3) is None and made(cls, name, "12") is None


@pytest.mark.parametrize(("cls", "name"), FIELDS, ids=ids)
def test_a_number_that_is_taken_can_be_counted_with(cls, name):
    """Python's own type, in the range of the field; a NumPy number is worth what Python's is."""
    kind = numeric._kinds(cls)[name]
    for value in SOME:
        instance = made(cls, name, (value,) if kind.many else value)
        if instance is None:
            continue
        found = vars(instance)[name]
        for number in found if kind.many else [found]:
            assert type(number) in ((int,) if kind.number is int else (int, float))
            if kind.number is int and not name.endswith("_tokens") and name not in getattr(cls, "in_formulas", ()):
                assert -1 <= number < (2**32 if "seed" in name else 2**31), name
    for value in (np.int64(3), np.float32(0.5)):
        plain = made(cls, name, (value.item(),) if kind.many else value.item())
        assert plain == made(cls, name, (value,) if kind.many else value)


@pytest.mark.parametrize("seed", [-1, 2**32, 99999999999999999999, 1.0, True, math.nan])
def test_seeds_are_those_of_different_keys(seed):
    fields = [(cls, name) for cls, name in FIELDS if name == "seed" or name.endswith("_seed")]
    assert len(fields) > 20
    for cls, name in fields:
        many = numeric._kinds(cls)[name].many
        assert made(cls, name, (0, seed) if many else seed) is None


def test_experiments_leave_room_for_the_seeds_that_they_count_on_to():
    for cls in all_experiments().values():
        assert made(cls, "seed", 2**32 - 1) is None and made(cls, "seed", 2**31 - 1) is not None


def test_metrics_refuse_the_same():
    for cls in metric.METRICS.values():
        for name, kind in numeric._kinds(cls).items():
            given = {"widths": (1, 2)} if cls.name == "site_error" else {}
            for value in (math.nan, math.inf, "x", True):
                with pytest.raises(UserError, match=name):
                    cls(**given | {name: (value,) if kind.many else value})


def test_steps_are_counted_in_int32():
    settings = config.settings.TrainConfig
    assert settings(n_tokens=128 * 2**31 - 1, batch=128).n_steps == 2**31 - 1
    with pytest.raises(UserError, match=r"train.n_tokens must be at most 274877906943, .*, got 4000000000000"):
        settings(n_tokens=4_000_000_000_000, batch=128)


def test_formulas_may_ask_about_more_than_a_device_counts():
    found = all_experiments()["codes/capacity"](n_atoms=2**40)
    assert isinstance(found, harness.Experiment) and found.run().passed


# What is typed at a command.

TYPED = ["-1", "0", "nan", "inf", "-inf", "2147483648", "9223372036854775808", "1e400", "x", "true", "null", "", "[1]"]
BAD, LARGE = {"nan", "inf", "-inf", "1e400", "x", "true", ""}, {"9223372036854775808"}
WITH = {
    "train": [[f"sae={sae}"] for sae in ("topk", "l1", "jumprelu", "p_anneal", "matryoshka")]
    + [["source=hierarchical"]],
    "harvest": [["model=m", "path=o", "text=pydoc"], ["model=m", "path=o", "text=wikipedia"]],
    "evaluate": [["run=r"]],
    "export": [["run=r"]],
    "report": [["run=r"]],
}


def keys(node, prefix: str = "") -> list[str]:
    """The keys of the number fields of a config."""
    found = [prefix + name for name in numeric._kinds(type(node))]
    for field in dataclasses.fields(node):
        if dataclasses.is_dataclass(vars(node).get(field.name)):
            found += keys(vars(node)[field.name], f"{prefix}{field.name}.")
    return found


def refused(root: str, given: list[str], key: str, value: str) -> bool:
    """Whether a command line is refused, in one line with the key and, where there is one, the value."""
    typed = f"[{value}]" if key.startswith("ensemble.") or key.endswith(("sites", "prefixes")) else value
    try:
        config.load(root, ROOTS[root], [*given, f"{key}={typed}"])
    except UserError as error:
        assert "\n" not in str(error) and key.rpartition(".")[2] in str(error), error
        return True
    return False


@pytest.mark.parametrize(
    "root", [pytest.param(root, marks=pytest.mark.nightly) if root == "train" else root for root in ROOTS]
)
def test_nan_is_refused_at_every_command(root):
    given = WITH[root][0]
    for key in keys(config.load(root, ROOTS[root], given)):
        assert refused(root, given, key, "nan"), key


@pytest.mark.parametrize("key", ["optim.clip_norm", "optim.lr", "ensemble.lr", "sae.k", "seed", "source.noise"])
def test_nan_is_refused_where_a_run_begins(key):
    assert refused("train", [], key, "nan") and refused("train", [], key, "1e400")


@pytest.mark.nightly
@pytest.mark.parametrize("value", ["nan", "1e400", "true", "x", "-1", "2147483648"])
def test_every_number_of_a_run_at_its_command(value):
    for key in keys(config.load("train", ROOTS["train"], [])):
        assert refused("train", [], key, value) or value not in BAD, key


@pytest.mark.parametrize(("root", "given"), [(root, given) for root, all_given in WITH.items() for given in all_given])
def test_every_value_as_hydra_reads_it(root, given):
    """A valid config or one line; NaN, infinities, truth values and texts never pass. Composed once, and then each
    value read by Hydra's grammar and set as it sets it. Of a second choice its own part is tried."""
    config.register(root, ROOTS[root])
    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir=config.conf_dir(), version_base="1.3"):
        composed = compose(root, given)
    part = given[-1].partition("=")[0] + "." if given != WITH[root][0] else ""
    for key in filter(lambda key: key.startswith(part), keys(config.to_object(copy.deepcopy(composed)))):
        for value in TYPED:
            typed = f"[{value}]" if key.startswith("ensemble.") or key.endswith(("sites", "prefixes")) else value
            if typed == "[]":  # no sites, no members
                continue
            node = copy.deepcopy(composed)
            try:
                OmegaConf.update(node, key, key_value.parsed([f"{key}={typed}"])[0].value(), merge=True)
                config.to_object(node)
            except (UserError, OmegaConfBaseException) as error:
                said = str(error) if isinstance(error, UserError) else config.one_line(error)
                assert "\n" not in said and key.rpartition(".")[2] in said, error
            else:
                assert value not in BAD, (key, value)


@pytest.mark.parametrize("name", all_experiments())
def test_every_value_at_every_experiment(name):
    start = all_experiments()[name]()
    for key, kind in numeric._kinds(type(start)).items():
        for value in TYPED:
            typed = f"[{value}]" if kind.many else value
            try:
                found = config.override(start, [f"{key}={typed}"])
            except UserError as error:
                assert "\n" not in str(error) and key in str(error), error
            else:
                assert value not in BAD and (kind.number is float or value not in LARGE), (key, value)
                assert type(found) is type(start)
