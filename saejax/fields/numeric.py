"""Checks of config numbers: finite, whole where they count, within the range of a device's integers.

Each config class calls `check` first in its `__post_init__`. So values from a command line, YAML and Python obey the
same rule, and later code compares plain numbers, never NaN. No field accepts infinity; null means "no limit".
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import types
import typing
from collections.abc import Collection, Iterable
from typing import Any

from saejax.errors import UserError

LARGEST = 2**31 - 1
"""Of a whole number: steps, sizes and places in arrays are int32 on every device."""
LARGEST_TOKENS = 2**63 - 1
"""Of fields named `..._tokens`, which are counted on the host."""
LARGEST_SEED = 2**32 - 1
"""Of fields named `seed` or `..._seed`: JAX makes a key of 32 bits, so a larger one would repeat another's draws."""
SMALLEST_FLOAT, LARGEST_FLOAT = 2.0**-126, (2 - 2.0**-23) * 2.0**127
"""Magnitudes that float32 tells from 0 and from infinity."""


@dataclasses.dataclass(frozen=True)
class _Kind:
    """Kind of a field: one number or several, of which type, and whether it may be null."""

    number: type
    many: bool
    optional: bool


def check(config: Any, prefix: str = "", *, on_host: Collection[str] = ()) -> None:
    """Refuse what no number field may hold; numbers of NumPy become Python's, lists of them tuples.

    Args:
      config: instance of a config dataclass. Annotations define a field's kind: int, float, either or null, or a tuple
        of them. Fields of other types are ignored. The name says how large it may be: see the constants.
      prefix: of the keys, for the message: "optim." and the like.
      on_host: fields that no device counts with: they may be as large as tokens may.

    Raises:
      UserError: NaN, an infinity, a truth value, a text, a number out of range; with the key, the value and the rule.

    Examples:
      >>> @dataclasses.dataclass(frozen=True)
      ... class Rate:
      ...     lr: float
      ...     def __post_init__(self):
      ...         check(self, "optim.")
      >>> Rate(lr=float("nan"))
      Traceback (most recent call last):
      saejax.errors.UserError: optim.lr must be a finite number, got nan
    """
    for name, kind in _kinds(type(config)).items():
        value = vars(config).get(name)
        if value is None and kind.optional:
            continue
        key, range_of = prefix + name, "_tokens" if name in on_host else name
        if not kind.many:
            object.__setattr__(config, name, _number(key, value, kind.number, range_of))
            continue
        if isinstance(value, str) or not isinstance(value, Iterable):
            raise UserError(f"{key} must be a list of numbers, got {_shown(value)}")
        object.__setattr__(config, name, tuple(_number(key, item, kind.number, range_of) for item in value))


def seed(value: Any, name: str = "seed") -> int:
    """A seed from outside a config, as an int.

    Raises:
      UserError: it is no whole number in [0, 2^32).
    """
    return _number(name, value, int, "seed")


def number(value: Any, name: str) -> float:
    """A number from outside a config, as Python's.

    Raises:
      UserError: it is none, not finite, or none that float32 holds.
    """
    return _number(name, value, float, "")


def count(value: Any, name: str) -> int:
    """A count from outside a config, as an int.

    Raises:
      UserError: it is no whole number in [1, 2^31).
    """
    found = _number(name, value, int, "")
    if found < 1:
        raise UserError(f"{name} must be at least 1, got {found}")
    return found


@functools.cache
def _kinds(cls: type) -> dict[str, _Kind]:
    """The number fields of a config class."""
    hints = typing.get_type_hints(cls)
    kinds = {field.name: _kind(hints[field.name]) for field in dataclasses.fields(cls)}
    found = [(name, kind) for name, kind in kinds.items() if kind is not None]
    return dict(sorted(found, key=lambda pair: not pair[1].many))  # lists first: presets take numbers from their sums


def _kind(hint: Any) -> _Kind | None:
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    optional, options = type(None) in options, [option for option in options if option is not type(None)]
    many = len(options) == 1 and typing.get_origin(options[0]) in (tuple, list)
    held = {arg for arg in typing.get_args(options[0]) if arg is not Ellipsis} if many else set(options)
    if not held or held - {int, float}:
        return None
    return _Kind(float if float in held else int, many, optional)


def _number(key: str, value: Any, kind: type, range_of: str) -> Any:
    """A value as a Python number of its kind, in the range of a field's name; an int may stand for a float."""
    whole = int(value) if isinstance(value, numbers.Integral) and not isinstance(value, bool) else None
    if kind is int:
        low, high = _range(range_of)
        if whole is None:
            raise UserError(f"{key} must be a whole number, got {_shown(value)}")
        if not low <= whole <= high:
            limit = f"at most {high}" if whole > high else f"at least {low}"
            raise UserError(f"{key} must be {limit}, got {_shown(value)}")
        return whole
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise UserError(f"{key} must be a number, got {_shown(value)}")
    try:
        size = abs(float(value))
    except OverflowError:  # a whole number beyond float64
        size = math.inf
    if not math.isfinite(size):
        raise UserError(f"{key} must be a finite number, got {_shown(value)}")
    if size > LARGEST_FLOAT or 0 < size < SMALLEST_FLOAT:
        limits = f"{SMALLEST_FLOAT:.2g} to {LARGEST_FLOAT:.2g}"
        raise UserError(f"{key} must be 0 or of a magnitude that float32 holds, {limits}, got {_shown(value)}")
    return float(value) if whole is None else whole


def _range(name: str) -> tuple[int, int]:
    """The whole numbers that a field may hold by its name; what else it demands of them, it says itself."""
    if name == "seed" or name.endswith("_seed"):
        return 0, LARGEST_SEED
    return (-LARGEST_TOKENS, LARGEST_TOKENS) if name.endswith("_tokens") else (-LARGEST, LARGEST)


def _shown(value: Any) -> str:
    """A value in a message: numbers as they are, everything else as Python writes it, not at length."""
    text = str(value) if isinstance(value, numbers.Number) else repr(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"
