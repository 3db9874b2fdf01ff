"""Typed fields of an untrusted model file, for `config.json` and GGUF metadata alike.

A missing value, a wrong type, a value that is not finite or out of range ends in one line. It names the file, the
field, its value and what is allowed. Nothing is converted: 32.0, "32" and true are not integers.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

from saejax.errors import UserError
from saejax.storage import json_yaml

T = TypeVar("T")

NEEDED: Any = object()
"""The default of a field that must be there."""
LARGEST = 2**31 - 1
"""Of whole numbers: sizes, counts and token ids are int32."""
FINITE = 1e30
"""Of other numbers: their squares and quotients are computed in float32."""

_SHORT = reprlib.Repr()
_SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong, _SHORT.maxlevel = 100, 100, 50, 3


def shown(value: object) -> str:
    """A value as a message quotes it: one line, cut short, however long or nested it is.

    >>> shown("32"), shown([[1] * 9])
    ("'32'", '[[1, 1, 1, 1, 1, 1, ...]]')
    """
    return json_yaml.one_line(_SHORT.repr(value))


def among(value: object, allowed: Collection[Any]) -> bool:
    """Whether a value is one of some; true and false are no numbers here.

    >>> among(1, (None, 1.0)), among(True, (None, 1.0))
    (True, False)
    """
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed)


class Fields:
    """A mapping that checks every value when it is read; null counts as absent.

    Args:
      where: the file, and the place in it, for messages.
      raw: what it says.
      hint: what a message about an absent field adds.
      prefix: what stands before every key that is asked for.
    """

    def __init__(self, where: str, raw: Mapping[str, Any], hint: str = "", prefix: str = "") -> None:
        self.where, self.raw, self.hint, self.prefix = where, raw, hint, prefix

    def get(self, key: str) -> Any:
        """A value of any type, None where there is none."""
        return self.raw.get(self.prefix + key)

    def integer(self, key: str, default: T = NEEDED, *, low: int = 1, high: int = LARGEST) -> int | T:
        """A whole number in [low, high]; true is none."""
        told = f"a whole number from {low} to {high}"
        return self._read(key, default, told, lambda value: type(value) is int and low <= value <= high)

    def number(self, key: str, default: T = NEEDED, *, zero: bool = False, high: float = FINITE) -> float | T:
        """A finite number in (0, high], or [0, high] where zero is allowed."""
        told = f"a number {'from' if zero else 'above'} 0, at most {high:g}"

        def fits(value: Any) -> bool:
            return type(value) in (int, float) and 0 <= value <= high and (zero or value != 0)

        found = self._read(key, default, told, fits)
        return float(found) if type(found) is int else found

    def flag(self, key: str, default: T = NEEDED) -> bool | T:
        """true or false."""
        return self._read(key, default, "true or false", lambda value: type(value) is bool)

    def choice(self, key: str, allowed: Collection[str], default: T = NEEDED) -> str | T:
        """One of some words."""
        told = ", ".join(allowed)
        return self._read(key, default, told, lambda value: isinstance(value, str) and value in allowed)

    def part(self, key: str, default: T = NEEDED) -> Fields | T:
        """A mapping inside this one."""
        found = self._read(key, default, "a mapping", lambda value: isinstance(value, Mapping))
        return found if found is default else Fields(f"{self.where}: {key}", found, self.hint)

    def array(self, key: str, kinds: tuple[type, ...], told: str, default: T = NEEDED) -> list[Any] | T:
        """A list of values of some types, `told` being their name."""
        fits = lambda value: isinstance(value, list) and all(type(item) in kinds for item in value)  # noqa: E731
        return self._read(key, default, f"a list of {told}", fits)

    def refuse(self, key: str, told: str) -> UserError:
        """Error about a value outside the allowed ones."""
        return UserError(f"{self.where}: {self.prefix}{key}={shown(self.get(key))} is not supported, allowed: {told}")

    def _read(self, key: str, default: Any, told: str, fits: Callable[[Any], bool]) -> Any:
        value = self.get(key)
        if value is None:
            if default is NEEDED:
                raise UserError(f"{self.where}: {self.prefix}{key} is missing{self.hint}, allowed: {told}")
            return default
        if not fits(value):
            raise self.refuse(key, told)
        return value
