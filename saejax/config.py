"""Typed configuration: YAML and overrides to one frozen `Config`, checked before any device work.

The schema consists of the dataclasses beside the code that they configure. The files under conf/ set values and never
name a Python path. The result is plain objects: `config.sae` is the architecture itself.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from saejax.activations import arrays, buffer, normalize, source, synthetic, text
from saejax.activations.language_model import live
from saejax.activations.store import joined_source
from saejax.activations.store import source as store_source
from saejax.errors import UserError
from saejax.fields import command_line, key_value, numeric
from saejax.fields.registry import PLUGINS
from saejax.fields.resume_policy import Fixed, Place
from saejax.parallel import sharding
from saejax.sae import (
    abs_topk,
    base,
    batch_topk,
    gated,
    jumprelu,
    l1,
    layout,
    matching_pursuit,
    matryoshka,
    p_anneal,
    topk,
)
from saejax.storage import checkpoint, json_yaml, tracking
from saejax.training import ensemble_config, fold, optim, settings, start

# Importing a file enters its classes into their registry.
_MEMBERS = (
    *(arrays, joined_source, live, store_source, synthetic),
    *(abs_topk, batch_topk, gated, jumprelu, l1, matching_pursuit, matryoshka, p_anneal, topk),
)

# Groups of which a config picks one member; each registry fills itself where its members are defined.
GROUPS: dict[str, Mapping[str, type]] = {"sae": base.ARCHITECTURES, "source": source.SOURCES, "text": text.TEXTS}

# What a member of a group takes from the rest of the config where it has no file in conf/.
_DERIVED = {"sae": {"d_in": "${source_d_in:}", "sites": "${source_sites:}"}}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One training run."""

    sae: Fixed[base.Sparsifier]
    """The architecture: topk, l1, ..."""
    source: Fixed[source.ActivationSource]
    """Where rows come from: synthetic, store, arrays, ..."""
    buffer: Fixed[buffer.BufferConfig] = dataclasses.field(default_factory=buffer.BufferConfig)
    """The shuffle buffer on the devices."""
    normalize: Fixed[normalize.NormalizeConfig] = dataclasses.field(default_factory=normalize.NormalizeConfig)
    """Centring and scaling of rows, undone when the SAE is loaded."""
    optim: Fixed[optim.OptimConfig] = dataclasses.field(default_factory=optim.OptimConfig)
    """Update rule and schedule."""
    mesh: Place[sharding.MeshConfig] = dataclasses.field(default_factory=sharding.MeshConfig)
    """Devices along data and latent."""
    train: Fixed[settings.TrainConfig] = dataclasses.field(default_factory=settings.TrainConfig)
    """Length, batch and rhythm."""
    checkpoint: Place[checkpoint.CheckpointConfig] = dataclasses.field(default_factory=checkpoint.CheckpointConfig)
    """Time and number of checkpoints."""
    tracker: Place[tracking.TrackerConfig] = dataclasses.field(default_factory=tracking.TrackerConfig)
    """W&B beside metrics.jsonl."""
    seed: Fixed[int] = 0
    """Fixes parameters, data order and draws of a run."""
    ensemble: Fixed[ensemble_config.EnsembleConfig] = dataclasses.field(default_factory=ensemble_config.EnsembleConfig)
    """Values of seed, optim.lr, sae.k, ... that are trained together on one stream; empty lists train one SAE."""
    data_seed: Fixed[int | None] = None
    """Fixes data order and draws alone, so that runs of several seeds see the same batches; null takes `seed`."""

    def __post_init__(self) -> None:
        numeric.check(self)
        if self.normalize.mode is normalize.NormMode.auto:
            mode = normalize.NormMode[self.sae.preferred_norm]
            object.__setattr__(self, "normalize", dataclasses.replace(self.normalize, mode=mode))
        _check_hashable(self.sae)
        self.buffer.n_batches(self.train.batch)  # refuses a buffer that holds no batch
        if self.mesh.data is not None and self.train.n_lanes % self.mesh.data:
            raise UserError(f"mesh.data must divide train.n_lanes={self.train.n_lanes}, got {self.mesh.data}")
        if self.sae.d_sae % self.mesh.latent:
            raise UserError(f"mesh.latent must divide sae.d_sae={self.sae.d_sae}, got {self.mesh.latent}")
        start.check(self.sae, self.train)
        fold.check(self.sae, self.normalize.mode)
        if self.optim.averages and self.train.ema_decay is not None:
            raise UserError("train.ema_decay must be null with optim.name=schedule_free, which averages by itself")
        ensemble_config.check(self)

    @property
    def stream_seed(self) -> int:
        """`data_seed` with null resolved."""
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def averaged(self) -> bool:
        """Whether an average of the parameters is evaluated, exported and loaded."""
        return self.optim.averages or self.train.ema_decay is not None


def _check_hashable(sae: base.Sparsifier) -> None:
    """Refuse an architecture that cannot be static in a compiled step, where a YAML list stayed one."""
    for field in dataclasses.fields(sae):
        try:
            hash(getattr(sae, field.name))
        except TypeError:
            must = f"must be hashable: {type(sae).__name__}.__post_init__ turns lists into tuples"
            raise UserError(f"sae.{field.name} {must}, got {getattr(sae, field.name)}") from None


def check_data(config: Config) -> None:
    """Refuse what only the machine can tell: an SAE that does not fit its rows, a tracker that is not installed.

    Opens the source, which a config alone never does.

    Raises:
      UserError: the source cannot be read, or its widths are others; the tracker is not installed.
    """
    tracking.check(config.tracker)
    sae, source = config.sae, config.source
    if sae.d_row != source.d_in:
        name = "sae.d_in" if sae.mirrors else "the sum of sae.sites"
        raise UserError(f"{name} must equal the width of the source, {source.d_in}, got {sae.d_row}")
    if len(source.site_widths) > 1 and sae.sites != source.site_widths:
        raise UserError(f"sae.sites must be those of the source, {source.site_widths}, got {sae.sites}")


def conf_dir() -> str:
    """Absolute path of conf/: inside an installed package, at the repository root of an editable one."""
    for candidate in (Path(__file__).parent / "conf", Path(__file__).parent.parent / "conf"):
        if (candidate / "train.yaml").is_file():
            return str(candidate)
    raise UserError(f"conf/ was not found beside {Path(__file__).parent}: reinstall saejax")


_entered: dict[str, tuple[type, dict[str, dict[str, type]]]] = {}
"""What `register` entered last for each root."""


def register(name: str, root: type) -> None:
    """Enter a root schema, every group's schemas and the resolver; safe to repeat, also when members were registered.

    Args:
      name: of the root's file in conf/, without .yaml.
      root: its dataclass.
    """
    members = (root, {group: dict(types) for group, types in GROUPS.items()})
    if _entered.get(name) == members:  # a quarter of the time of a composition
        return
    _entered[name] = members
    store = ConfigStore.instance()
    store.store(name=f"{name}_schema", node=root)
    _thaw(store.repo[f"{name}_schema.yaml"].node)
    for group, types in GROUPS.items():
        for member, cls in types.items():
            store.store(group=group, name=f"{member}_schema", node=cls)
            _thaw(store.repo[group][f"{member}_schema.yaml"].node)
            if member in without_file(group):
                own = {"defaults": [f"{member}_schema", "_self_"], **_DERIVED.get(group, {})}
                store.store(group=group, name=member, node=own)
    OmegaConf.register_new_resolver("source_d_in", _source_d_in, replace=True)
    OmegaConf.register_new_resolver("source_sites", _source_sites, replace=True)
    # What presets compute: ${times:8,${sae.d_in}}, ${over:1,${sae.k}}, ${smaller:512,${sae.d_sae}}, ${steps:0.05}.
    # Of 0 and less they make something harmless: whose 0 that is, the field itself says.
    OmegaConf.register_new_resolver("times", lambda *factors: max(round(math.prod(factors)), 1), replace=True)
    OmegaConf.register_new_resolver("over", lambda above, below: above / below if below else 0.0, replace=True)
    OmegaConf.register_new_resolver("smaller", min, replace=True)
    OmegaConf.register_new_resolver("steps", _steps, replace=True)


def without_file(group: str) -> dict[str, type]:
    """Members of a group that conf/ has no file for: those from outside, which a config takes with their defaults."""
    folder = Path(conf_dir()) / group
    return {name: cls for name, cls in GROUPS[group].items() if not (folder / f"{name}.yaml").is_file()}


def schema(cls: type) -> DictConfig:
    """A dataclass as a node that composition may write to, although its instances are frozen."""
    node = OmegaConf.structured(cls)
    _thaw(node)
    return node


def _thaw(node: Any) -> None:
    # OmegaConf marks the nodes of frozen dataclasses read-only, and then refuses YAML values and overrides. It does so
    # again when it fills a group from its declared base class, which is therefore forgotten here.
    OmegaConf.set_readonly(node, None)
    for key in node if OmegaConf.is_dict(node) else ():
        child = node._get_node(key)
        if key in GROUPS:
            child._set_flag("readonly", None)
            child._metadata.ref_type = Any
            child._set_value("???")
        elif OmegaConf.is_config(child):
            _thaw(child)


def _source(root: DictConfig) -> Any:
    missing = sorted(OmegaConf.missing_keys(root.source))
    if missing:
        raise UserError(f"{missing[0]} must be given, say {missing[0]}=...")
    return OmegaConf.to_object(root.source)


def _source_sites(*, _root_: DictConfig) -> list[int]:
    """The widths of the sites of the source, none where there is only one."""
    widths = _source(_root_).site_widths
    return list(widths) if len(widths) > 1 else []


def _source_d_in(*, _root_: DictConfig) -> int:
    """The width that the SAE reads: of the whole source, or of its sites as the family says."""
    given, width = tuple(_root_.sae.get("sites") or ()), _source(_root_).d_in
    given = tuple(numeric.count(site, "sae.sites") for site in given)
    return sum(layout.read(_root_.sae.family, given)) if given else width


def _steps(share: float, *, _root_: DictConfig) -> int:
    """A share of the steps of the run, so that a shorter run keeps the shape of its schedules."""
    return round(share * (_root_.train.n_tokens // (_root_.train.batch or 1)))


def load(name: str, root: type, overrides: list[str]) -> Any:
    """Compose one root config and turn it into its frozen object.

    Args:
      name: a file of conf/ without .yaml: train, harvest, evaluate, export, report.
      root: dataclass of that file.
      overrides: as on the command line, `sae.k=64`.

    Returns:
      The root's dataclass instance.

    Raises:
      UserError: one line saying which key or value is wrong and what is allowed.
    """
    register(name, root)
    typed = command_line.for_hydra(overrides, command_line.path_keys(root, GROUPS))
    parsed = key_value.parsed(typed)
    for chosen in parsed:
        choice: Any = None if chosen.is_delete() else chosen.value()
        if chosen.key_or_group in GROUPS and isinstance(choice, str):
            GROUPS[chosen.key_or_group].get(choice)  # says why where a package of that name is broken
    key_value.check_choices(parsed, conf_dir(), {group: without_file(group) for group in GROUPS})
    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir=conf_dir(), version_base="1.3"):
        try:
            composed = compose(config_name=name, overrides=typed)
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(one_line(error, root)) from error
    made = to_object(composed)
    if isinstance(made, Config):
        check_data(made)
    return made


def override(default: Any, overrides: list[str]) -> Any:
    """A frozen config object with `key=value` on top.

    Args:
      default: instance of a frozen dataclass of scalars, enums, tuples and dataclasses of these.
      overrides: `key=value` each; keys must exist, lists are typed as [1,2].

    Returns:
      A new instance of the same class; tuples arrive as lists.

    Raises:
      UserError: an unknown key or a wrong value, in one line.
    """
    root = type(default)
    node = OmegaConf.structured(default)
    _unlock(node)
    try:
        typed = command_line.for_dotlist(overrides, command_line.path_keys(root, {}))
        merged: Any = OmegaConf.merge(node, key_value.dotlist(typed))
    except OmegaConfBaseException as error:
        raise UserError(one_line(error, root)) from error
    return to_object(merged)


def _unlock(node: Any) -> None:
    """Let values be written to a config made of frozen instances."""
    OmegaConf.set_readonly(node, None)
    for key in node if OmegaConf.is_dict(node) else ():
        if not OmegaConf.is_missing(node, key) and OmegaConf.is_config(node._get_node(key)):
            _unlock(node._get_node(key))


def to_object(composed: DictConfig) -> Any:
    """Instantiate a composed config; every `__post_init__` check runs here.

    Raises:
      UserError: a missing value, a wrong type, an unknown key or an impossible combination, in one line.
    """
    try:
        missing = sorted(OmegaConf.missing_keys(composed))
        if missing:
            raise UserError(f"{', '.join(missing)} must be given, say {missing[0]}=...")
        return OmegaConf.to_object(composed)
    except dataclasses.FrozenInstanceError as error:
        key = str(error).split("'")[1]
        raise UserError(f"unknown key {key}: it is not in the schema (a leading + cannot add one)") from error
    except UserError:
        raise
    except (OmegaConfBaseException, TypeError, OverflowError) as error:
        raise UserError(one_line(error)) from error


def one_line(error: Exception, root: type = Config) -> str:
    """The message of Hydra or OmegaConf as one line: the key or choice as typed, what is wrong, what is allowed."""
    text = "\n".join(str(part) for part in (error, error.__cause__) if part)
    raised_by_us = re.search(r"UserError raised while resolving interpolation: (.*)", text)
    if raised_by_us:
        return raised_by_us[1]
    choice = re.search(r"Could not find '(.*?)'\s+Available options in '([\w/]+)':\s+(.*?)\n(?:Config|$)", text, re.S)
    if choice:
        allowed = [name for name in choice[3].split() if not name.endswith("_schema")]
        there, named = f"no such choice; choose one of {', '.join(allowed)}", choice[1].removeprefix(f"{choice[2]}/")
        return f"{choice[2]}={named}: {there}{command_line.near(named, allowed)}"
    unknown = re.search(r"Key '([^']+)' not in '(\w+)'", text)
    key = re.search(r"full_key: (\S+)", text)
    if unknown:
        return command_line.unknown(key[1] if key else unknown[1], unknown[2], root, GROUPS)
    if key and (wrong := key_value.wrong_value(text)):
        return f"{key[1]} {wrong}"
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith(_LAYOUT)]
    return (f"{key[1]}: " if key else "") + "; ".join(dict.fromkeys(lines))


# How OmegaConf begins the lines that say nothing to a user.
_LAYOUT = ("object_type", "reference_type", "full_key", "Error merging")


def to_yaml(config: Any, stamp: json_yaml.Stamp | None = None) -> str:
    """A config as YAML that says of itself which classes it was made of (`type:`).

    Args:
      config: see `Config`.
      stamp: of the run whose config.yaml it is; None writes format 1, of a run without an id.
    """
    return yaml.safe_dump(json_yaml.stamped(to_plain(config), stamp or json_yaml.Stamp()), sort_keys=False)


def to_plain(value: Any) -> Any:
    """A config as nested dicts of scalars, `type` naming the class where a group has several."""
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, (tuple, list)):
        return [to_plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: to_plain(vars(value)[f.name]) for f in dataclasses.fields(value)}
        name = getattr(type(value), "name", None)
        return ({"type": name} if isinstance(name, str) else {}) | fields
    return value


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, keys joined by dots."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def from_run(run_dir: Path, overrides: list[str] | None = None) -> Config:
    """The config of an existing run, with overrides on top.

    Args:
      run_dir: holds config.yaml.
      overrides: `key=value` each; keys must exist.

    Returns:
      The `Config`.

    Raises:
      UserError: no config.yaml, an unknown type, or a wrong override.
    """
    saved = json_yaml.read_run_config(run_dir)
    node = schema(Config)
    for group, registry in (("sae", base.ARCHITECTURES), ("source", source.SOURCES)):
        chosen = saved[group].pop("type")
        if chosen not in registry:
            where = f"{run_dir / 'config.yaml'}: {group}.type"
            got = f"got {json_yaml.one_line(chosen)}; {PLUGINS} names modules that define others"
            raise UserError(f"{where} must be one of {', '.join(registry)}, {got}")
        node[group] = schema(registry[chosen])
    try:
        typed = command_line.for_dotlist(overrides or [], command_line.path_keys(Config, GROUPS))
        merged = OmegaConf.merge(node, saved, key_value.dotlist(typed))
    except (OmegaConfBaseException, OverflowError) as error:
        raise UserError(one_line(error)) from error
    return to_object(merged)  # pyright: ignore[reportArgumentType]
