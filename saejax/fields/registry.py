"""Registries: architectures, sources, texts, metrics and formats by name, from saejax itself and from outside.

A class enters with a decorator or `saejax.register`. Other packages declare theirs as entry points, and
`SAEJAX_PLUGINS` names modules or .py files whose import registers more. Both are loaded before the first lookup.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from saejax.errors import UserError

PLUGINS = "SAEJAX_PLUGINS"
"""Environment variable: modules and .py files, separated by commas."""

_Member = TypeVar("_Member")
_T = TypeVar("_T")
_NAME = re.compile(r"[a-z][a-z0-9_]*")


class Registry(Mapping[str, _Member]):
    """Members of one kind by name; a lookup first loads the plugins.

    Args:
      kind: noun for messages; its plural in `saejax.<plural>` is the group of entry points.
      base: class that members derive from, or protocol that they have.
      check: called with each new member; raises a `UserError` where it cannot work.
    """

    def __init__(self, kind: str, base: Any, check: Callable[[Any], None] = lambda member: None) -> None:
        self.kind, self._base, self._check = kind, base, check
        self._members: dict[str, _Member] = {}
        REGISTRIES[kind] = self

    def __getitem__(self, name: str) -> _Member:
        load_plugins()
        return self._members[name]

    def __iter__(self) -> Iterator[str]:
        load_plugins()
        return iter(self._members)

    def __len__(self) -> int:
        load_plugins()
        return len(self._members)

    def holds(self, thing: Any) -> bool:
        """Returns whether a thing is of this kind."""
        return issubclass(thing, self._base) if isinstance(thing, type) else isinstance(thing, self._base)

    def register(self, member: _T) -> _T:
        """Enter a member under its `name`; a class decorator.

        Raises:
          UserError: no usable name, a name that another one has, abstract methods, no frozen dataclass.
        """
        name, where = getattr(member, "name", None), _full_name(member)
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise UserError(f"{where}.name must be lower case letters, digits and _, got {name!r}")
        if isinstance(member, type):
            if missing := sorted(getattr(member, "__abstractmethods__", ())):
                raise UserError(f"{where} must define {', '.join(missing)} to be an {self.kind}")
            options = vars(member).get("__dataclass_params__")
            if options is None or not options.frozen:
                raise UserError(
                    f"{where} must be a frozen dataclass: @dataclasses.dataclass(frozen=True, kw_only=True)"
                )
        held = self._members.get(name)
        if held is not None and _full_name(held) != where:
            raise UserError(f"{where}: the {self.kind} {name} is already {_full_name(held)}; take another name")
        self._check(member)
        self._members[name] = member  # pyright: ignore[reportArgumentType]
        return member


REGISTRIES: dict[str, Registry[Any]] = {}
"""Every registry by its kind."""

_loaded: list[bool] = []


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
    kinds = ", ".join(REGISTRIES)
    raise UserError(f"{_full_name(thing)} must derive from the base class of one of: {kinds}")


def load_plugins() -> None:
    """Import what `SAEJAX_PLUGINS` names and enter what installed packages declare; once.

    Raises:
      UserError: one of them cannot be imported.
    """
    if _loaded:
        return
    _loaded.append(True)  # first: plugins look members up themselves
    try:
        for named in filter(None, (part.strip() for part in os.environ.get(PLUGINS, "").split(","))):
            _import(named)
        for registry in list(REGISTRIES.values()):
            for entry in importlib.metadata.entry_points(group=f"saejax.{registry.kind}s"):
                _enter(registry, entry)
    except BaseException:
        _loaded.clear()
        raise


def _import(named: str) -> None:
    try:
        if not named.endswith(".py"):
            importlib.import_module(named)
            return
        path = Path(named).absolute()
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None  # of every .py file
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module  # for pickles of its classes
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{PLUGINS}: {named} cannot be imported: {type(error).__name__}: {error}") from error


def _enter(registry: Registry[Any], entry: importlib.metadata.EntryPoint) -> None:
    try:
        registry.register(entry.load())
    except Exception as error:
        package = entry.dist.name if entry.dist is not None else "?"
        said = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        raise UserError(f"package {package}: the {registry.kind} {entry.name} cannot be loaded: {said}") from error


def _full_name(thing: Any) -> str:
    if inspect.ismodule(thing):
        return thing.__name__
    kind = thing if isinstance(thing, type) else type(thing)
    return f"{kind.__module__}.{kind.__qualname__}"
