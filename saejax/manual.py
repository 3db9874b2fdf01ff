"""The help text of a command, written from its config classes: every field with its default and its documentation."""

from __future__ import annotations

import ast
import dataclasses
import enum
import inspect
import textwrap
from pathlib import Path
from typing import Any

from saejax import config


def of_command(name: str, root: type, examples: tuple[str, ...]) -> str:
    """Help of one command.

    Args:
      name: of the command.
      root: its config dataclass.
      examples: whole command lines.

    Returns:
      Text for a terminal: usage, examples, choices of each group, then every key.
    """
    lines = [f"usage: saejax {name} [key=value ...]", "", inspect.getdoc(root) or "", "", "examples:"]
    lines += [f"  {example}" for example in examples]
    groups = {field.name: _choices(field.name) for field in dataclasses.fields(root) if _choices(field.name)}
    if groups:
        lines += ["", "groups, chosen as group=choice:"]
        lines += [f"  {group:<11} {', '.join(choices)}" for group, choices in groups.items()]
    lines += ["", "keys, set as key=value:"]
    lines += _keys(root, "")
    return "\n".join(lines)


def field_docs(cls: type) -> dict[str, str]:
    """The string literal under each field of a dataclass and of its bases."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body  # pyright: ignore
        for field, text in zip(body, body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(field.target, ast.Name):
                if isinstance(text.value, ast.Constant) and isinstance(text.value.value, str):
                    docs[field.target.id] = " ".join(text.value.value.split())
    return docs


def _choices(group: str) -> list[str]:
    folder = Path(config.conf_dir()) / group
    return sorted(path.stem for path in folder.glob("*.yaml"))


def _keys(cls: type, prefix: str) -> list[str]:
    lines = []
    docs = field_docs(cls)
    hints = inspect.get_annotations(cls, eval_str=True) if cls.__module__ != "builtins" else {}
    for field in dataclasses.fields(cls):
        kind = hints.get(field.name, field.type)
        members = config.GROUPS.get(field.name) if not prefix else None
        if members:
            for name, member in members.items():
                lines += ["", f"  {field.name}={name}: {_first_line(member)}", *_keys(member, f"{field.name}.")]
        elif dataclasses.is_dataclass(kind) and isinstance(kind, type):
            lines += ["", f"  {field.name}: {_first_line(kind)}", *_keys(kind, f"{prefix}{field.name}.")]
        else:
            lines += _entry(f"{prefix}{field.name}", _default(field), docs.get(field.name, ""))
    return lines


def _entry(key: str, default: str, text: str) -> list[str]:
    wrapped = textwrap.wrap(text, 92)
    return [f"    {key}{default}", *(f"        {line}" for line in wrapped)]


def _first_line(cls: type) -> str:
    return (inspect.getdoc(cls) or "").splitlines()[0]


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is dataclasses.MISSING:
        return ""
    value = field.default.name if isinstance(field.default, enum.Enum) else field.default
    return f" = {'null' if value is None else value}"
