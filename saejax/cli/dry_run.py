"""`saejax train --dry-run`: the memory of a run on each device, without allocating any.

Sizes follow from shapes and shardings, on any mesh, even one whose devices do not exist here. If the mesh exists, the
compiler gives the step's temporaries; otherwise the output calls them an estimate.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from saejax import config
from saejax.activations.language_model import live
from saejax.activations.store import files as store_format
from saejax.errors import UserError
from saejax.parallel import sharding
from saejax.runs import run
from saejax.sae import base
from saejax.training import ensemble_config, memory

DRY_RUN, DEVICE_MEMORY = "--dry-run", "--device-memory-gib="


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes per device of a run.

    Attributes:
      mesh: devices along each axis.
      here: whether this machine has that mesh.
      parts: what the bytes are for, in the order in which they are printed.
      limit: bytes that a device has, None where that is not known.
    """

    mesh: dict[str, int]
    here: bool
    parts: dict[str, int]
    limit: int | None

    @property
    def total(self) -> int:
        """Bytes that a device must have."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        axes = " x ".join(f"{name}={size}" for name, size in self.mesh.items())
        where = "here" if self.here else "devices that are not here; sizes from shapes"
        lines = [f"memory per device on mesh {axes} ({where})"]
        width = max(map(len, self.parts))
        lines += [f"  {name:<{width}}  {_size(size):>12}" for name, size in self.parts.items()]
        lines += [f"  {'in all':<{width}}  {_size(self.total):>12}"]
        if self.limit is None:
            return "\n".join([*lines, "how much a device has is not known: give --device-memory-gib"])
        verdict = "fits in" if self.total <= self.limit else "DOES NOT FIT in"
        return "\n".join([*lines, f"it {verdict} the {_size(self.limit)} of a device"])


def of_arguments(arguments: list[str]) -> Plan:
    """The plan that a command line asks for.

    Args:
      arguments: overrides of one run, with --dry-run and perhaps --device-memory-gib=N.

    Raises:
      UserError: another flag, or a configuration that cannot be.
    """
    given = [a.removeprefix(DEVICE_MEMORY) for a in arguments if a.startswith(DEVICE_MEMORY)]
    overrides = [a for a in arguments if a != DRY_RUN and not a.startswith(DEVICE_MEMORY)]
    if wrong := [a for a in overrides if a.startswith("-") or "=" not in a or a.startswith("resume=")]:
        raise UserError(f"{DRY_RUN} takes key=value overrides of one run and {DEVICE_MEMORY}N only, got {wrong[0]}")
    if given and not given[-1].replace(".", "", 1).isdigit():
        raise UserError(f"{DEVICE_MEMORY}N must be a number of GiB, got {given[-1]}")
    cfg = config.load("train", config.Config, overrides)
    return make(cfg, round(float(given[-1]) * 2**30) if given else None)


def make(cfg: config.Config, limit: int | None = None) -> Plan:
    """Memory of a run on each device; allocates and writes nothing.

    Args:
      cfg: the run, or an ensemble.
      limit: bytes of a device; None takes those of this machine's, where the mesh exists here.
    """
    mesh, here = _mesh(cfg)
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
    found = memory.analysed(learner.step, wanted, lanes, mesh)[2] if here and not members else None
    if found is None:
        parts["temporaries (estimate)"] = copies * temporaries(one.sae, one.train.batch, dict(mesh.shape))
    else:
        parts["temporaries (compiler)"] = found
    return Plan(dict(mesh.shape), here, parts, memory.limit_bytes() if limit is None and here else limit)


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
    names = (sharding.ENSEMBLE,) * (n_ensemble > 1) + (sharding.DATA, sharding.LATENT)
    sizes = (n_ensemble,) * (n_ensemble > 1) + (n_data or 1, n_latent)
    return AbstractMesh(sizes, names, axis_types=(AxisType.Auto,) * len(names)), False


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
