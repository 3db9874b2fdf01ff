"""Resume policy of config fields: each field's type says whether it may change when a run continues.

    k: Fixed[int]                   another value makes another run: shapes, data, draws, the function computed
    lr: Free[float] = 1e-3          may change when the run continues; logged, and saved with the step
    path: Place[str]                where and how the work happens; no effect on the result

A field without a policy is fixed.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import typing
from typing import Annotated, Any, TypeVar


class Policy(enum.Enum):
    """Resume policy of a config field."""

    fixed = "fixed"
    free = "free"
    place = "place"


_T = TypeVar("_T")
Fixed = Annotated[_T, Policy.fixed]
Free = Annotated[_T, Policy.free]
Place = Annotated[_T, Policy.place]


@functools.cache
def of_class(cls: type) -> dict[str, Policy | None]:
    """The policy of each field of a config class, None where it says nothing."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: _said(hints[field.name]) for field in dataclasses.fields(cls)}


def of(config: Any, prefix: str = "") -> dict[str, Policy]:
    """The policy of every key of a config.

    Args:
      config: instance of a config dataclass; its fields may be dataclasses, whose own fields then count.
      prefix: of the keys.

    Returns:
      Flat key, as in `optim.lr`, -> policy. A group's `type`, which no field holds, is fixed.
    """
    found: dict[str, Policy] = {}
    if isinstance(getattr(type(config), "name", None), str):
        found[f"{prefix}type"] = Policy.fixed
    for name, policy in of_class(type(config)).items():
        value = vars(config).get(name)
        if dataclasses.is_dataclass(value):
            found |= of(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = policy or Policy.fixed
    return found


def _said(hint: Any) -> Policy | None:
    return next((m for m in getattr(hint, "__metadata__", ()) if isinstance(m, Policy)), None)
