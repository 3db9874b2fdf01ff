"""Registries: architectures, sources, texts, metrics and formats by name, from saejax itself and from outside.

A class enters with a decorator or `saejax.register`. `SAEJAX_PLUGINS` names modules or .py files whose import registers
more: the first lookup imports them all, and a mistake in one ends the command. Installed packages declare theirs as
entry points: a registry loads those of its kind at its first lookup, and only who asks for a broken one fails.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib
import importlib.metadata
import importlib.util
import inspect
import logging
import os
import re
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from saejax.errors import UserError

logger = logging.getLogger(__name__)

PLUGINS = "SAEJAX_PLUGINS"
"""Environment variable: modules and .py files, separated by commas."""

_Member = TypeVar("_Member")
_T = TypeVar("_T")
_NAME = re.compile(r"[a-z][a-z0-9_]*")


class Registry(Mapping[str, _Member]):
    """Members of one kind by name; a lookup first loads those from outside.

    Args:
      kind: noun for messages; its plural in `saejax.<plural>` is the group of entry points.
      base: class that members derive from, or protocol that they have.
      check: called with each new member; raises a `UserError` where it cannot work.
    """

    def __init__(self, kind: str, base: Any, check: Callable[[Any], None] = lambda member: None) -> None:
        self.kind, self._base, self._check = kind, base, check
        self._members: dict[str, _Member] = {}
        self._broken: dict[str, str] = {}
        self._entered = False
        REGISTRIES[kind] = self

    def __getitem__(self, name: str) -> _Member:
        self._load()
        if name not in self._members and name in self._broken:
            raise UserError(self._broken[name])
        return self._members[name]

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(self._members)

    def __len__(self) -> int:
        self._load()
        return len(self._members)

    def holds(self, thing: Any) -> bool:
        """Returns whether a thing is of this kind; a class never has a protocol, only an object does."""
        if isinstance(thing, type):
            return not getattr(self._base, "_is_protocol", False) and issubclass(thing, self._base)
        return isinstance(thing, self._base)

    def register(self, member: _T) -> _T:
        """Enter a member under its `name`; a class decorator.

        Raises:
          UserError: of another kind, no usable or free name, abstract methods, no frozen dataclass.
        """
        name, where = getattr(member, "name", None), full_name(member)
        of_kind = f"{'an' if self.kind[0] in 'aeiou' else 'a'} {self.kind}"
        if not self.holds(member):
            raise UserError(f"{where} must be of {full_name(self._base)} to be {of_kind}")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise UserError(f"{where}.name must be lower case letters, digits and _, got {name!r}")
        if isinstance(member, type):
            if missing := sorted(getattr(member, "__abstractmethods__", ())):
                raise UserError(f"{where} must define {', '.join(missing)} to be {of_kind}")
            options = vars(member).get("__dataclass_params__")
            if options is None or not options.frozen:
                raise UserError(
                    f"{where} must be a frozen dataclass: @dataclasses.dataclass(frozen=True, kw_only=True)"
                )
            if facts := self._facts() & {field.name for field in dataclasses.fields(member)}:
                raise UserError(f"{where}.{min(facts)} must be annotated as ClassVar: a config cannot set it")
        held = self._members.get(name)
        if held is not None and full_name(held) != where:
            raise UserError(f"{where}: the {self.kind} {name} is already {full_name(held)}; take another name")
        self._check(member)
        self._members[name] = member  # pyright: ignore[reportArgumentType]
        return member

    def _facts(self) -> set[str]:
        """What the base class says of each class, and not of its instances."""
        hints = typing.get_type_hints(self._base)
        return {name for name, hint in hints.items() if typing.get_origin(hint) is typing.ClassVar}

    def _load(self) -> None:
        """Enter the members from outside; once."""
        load_plugins()
        if not self._entered:
            self._entered = True  # first: what is loaded may look members up itself
            for entry in importlib.metadata.entry_points(group=f"saejax.{self.kind}s"):
                self._enter(entry)

    def _enter(self, entry: importlib.metadata.EntryPoint) -> None:
        """Enter what a package declares; a broken one stops only who asks for it."""
        try:
            thing = entry.load()
            if (name := getattr(thing, "name", None)) != entry.name:
                raise UserError(f"{full_name(thing)}.name must be that of the entry point, got {name!r}")
            self.register(thing)
        except Exception as error:
            package = entry.dist.name if entry.dist is not None else "?"
            line = f"package {package}: the {self.kind} {entry.name} cannot be loaded: {_one_line(error)}"
            self._broken[entry.name] = line
            logger.warning("%s", line)


def check_fields(cls: type) -> None:
    """Refuse fields that YAML and a command line cannot give.

    Raises:
      UserError: a type that is none of a config, or that is not defined.
    """
    try:
        hints = typing.get_type_hints(cls)
    except NameError as error:
        raise UserError(f"{full_name(cls)}: the type of a field is not defined: {error}") from error
    for field in dataclasses.fields(cls):
        if not _of_config(hints[field.name]):
            must = "must be int, float, bool, str, an Enum, a dataclass, or a tuple or union with None of these"
            raise UserError(f"{full_name(cls)}.{field.name}: its type {must}, got {hints[field.name]}")


def _of_config(hint: Any) -> bool:
    if isinstance(hint, type) and typing.get_origin(hint) is None:
        plain = issubclass(hint, (int, float, str, enum.Enum, types.NoneType))
        return plain or dataclasses.is_dataclass(hint)
    many = typing.get_origin(hint) in (typing.Union, types.UnionType, tuple, list, dict)
    return many and all(_of_config(of) for of in typing.get_args(hint) if of is not Ellipsis)


REGISTRIES: dict[str, Registry[Any]] = {}
"""Every registry by its kind."""

_loaded: list[bool] = []

_folders: dict[str, None] = {}


def folders() -> list[str]:
    """Folders of the files that `SAEJAX_PLUGINS` named, for a process that unpickles their classes."""
    return list(_folders)


def register(thing: _T) -> _T:
    """Enter an architecture, source, text, metric or format where its kind belongs; a class decorator.

    Args:
      thing: a class that derives from the base class of its kind, or a format.

    Raises:
      UserError: it is of no kind, or its registry refuses it.
    """
    for registry in REGISTRIES.values():
        if registry.holds(thing):
            return registry.register(thing)
    raise UserError(
        f"{full_name(thing)} must derive from Sparsifier, ActivationSource, TextCorpus or Metric, or be a format: a "
        "module or object (no class) with name, detect, load and export"
    )


def load_plugins() -> None:
    """Import what `SAEJAX_PLUGINS` names; once.

    Raises:
      UserError: one of them cannot be imported.
    """
    if _loaded:
        return
    _loaded.append(True)  # first: plugins look members up themselves
    try:
        for named in filter(None, (part.strip() for part in os.environ.get(PLUGINS, "").split(","))):
            _import(named)
    except BaseException:
        _loaded.clear()
        raise


def _import(named: str) -> None:
    try:
        if named.endswith(".py"):
            _import_file(Path(named).expanduser().absolute())
        else:
            importlib.import_module(named)
    except (Exception, SystemExit) as error:
        raise UserError(f"{PLUGINS}: {named} cannot be imported: {_one_line(error)}") from error


def _import_file(path: Path) -> None:
    """Import a file under its own name, for pickles of its classes; never in place of another module."""
    name = path.stem
    if not name.isidentifier():
        raise UserError("a file that is imported has a name of letters, digits and _")
    there = sys.modules.get(name) or importlib.util.find_spec(name)
    origin = getattr(there, "__file__", None) or getattr(there, "origin", None)
    if there is not None and (origin is None or Path(origin).resolve() != path.resolve()):
        raise UserError(f"a module {name} is there already ({origin or 'built in'}): give the file another name")
    _folders[str(path.parent)] = None
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # of every .py file
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


def _one_line(error: BaseException) -> str:
    """A defect of somebody else's code in one line: what, and in which line of theirs."""
    if isinstance(error, UserError):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [f for f in frames if f.filename != __file__ and "importlib" not in f.filename]
    where = f" ({theirs[-1].filename}, line {theirs[-1].lineno})" if theirs else ""
    return " ".join(f"{type(error).__name__}: {error}".split()) + where


def full_name(thing: Any) -> str:
    """Module and name of a class, of an object's class, or of a module.

    Examples:
      >>> full_name(Registry), full_name(3), full_name(re)
      ('saejax.fields.registry.Registry', 'builtins.int', 're')
    """
    if inspect.ismodule(thing):
        return thing.__name__
    kind = thing if isinstance(thing, type) else type(thing)
    return f"{kind.__module__}.{kind.__qualname__}"
