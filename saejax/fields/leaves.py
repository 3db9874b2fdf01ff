"""Latent axes of the arrays that architectures add, by name: `sae` declares them, `parallel` places arrays by them."""

from __future__ import annotations

from collections.abc import Mapping

from saejax.errors import UserError

LATENT_AXIS: dict[str, int | None] = {}
"""Name of an array -> the axis with one entry per latent; None where it has no such axis, or is a number."""

TAKEN = ("W_enc", "b_enc", "W_dec", "b_dec", "tokens_since_fired", "rows")
"""Names of arrays that every training has; `parallel.sharding.SPECS` places them."""

_declared: dict[str, dict[str, int | None]] = {}
"""Full name of a class -> its arrays."""


def declare(owner: str, axes: Mapping[str, int | None]) -> None:
    """Enter the arrays of a class with their axis, in place of those that it had before.

    Args:
      owner: full name of the class.
      axes: name -> axis of the latents, counted from 0, or None.

    Raises:
      UserError: a name that is taken; no axis; another class has an array of that name with another axis.
    """
    others = {name: axis for who, held in _declared.items() if who != owner for name, axis in held.items()}
    for name, axis in axes.items():
        if name in TAKEN:
            raise UserError(f"{owner}: leaf {name} must have a name other than {', '.join(TAKEN)}")
        if axis is not None and (type(axis) is not int or axis < 0):
            raise UserError(f"{owner}: leaf {name} must have an axis of at least 0, or None, got {axis!r}")
        if others.get(name, axis) != axis:
            raise UserError(
                f"{owner}: leaf {name} must have its latents along axis {others[name]}, as elsewhere, got {axis}"
            )
    _declared[owner] = dict(axes)
    LATENT_AXIS.clear()
    LATENT_AXIS.update(others | _declared[owner])
