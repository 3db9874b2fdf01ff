"""`saejax train --dry-run`: memory of a run per device; with `target=`, its program on chips that are not here.

Sizes follow from shapes and shardings, on any mesh, even one whose devices do not exist here. Where they exist, or
the compiler of the target is installed, the compiler says what the step needs besides; elsewhere an estimate does.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from saejax import config
from saejax.activations.language_model import live
from saejax.activations.store import files as store_format
from saejax.errors import UserError
from saejax.parallel import sharding, targets
from saejax.runs import run
from saejax.sae import base
from saejax.training import cost, ensemble, ensemble_config, memory, program

DRY_RUN, DEVICE_MEMORY, TARGET = "--dry-run", "--device-memory-gib=", "target="


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes per device of a run, and for a target its collectives and modelled time.

    Attributes:
      mesh: devices along each axis.
      where: what the figures are of.
      parts: what the bytes are for, in the order in which they are printed.
      limit: bytes that a device has, None where that is not known.
      exchanged: collectives of a step.
      time: modelled, None without a target.
      more: lines about the program.
    """

    mesh: dict[str, int]
    where: str
    parts: dict[str, int]
    limit: int | None
    exchanged: tuple[program.Collective, ...] = ()
    time: cost.Time | None = None
    more: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """Bytes that a device must have."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        axes = " x ".join(f"{name}={size}" for name, size in self.mesh.items())
        lines = [f"memory per device on mesh {axes} ({self.where})"]
        width = max(map(len, self.parts))
        lines += [f"  {name:<{width}}  {_size(size):>12}" for name, size in self.parts.items()]
        lines += [f"  {'in all':<{width}}  {_size(self.total):>12}"]
        if self.limit is None:
            lines += ["how much a device has is not known: give --device-memory-gib"]
        else:
            verdict = "fits in" if self.total <= self.limit else "DOES NOT FIT in"
            lines += [f"it {verdict} the {_size(self.limit)} of a device"]
        sums = collections.Counter()
        for one in self.exchanged:
            when = " while latents are dead" if one.of_aux_k else ""
            sums[f"{one.kind} over {' and '.join(one.axes) or 'one device'}{when}"] += one.n_bytes
        if sums:
            lines += ["exchanged per step and device", *(f"  {name:<40} {_size(n):>12}" for name, n in sums.items())]
        return "\n".join([*lines, *(self.time.lines() if self.time else ()), *self.more])


def of_arguments(arguments: list[str]) -> Plan:
    """The plan that a command line asks for.

    Args:
      arguments: overrides of one run, with --dry-run, and perhaps --device-memory-gib=N and target=CHIPS.

    Raises:
      UserError: another flag, or a configuration that cannot be.
    """
    given = [a.removeprefix(DEVICE_MEMORY) for a in arguments if a.startswith(DEVICE_MEMORY)]
    named = [a.removeprefix(TARGET) for a in arguments if a.startswith(TARGET)]
    overrides = [a for a in arguments if a != DRY_RUN and not a.startswith((DEVICE_MEMORY, TARGET))]
    if wrong := [a for a in overrides if a.startswith("-") or "=" not in a or a.startswith("resume=")]:
        raise UserError(f"{DRY_RUN} takes key=value overrides of one run and {DEVICE_MEMORY}N only, got {wrong[0]}")
    if given and not given[-1].replace(".", "", 1).isdigit():
        raise UserError(f"{DEVICE_MEMORY}N must be a number of GiB, got {given[-1]}")
    target = targets.parse(named[-1]) if named else None
    if target is not None:
        jax.config.update("jax_platforms", "cpu")  # nothing runs here, and libtpu would look for a TPU
    cfg = config.load("train", config.Config, overrides)
    return make(cfg, round(float(given[-1]) * 2**30) if given else None, target)


def make(cfg: config.Config, limit: int | None = None, target: targets.Target | None = None) -> Plan:
    """What a run takes on each device; nothing is allocated and nothing written.

    Args:
      cfg: the run, or an ensemble.
      limit: bytes of a device; None takes those of the target, or of this machine's where the mesh exists here.
      target: chips to plan for; None plans for the devices here.
    """
    mesh, compiles = _mesh(cfg) if target is None else _mesh_of(cfg, target)
    members = list(ensemble_config.members(cfg).values())
    one = members[0] if members else cfg
    copies = max(1, len(members)) // cfg.mesh.ensemble
    learner = run.learner(one)
    rows = run.filling(one, np.empty(0, _row_dtype(one)))
    wanted = learner.abstract(rows, mesh)
    lanes = NamedSharding(mesh, P(sharding.DATA))
    parts = {
        "parameters": copies * _bytes(wanted.params),
        "average": copies * _bytes(wanted.average),
        f"moments ({one.optim.name.name})": copies * _bytes(wanted.opt_state),
        "liveness, normaliser": copies * _bytes((wanted.liveness, wanted.normalizer)),
        "buffer": _bytes(wanted.buffer),
        "batches, this and the next": 2 * _bytes(memory.record(wanted, lanes)),
    }
    parts = {name: size for name, size in parts.items() if size}
    sizes = dict(mesh.shape)
    found = _compiled(cfg, members, wanted, lanes, mesh, target) if compiles else None
    if found is None:
        parts["temporaries (estimate)"] = copies * temporaries(one.sae, one.train.batch, sizes)
    else:
        parts["temporaries (compiler)"] = found.temporaries
    if target is None:
        where = "here" if compiles else "devices that are not here; sizes from shapes"
        return Plan(sizes, where, parts, memory.limit_bytes() if limit is None and compiles else limit)
    how = "compiled" if found else f"sizes from shapes; with saejax[{target.package}] the compiler says"
    exchanged = found.exchanged if found and found.exchanged else tuple(cost.exchanges(one.sae, one.train.batch, sizes))
    time = cost.of(one.sae, one.train.batch, sizes, target.chip, exchanged, members=copies)
    more = [*(found.lines if found else ()), *_better(cfg, target, sizes)]
    return Plan(sizes, f"{target}, {how}", parts, limit or target.chip.memory, exchanged, time, tuple(more))


@dataclasses.dataclass(frozen=True)
class _Compiled:
    """What the compiler says of a step."""

    temporaries: int
    exchanged: tuple[program.Collective, ...] = ()
    lines: tuple[str, ...] = ()


def _compiled(
    cfg: config.Config, members: list[config.Config], wanted: Any, lanes: Any, mesh: Any, target: targets.Target | None
) -> _Compiled | None:
    """The step, compiled for a mesh; None for ensembles on devices that are here, which `ensembles` compiles itself."""
    if members and target is None:
        return None
    step, state = run.learner(members[0] if members else cfg).step, wanted
    if members:
        learners = [run.learner(one) for one in members]
        varied, n_axis = set(cfg.ensemble.varied), cfg.mesh.ensemble
        platform = mesh.devices.flat[0].platform
        form = ensemble_config.resolved(cfg.ensemble.form, cfg.sae, varied, n_axis=n_axis, platform=platform)
        state = ensemble.Layout(wanted, len(members), form, mesh).abstract
        step = ensemble.make(learners, form, mesh)
    options = {} if target is None or target.chip.platform == "tpu" else {"xla_gpu_autotune_level": 0}
    try:
        compiled, _, found = memory.analysed(step, state, lanes, mesh, **options)
    except jax.errors.JaxRuntimeError as error:
        used = re.search(r"(?:Used |\()([\d.]+)G(?: of |\) exceeds available HBM \()([\d.]+)G", str(error))
        if target is None or used is None:
            raise
        said = f"the compiler refuses: temporaries of {used[1]} GiB, a device has {used[2]} GiB"
        return _Compiled(round(float(used[1]) * 2**30), (), (said,))
    if target is None:
        return None if found is None else _Compiled(found)
    text = compiled.as_text()
    code = compiled.memory_analysis().generated_code_size_in_bytes
    lines = [f"code {_size(code)}"]
    if target.chip.clock:
        seconds = program.cycles(text) / target.chip.clock
        lines += [
            f"the compiler estimates {1e3 * seconds:.2f} ms for fusions; it counts no top-k, gather, scatter or link"
        ]
    here = {axis: mesh.shape[axis] for axis in (sharding.DATA, sharding.LATENT)}
    n, rows = cfg.sae.d_sae // here["latent"], cfg.train.batch // here["data"]
    costly = program.costly(
        text,
        widths={n},
        weights={n * cfg.sae.d_in, n * cfg.sae.d_out},
        gathered={(rows, rows * (cfg.sae.n_active or 0) * width) for width in (cfg.sae.d_in, cfg.sae.d_out)},
    )
    lines += [f"costly operations: {', '.join(f'{name} {count}' for name, count in costly.items()) or 'none'}"]
    return _Compiled(found or 0, tuple(program.collectives(text, mesh)), tuple(lines))


def _mesh_of(cfg: config.Config, target: targets.Target) -> tuple[Any, bool]:
    """The mesh of a run on a target, and whether its compiler is here."""
    n_data, n_latent = cfg.mesh.shape(target.n_devices, n_lanes=cfg.train.n_lanes)
    n_ensemble = cfg.mesh.ensemble
    if target.compiles_here():
        return target.mesh(n_data, n_latent, n_ensemble), True
    return _abstract(n_data, n_latent, n_ensemble), False


def _better(cfg: config.Config, target: targets.Target, sizes: dict[str, int]) -> list[str]:
    """A line about the mesh that is modelled fastest among those that fit, where it is not this one."""
    if cfg.ensemble.points:
        return []
    found = cost.meshes(cfg.sae, cfg.train.batch, target.chip, target.n_devices, cfg.train.n_lanes)
    for (n_data, n_latent), time in found.items():
        params = jax.eval_shape(cfg.sae.init, jax.random.key(0))
        state = 3 * 4 * sum(leaf.size for leaf in jax.tree.leaves(params)) // n_latent
        mesh = {"data": n_data, "latent": n_latent}
        if state + temporaries(cfg.sae, cfg.train.batch, mesh) <= target.chip.memory:
            if (n_data, n_latent) == (sizes["data"], sizes["latent"]):
                return ["no other mesh of these chips is modelled faster"]
            return [f"modelled fastest: mesh.data={n_data} mesh.latent={n_latent}, {1e3 * time.seconds:.2f} ms"]
    return ["no mesh of these chips is estimated to fit: take more chips, a smaller sae.d_sae or train.batch"]


def temporaries(sparsifier: base.Sparsifier, batch: int, mesh: dict[str, int]) -> int:
    """Bytes per device that a step needs besides its state, about: what its largest arrays add up to.

    Gradients in float32; four float32 arrays of the size of the pre-activations [b, d_sae] (a dense code, or what top-k
    works on); eight arrays of rows [b, d]; the encoder's weights once more in bfloat16 products. On CPU the compiler's
    figures are 1.0 to 1.8 times this.

    Args:
      sparsifier: the architecture.
      batch: rows per step, over all devices.
      mesh: devices along `data` and `latent`.
    """
    params = jax.eval_shape(sparsifier.init, jax.random.key(0))
    here = 1 / mesh[sharding.LATENT]
    n_rows, n_latents = batch / mesh[sharding.DATA], sparsifier.d_sae * here
    gradients = 4 * sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) * here
    pre_acts = 4 * 4 * n_rows * n_latents
    rows = 8 * 4 * n_rows * (sparsifier.d_in + sparsifier.d_out)
    rounded = 2 * math.prod(params.W_enc.shape) * here if sparsifier.matmul_dtype.value == "bfloat16" else 0
    return round(gradients + pre_acts + rows + rounded)


def _mesh(cfg: config.Config) -> tuple[Any, bool]:
    """The mesh of a run, and whether its devices are here."""
    n_data, n_latent, n_ensemble = cfg.mesh.data, cfg.mesh.latent, cfg.mesh.ensemble
    if (n_data or 1) * n_latent * n_ensemble <= jax.device_count():
        shape = cfg.mesh.shape(jax.device_count(), n_lanes=cfg.train.n_lanes)
        return sharding.make_mesh(*shape, n_ensemble=n_ensemble), True
    return _abstract(n_data or 1, n_latent, n_ensemble), False


def _abstract(n_data: int, n_latent: int, n_ensemble: int) -> AbstractMesh:
    names = (sharding.ENSEMBLE,) * (n_ensemble > 1) + (sharding.DATA, sharding.LATENT)
    sizes = (n_ensemble,) * (n_ensemble > 1) + (n_data, n_latent)
    return AbstractMesh(sizes, names, axis_types=(AxisType.Auto,) * len(names))


def _row_dtype(cfg: config.Config) -> np.dtype:
    """The dtype of the source's rows, without running a language model."""
    if isinstance(cfg.source, live.Live):
        return store_format.numpy_dtype(cfg.source.dtype.value)
    return next(iter(cfg.source.heldout(1, 1)), np.empty(0, np.float32)).dtype


def _bytes(tree: Any) -> int:
    """Bytes of a tree of `jax.ShapeDtypeStruct` on one device."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:,.2f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:,.2f} MiB"
