"""Help text of a command: every key with its documentation from the config classes and its value from conf/."""

from __future__ import annotations

import ast
import dataclasses
import enum
import inspect
import itertools
import textwrap
import typing
from pathlib import Path
from typing import Any

import yaml

from saejax import config

EXAMPLES: dict[str, tuple[str, ...]] = {
    "harvest": (
        "saejax harvest path=data/smollm2",
        "saejax harvest path=data/early hook=blocks.5.hook_resid_post n_tokens=100000",
        "saejax harvest path=data/mine model=/models/llama text=files text.path=corpus/*.jsonl",
    ),
    "train": (
        "saejax train",
        "saejax train source=store source.path=data/smollm2 sae.d_sae=4608 sae.k=32 train.batch=1024",
        "saejax train -m sae.k=16,32,64 seed=0,1",
        "saejax train ensemble.k=[16,32,64] ensemble.seed=[0,1]",
        "saejax train -m sweep.fold=true sae.k=16,32,64 seed=0,1 data_seed=0",
        "saejax train resume=runs/2026-01-31_120000",
        "saejax train --dry-run mesh.data=64 mesh.latent=32 train.n_lanes=64 sae.d_sae=33554432 --device-memory-gib=80",
    ),
    "evaluate": (
        "saejax evaluate run=runs/X",
        "saejax evaluate run=runs/X step=2000 rows=100000",
        "saejax evaluate run=runs/X language_model=false",
        "saejax evaluate run=downloads/an_sae activations=rows.npy",
    ),
    "export": (
        "saejax export run=runs/X",
        "saejax export run=runs/X path=out/my_sae",
        "saejax export run=runs/X step=2000 format=saelens",
        "saejax export run=runs/X format=neuronpedia neuronpedia.model=gpt2-small hub=me/my-saes",
    ),
    "report": (
        "saejax report run=runs/X",
        "saejax report run=runs/X latents.n_latents=100 out=pages/x.html",
        "saejax report sweep=runs/sweep_X",
    ),
}
"""Whole command lines of each command."""


def of_command(name: str, root: type) -> str:
    """Help of one command.

    Args:
      name: of the command.
      root: its config dataclass.

    Returns:
      Text for a terminal: usage, examples, choices of each group, then every key with the value it has when nothing
      is said about it.
    """
    lines = [f"usage: saejax {name} [key=value ...]", "", inspect.getdoc(root) or "", "", "examples:"]
    lines += [f"  {example}" for example in EXAMPLES[name]]
    defaults = _default_choices(name)
    if defaults:
        lines += ["", "groups, chosen as group=choice (* marks the default):"]
        lines += _choices(defaults)
    lines += ["", "keys, set as key=value:", *_keys_of_root(root, _composed(name, root))]
    return "\n".join(lines)


def field_docs(cls: type) -> dict[str, str]:
    """The string literal under each field of a dataclass and of its bases."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        try:
            source = inspect.getsource(base)
        except OSError:  # of a class that was typed into an interpreter
            continue
        body = ast.parse(textwrap.dedent(source)).body[0].body  # pyright: ignore
        for field, text in zip(body, body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(field.target, ast.Name):
                if isinstance(text.value, ast.Constant) and isinstance(text.value.value, str):
                    docs[field.target.id] = " ".join(text.value.value.split())
    return docs


def _default_choices(name: str) -> dict[str, str | None]:
    """Groups of a root file, and its choice in each; None without one."""
    entries = yaml.safe_load((Path(config.conf_dir()) / f"{name}.yaml").read_text(encoding="utf-8"))["defaults"]
    return {group: choice for entry in entries if isinstance(entry, dict) for group, choice in entry.items()}


def _choices(defaults: dict[str, str | None]) -> list[str]:
    """One line for each choice of each group, with the first comment of its file or the first line of its class."""
    said = {}
    for group in defaults:
        for path in sorted((Path(config.conf_dir()) / group).glob("*.yaml")):
            said[group, path.stem] = _first_comment(path)
        for name, cls in sorted(config.without_file(group).items() if group in config.GROUPS else ()):
            said[group, name] = (inspect.getdoc(cls) or "").partition("\n")[0]
    width = max((len(f"{group}={name}") for group, name in said), default=0)
    return [
        f"  {'*' if name == defaults[group] else ' '} {f'{group}={name}':<{width}}  {text}"
        for (group, name), text in said.items()
    ]


def _first_comment(path: Path) -> str:
    comments = (line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("# "))
    return next((line.removeprefix("# ") for line in comments if not line.startswith("# @")), "")


def _composed(name: str, root: type) -> list[dict[str, Any]]:
    """Configs of a root from conf/: first its own choices, then until every member of every group was chosen once.

    Interpolations and missing values stay as they are written, so that no member needs its data to be there.
    """
    groups = [[f"{group}={member}" for member in sorted(config.GROUPS[group])] for group in _groups(root)]
    choices = [[], *([c for c in row if c] for row in itertools.zip_longest(*groups))]
    config.register(name, root)
    config.GlobalHydra.instance().clear()
    found = []
    with config.initialize_config_dir(config_dir=config.conf_dir(), version_base="1.3"):
        for overrides in choices:
            try:
                node = config.compose(config_name=name, overrides=overrides)
            except (config.HydraException, config.OmegaConfBaseException):
                found.append({})  # help must not fail: defaults of the classes are shown in their place
            else:
                plain: Any = config.OmegaConf.to_container(node, resolve=False)
                found.append(plain)
    return found


def _groups(root: type) -> list[str]:
    return [field.name for field in dataclasses.fields(root) if field.name in config.GROUPS]


def _keys_of_root(root: type, composed: list[dict[str, Any]]) -> list[str]:
    """Plain keys, then a section for each part; for a group, one for each of its members."""
    default, *others = composed
    lines = _keys(root, default, "", skip=set(_groups(root)))
    for group in _groups(root):
        for (name, member), values in zip(sorted(config.GROUPS[group].items()), others, strict=False):
            lines += ["", f"  {group}={name}: {_first_line(member)}"]
            lines += _keys(member, values.get(group, {}), f"{group}.", skip=set())
    return lines


def _keys(cls: type, values: dict[str, Any], prefix: str, skip: set[str]) -> list[str]:
    """The keys of a class, those of the classes inside it after its own."""
    lines, sections = [], []
    docs, hints = field_docs(cls), typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind = hints.get(field.name, field.type)
        key = f"{prefix}{field.name}"
        if field.name in skip:
            continue
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            inner = values.get(field.name, {})
            sections += ["", f"  {key}: {_first_line(kind)}", *_keys(kind, inner, f"{key}.", skip=set())]
        else:
            lines += _entry(key, values.get(field.name, field.default), docs.get(field.name, ""))
    return lines + sections


def _entry(key: str, value: Any, text: str) -> list[str]:
    given = value is not dataclasses.MISSING and value != "???"
    wrapped = textwrap.wrap(text, 92)
    return [f"    {key} = {_typed(value)}" if given else f"    {key}", *(f"        {line}" for line in wrapped)]


def _typed(value: Any) -> str:
    """A value as one would type it."""
    if isinstance(value, enum.Enum):
        return value.name
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value) if value != "" else "''"


def _first_line(cls: type) -> str:
    return (inspect.getdoc(cls) or "").splitlines()[0]
