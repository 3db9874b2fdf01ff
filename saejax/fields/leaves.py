"""Latent axes of the arrays that architectures add, by name: `sae` declares them, `parallel` places arrays by them."""

from __future__ import annotations

from collections.abc import Mapping

from saejax.errors import UserError

LATENT_AXIS: dict[str, int | None] = {}
"""Name of an array -> the axis with one entry per latent; None where it has no such axis, or is a number."""


def declare(axes: Mapping[str, int | None]) -> None:
    """Enter arrays with their axis.

    Raises:
      UserError: another architecture has an array of that name with another axis.
    """
    for name, axis in axes.items():
        if LATENT_AXIS.setdefault(name, axis) != axis:
            raise UserError(
                f"leaf {name} must have its latents along axis {LATENT_AXIS[name]}, as elsewhere, got {axis}"
            )
