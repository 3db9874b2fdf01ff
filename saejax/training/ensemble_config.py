"""Ensemble config: lists of values for a few knobs, combined into one config per member.

A knob changes no shape and nothing of the data, so members share batches and one compiled step.
"""

from __future__ import annotations

import dataclasses
import enum
import itertools
from pathlib import Path
from typing import Any, TypeVar

from saejax.errors import UserError
from saejax.fields import numeric
from saejax.fields.resume_policy import Fixed, Place
from saejax.sae import base
from saejax.training.settings import OnNonfinite

_Config = TypeVar("_Config")

LISTS = ("seed", "lr", "k", "l1_coef", "l0_coef")
"""Knobs of which `EnsembleConfig` takes lists; a folded sweep may vary any knob of its architecture."""


def places(sparsifier: base.Sparsifier) -> dict[str, tuple[str, str]]:
    """The part of the root config and its field that hold each knob: seed, lr and those of the architecture.

    Examples:
      >>> from saejax.sae.l1 import L1
      >>> places(L1(d_in=8, d_sae=32))
      {'seed': ('', 'seed'), 'lr': ('optim', 'lr'), 'l1_coef': ('sae', 'l1_coef')}
    """
    return {"seed": ("", "seed"), "lr": ("optim", "lr")} | {name: ("sae", name) for name in sparsifier.knobs}


class Combine(enum.Enum):
    """Combination of lists into members."""

    grid = "grid"
    """Every value with every other."""
    zip = "zip"
    """The first values, the second values, ...; the lists are equally long."""


class Form(enum.Enum):
    """Arrangement of members in the compiled step."""

    auto = "auto"
    """`loop` on CPUs; on accelerators, and with mesh.ensemble above 1, `vmap` where it can be."""
    loop = "loop"
    """One after the other, each exactly as in a run of its own."""
    vmap = "vmap"
    """Stacked: one product for all, their k masked up to the largest; one form of products for all members."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EnsembleConfig:
    """Many SAEs in one compiled step on one stream of batches; all lists empty is one SAE."""

    seed: Fixed[tuple[int, ...]] = ()
    """Values of seed: fixes the parameters of a member; the data are those of data_seed (null: of the root's seed)."""
    lr: Fixed[tuple[float, ...]] = ()
    """Values of optim.lr."""
    k: Fixed[tuple[int, ...]] = ()
    """Values of sae.k, where the architecture has it."""
    l1_coef: Fixed[tuple[float, ...]] = ()
    """Values of sae.l1_coef, where the architecture has it."""
    l0_coef: Fixed[tuple[float, ...]] = ()
    """Values of sae.l0_coef, where the architecture has it."""
    combine: Fixed[Combine] = Combine.grid
    """grid (every value with every other) or zip (first with first; lists of one length)."""
    form: Place[Form] = Form.auto
    """auto, loop (one after the other: CPUs) or vmap (stacked: accelerators)."""

    def __post_init__(self) -> None:
        numeric.check(self, "ensemble.")
        for name in LISTS:
            object.__setattr__(self, name, tuple(getattr(self, name)))  # a YAML list arrives as a list
            values = getattr(self, name)
            if len(set(values)) < len(values) and self.combine is Combine.grid:
                raise UserError(f"ensemble.{name} must not repeat a value, got {list(values)}")
        lengths = {len(values) for values in self.varied.values()}
        if self.combine is Combine.zip and len(lengths) > 1:
            said = ", ".join(f"{name} has {len(values)}" for name, values in self.varied.items())
            raise UserError(f"ensemble.combine=zip needs lists of one length: {said}")
        names = [name_of(point) for point in self.points]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(f"ensemble: two members are {twice[0]}")

    @property
    def varied(self) -> dict[str, tuple[Any, ...]]:
        """The knobs that were given values."""
        return {name: getattr(self, name) for name in LISTS if getattr(self, name)}

    @property
    def points(self) -> list[dict[str, Any]]:
        """The knobs of every member; none where this is no ensemble.

        Examples:
          >>> EnsembleConfig(k=(8, 16), seed=(0, 1)).points[1]
          {'seed': 0, 'k': 16}
        """
        if not self.varied:
            return []
        combined = itertools.product(*self.varied.values()) if self.combine is Combine.grid else zip(
            *self.varied.values(), strict=True
        )  # fmt: skip
        return [dict(zip(self.varied, values, strict=True)) for values in combined]


def name_of(point: dict[str, Any]) -> str:
    """The directory of a member.

    Examples:
      >>> name_of({"seed": 1, "lr": 3e-4, "k": 16})
      'seed1_lr0.0003_k16'
    """
    return "_".join(f"{name}{value}" for name, value in point.items())


def knobs(config: Any) -> dict[str, Any]:
    """The values that a root config has for the knobs that it has.

    Args:
      config: a `saejax.config.Config`.
    """
    held = places(config.sae).items()
    return {name: getattr(getattr(config, part) if part else config, field) for name, (part, field) in held}


def with_knobs(config: _Config, point: dict[str, Any]) -> _Config:
    """A root config with other knobs.

    Args:
      config: a `saejax.config.Config`.
      point: knob -> value.

    Raises:
      UserError: the architecture has no such field, or it refuses the value.
    """
    made: Any = config
    for name, value in point.items():
        part, field = places(made.sae).get(name, (None, name))
        if part is None:
            known = f"; it has {', '.join(made.sae.knobs)}" if made.sae.knobs else ""
            raise UserError(
                f"ensemble.{name} must be empty: sae={made.sae.name} has no knob {field}{known}, got {value}"
            )
        held = getattr(made, part) if part else made
        changed = dataclasses.replace(held, **{field: value})
        made = dataclasses.replace(made, **{part: changed}) if part else changed
    return made


def members(config: _Config) -> dict[str, _Config]:
    """Config of every member by its name; a separate run with it becomes the same SAE.

    Args:
      config: a `saejax.config.Config`.

    Raises:
      UserError: a member that cannot be.
    """
    root: Any = config
    if not root.ensemble.points:
        return {}
    mesh = dataclasses.replace(root.mesh, ensemble=1)
    plain = dataclasses.replace(root, ensemble=EnsembleConfig(), data_seed=root.stream_seed, mesh=mesh)
    return {name_of(point): with_knobs(plain, point) for point in root.ensemble.points}


def dirs(config: _Config, run_dir: Path) -> dict[Path, _Config]:
    """The run directory of every member of an ensemble, and its config."""
    return {run_dir / "members" / name: member for name, member in members(config).items()}


def why_not_stacked(sparsifier: base.Sparsifier, varied: set[str]) -> str | None:
    """Reason why members cannot be stacked; None where they can.

    Args:
      sparsifier: architecture of any member.
      varied: knobs in which members differ.
    """
    return next(filter(None, map(sparsifier.why_static, sorted(varied))), None)


def check(config: Any) -> None:
    """Refuse an ensemble that cannot be, before any device work.

    Args:
      config: a `saejax.config.Config`.

    Raises:
      UserError: naming the field, its value and what is allowed.
    """
    ensemble, n_axis = config.ensemble, config.mesh.ensemble
    made = members(config)
    if n_axis > 1 and len(made) % n_axis:
        raise UserError(f"mesh.ensemble must divide the number of members, {len(made)}, got {n_axis}")
    if n_axis > 1 and not made:
        raise UserError(f"mesh.ensemble must be 1 without an ensemble, got {n_axis}")
    if made and config.train.on_nonfinite is not OnNonfinite.stop:
        raise UserError("train.on_nonfinite must be stop with an ensemble: one member is left out, the others continue")
    if n_axis > 1 and ensemble.form is Form.loop:
        raise UserError(f"ensemble.form must be vmap or auto with mesh.ensemble={n_axis}, got loop")
    why = why_not_stacked(config.sae, set(ensemble.varied))
    if why and (n_axis > 1 or ensemble.form is Form.vmap):
        raise UserError(f"ensemble.form=vmap and mesh.ensemble are not for this ensemble ({why}): take form=loop")


def resolved(form: Form, sparsifier: base.Sparsifier, varied: set[str], *, n_axis: int, platform: str) -> Form:
    """`form` with auto resolved.

    Args:
      form: as in the config.
      sparsifier: architecture of any member.
      varied: knobs in which members differ.
      n_axis: devices along the mesh axis of members.
      platform: of the devices, "cpu" or another.
    """
    if form is not Form.auto:
        return form
    stacked = n_axis > 1 or platform != "cpu" and why_not_stacked(sparsifier, varied) is None
    return Form.vmap if stacked else Form.loop
