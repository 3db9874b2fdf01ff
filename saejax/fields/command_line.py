"""Command-line arguments: quotes paths for Hydra before it parses them, and suggests corrections of typos.

Hydra's grammar gives `=`, `#`, `(`, `{`, commas, spaces and numbers a special meaning, which they do not have in a
path. The types of `saejax.fields.paths` in the config classes tell which keys hold paths.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
import types
import typing
from collections.abc import Iterable, Mapping

from saejax.errors import UserError
from saejax.fields import paths

Groups = Mapping[str, Mapping[str, type]]


@dataclasses.dataclass(frozen=True)
class PathKey:
    """A key of a command line that holds paths.

    Attributes:
      many: whether it is a list of them.
      optional: whether null means none of them.
    """

    many: bool = False
    optional: bool = False


OF_HYDRA = dict.fromkeys(
    ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir", "hydra.launcher.submitit_folder"), PathKey()
) | {"hydra.output_subdir": PathKey(optional=True)}
"""Directories that are Hydra's own; they cannot be swept."""

_SWEEP = re.compile(r"(choice|glob|sort|shuffle|tag|extend_list)\(.*\)", re.S)
"""How Hydra's functions of a sweep look; only where something is swept."""


def path_keys(root: type, groups: Groups, prefix: str = "") -> dict[str, PathKey]:
    """The keys of a config class that hold paths.

    Args:
      root: a dataclass.
      groups: field -> the classes that may stand there.
      prefix: of the keys.
    """
    hints, marked = typing.get_type_hints(root), paths.kinds(root)
    found: dict[str, PathKey] = {}
    for name in (field.name for field in dataclasses.fields(root)):
        hint = hints[name]
        if name in marked:
            union = typing.get_origin(hint) in (typing.Union, types.UnionType)
            options = typing.get_args(hint) if union else (hint,)
            many = any(typing.get_origin(option) is tuple for option in options)
            found[prefix + name] = PathKey(many, types.NoneType in options)
        for member in groups.get(name, {}).values() if not prefix else ():
            found |= path_keys(member, {}, f"{name}.")
        if isinstance(hint, type) and dataclasses.is_dataclass(hint) and name not in groups:
            found |= path_keys(hint, groups, f"{prefix}{name}.")
    return found


def for_hydra(arguments: Iterable[str], keys: Mapping[str, PathKey], *, sweep: bool = False) -> list[str]:
    """Arguments whose paths Hydra reads as they were typed.

    Args:
      arguments: `key=value`, and anything else, which stays.
      keys: from `path_keys`.
      sweep: whether commas separate the points of a sweep; a path that is there with its comma is one.

    Returns:
      The same, paths in quotes where they need them. What is in quotes stays, and so does `${...}`.

    Examples:
      >>> for_hydra(["run=runs/k=2", "step=3"], {"run": PathKey()})
      ["run='runs/k=2'", 'step=3']
    """
    keys = {**keys, **OF_HYDRA}
    return [_quoted(a, keys, sweep) for a in arguments]


def _quoted(argument: str, keys: Mapping[str, PathKey], sweep: bool) -> str:
    typed, equals, value = argument.partition("=")
    name = typed.lstrip("+")
    known = keys.get(name)
    if known is None or not equals or not value:
        return argument
    swept = sweep and not name.startswith("hydra.")
    if swept and _SWEEP.fullmatch(value):
        return argument
    points = [value]
    if swept and not os.path.lexists(os.path.expanduser(value)):
        points = _split(value)
    if "" in points:
        return argument  # which Hydra will refuse
    return f"{typed}={','.join(_value(point, known, _for_hydra) for point in points)}"


def _value(text: str, known: PathKey, quote: typing.Callable[[str], str]) -> str:
    if text == "null" and known.optional:
        return text
    if known.many and text.startswith("[") and text.endswith("]"):
        return f"[{','.join(quote(part) for part in _split(text[1:-1]) if part)}]"
    return quote(text)


def _for_hydra(text: str) -> str:
    if _in_quotes(text):
        return text
    return paths.quoted(text) if "${" in text else paths.for_hydra(text)


def for_dotlist(arguments: Iterable[str], keys: Mapping[str, PathKey]) -> list[str]:
    """As `for_hydra`, for OmegaConf's dot lists, whose values are YAML.

    Examples:
      >>> for_dotlist(["source.path=a: #1", "seed=3"], {"source.path": PathKey()})
      ['source.path="a: #1"', 'seed=3']
    """
    found = []
    for argument in arguments:
        typed, equals, value = argument.partition("=")
        known = keys.get(typed) if equals and value else None
        found.append(argument if known is None else f"{typed}={_value(value, known, _for_yaml)}")
    return found


def _for_yaml(text: str) -> str:
    return json.dumps(unquoted(text), ensure_ascii=False)


def unquoted(text: str) -> str:
    """Text of a value in Hydra's quotes; any other text unchanged."""
    if not _in_quotes(text):
        return text
    quote = text[0]
    return re.sub(rf"(\\*)(\\{quote}|\Z)", lambda found: found[1][: len(found[1]) // 2] + found[2][1:], text[1:-1])


def _in_quotes(text: str) -> bool:
    return len(text) > 1 and text[0] == text[-1] and text[0] in "'\""


def _split(text: str) -> list[str]:
    """At the commas that are in no quotes and no brackets; one piece where brackets or quotes do not close."""
    parts, depth, quote, escaped = [""], 0, "", False
    for character in text:
        if quote:
            quote = "" if character == quote and not escaped else quote
        elif character in "'\"" and not parts[-1].strip():
            quote = character
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        escaped = character == "\\" and not escaped
        if character == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return [text] if depth or quote else [part.strip() for part in parts]


def check_words(arguments: Iterable[str], flags: Iterable[str] = (), valued: Iterable[str] = ()) -> None:
    """Refuses bytes that a command line cannot hold, before anything reads it.

    Args:
      arguments: as typed.
      flags: those that the command has besides -h and --help.
      valued: those of them that a word of their own may follow.

    Raises:
      UserError: an unknown flag, with the one that was meant; a word without `=`; bytes that are no UTF-8.
    """
    arguments, before = list(arguments), ""
    check_flags(arguments, (*flags, *valued))
    for argument in arguments:
        if not argument.startswith(("-", "~")) and "=" not in argument and before not in valued:
            raise UserError(f"{argument or repr(argument)}: expected key=value")
        before = argument


def check_flags(arguments: Iterable[str], flags: Iterable[str] = ()) -> None:
    """As `check_words`, where words may stand alone."""
    known = ["--help", "-h", *flags]
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            shown = argument.encode("ascii", "backslashreplace").decode()
            raise UserError(f"{shown} is not UTF-8: set PYTHONUTF8=1 or LC_ALL=C.UTF-8") from None
        word = argument.partition("=")[0]
        if argument.startswith("-") and word not in known:
            raise UserError(f"unknown flag {word}{near(word, known)}")


def near(word: str, known: Iterable[str]) -> str:
    """Suggestion for a typo, as the rest of a line: `; did you mean --help?`, or nothing.

    Examples:
      >>> near("--hlep", ["--help", "-m"])
      '; did you mean --help?'
    """
    found = _nearest(word, list(known))
    return f"; did you mean {found}?" if found else ""


def _nearest(word: str, known: list[str], cutoff: float = 0.7) -> str | None:
    folded = (name for name in known if name.lower() == word.lower())
    return next(folded, None) or next(iter(difflib.get_close_matches(word, known, n=1, cutoff=cutoff)), None)


def owners(root: type, groups: Groups, prefix: str = "") -> dict[str, dict[str, str]]:
    """Every key of a config class -> class that has it -> the choice of its group, empty where there is none."""
    hints = typing.get_type_hints(root)
    found: dict[str, dict[str, str]] = {}
    for name in (field.name for field in dataclasses.fields(root)):
        parts = groups.get(name, {}) if not prefix else {}
        found[prefix + name] = {root.__name__: ""}
        for choice, member in parts.items():
            for key, classes in owners(member, {}, f"{name}.").items():
                found.setdefault(key, {}).update(dict.fromkeys(classes, choice))
        if isinstance(hints[name], type) and dataclasses.is_dataclass(hints[name]) and not parts:
            found |= owners(hints[name], {}, f"{prefix}{name}.")
    return found


def unknown(key: str, class_name: str, root: type, groups: Groups) -> str:
    """Message about an unknown key: a suggestion, or the keys of its group.

    Args:
      key: as typed.
      class_name: of the class at its place.
      root: the config class.
      groups: field -> the classes that may stand there.
    """
    known, line = owners(root, groups), f"unknown key {key}"
    if elsewhere := known.get(key):
        group = key.partition(".")[0]
        return f"{line}: it is of {', '.join(f'{group}={choice}' for choice in elsewhere.values())}"
    parent, _, last = key.rpartition(".")
    named = {k: k.rpartition(".")[2] for k in known}
    here = {named[k]: k for k in known if class_name in known[k] and k.rpartition(".")[0] == parent}
    if meant := _nearest(last, list(here), cutoff=0.65):
        return f"{line}; did you mean {here[meant]}?"
    meant = [k for k in known if named[k].lower() == last.lower()]
    if meant or (meant := [k for k in [_nearest(key, [*known, *OF_HYDRA], cutoff=0.8)] if k]):
        return f"{line}; did you mean {' or '.join(sorted(meant, key=_of_one_run)[:3])}?"
    return f"{line}; {class_name} has {', '.join(here)}" if here else line


def _of_one_run(key: str) -> bool:
    return key.startswith("ensemble.")
