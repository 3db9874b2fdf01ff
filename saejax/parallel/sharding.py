"""Mesh and placement of arrays: one rule from a leaf's name to its `PartitionSpec`.

Training, evaluation and the activation side read it, and it knows none of them. The mesh has two axes: `data` splits
rows, `latent` splits the latents of one SAE; either may be 1. A third axis, `ensemble`, exists only above size 1 and
splits SAEs that train together.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from saejax.errors import UserError
from saejax.fields import leaves, numeric
from saejax.fields.resume_policy import Place
from saejax.parallel import processes

logger = logging.getLogger(__name__)

DATA = "data"
LATENT = "latent"
ENSEMBLE = "ensemble"

# The last name on a leaf's path decides; optimiser moments end in the same names as the parameters they belong to.
# What one architecture adds (`SAEParams.extra`) it declares itself: `fields.leaves`.
SPECS: dict[str, P] = {
    "W_enc": P(None, LATENT),
    "b_enc": P(LATENT),
    "W_dec": P(LATENT, None),
    "b_dec": P(),
    "tokens_since_fired": P(LATENT),
    "rows": P(DATA),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Layout of the devices. The product of both numbers is the number of devices used."""

    data: Place[int | None] = None
    """Devices over which rows are split. null takes every device that `latent` leaves."""
    latent: Place[int] = 1
    """Devices over which the latents are split, for SAEs too wide for one device."""
    distributed: Place[processes.Distributed] = processes.Distributed.none
    """Where this process gets its number: none for a single process; auto, slurm, kubernetes, tpu or manual for
    several. The mesh then spans all their devices."""
    coordinator: Place[str | None] = None
    """host:port of process 0; null takes JAX_COORDINATOR_ADDRESS, or what the scheduler says."""
    num_processes: Place[int | None] = None
    """How many processes there are; null takes JAX_NUM_PROCESSES, or what the scheduler says."""
    process_id: Place[int | None] = None
    """Number of this process, from 0; null takes JAX_PROCESS_ID, or what the scheduler says."""
    timeout_seconds: Place[int] = 300
    """How long the processes wait for one another at the start (seconds, at least 1)."""
    dead_after_seconds: Place[int] = 100
    """Silence after which a process counts as dead and all others end (seconds, at least 10)."""
    ensemble: Place[int] = 1
    """Devices over which the members of an ensemble are split; a divisor of their number."""

    def __post_init__(self) -> None:
        numeric.check(self, "mesh.")
        for name in ("data", "latent", "ensemble", "num_processes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"mesh.{name} must be at least 1, got {value}")
        if self.process_id is not None and not 0 <= self.process_id < (self.num_processes or numeric.LARGEST):
            below = "" if self.num_processes is None else f"={self.num_processes}"
            raise UserError(f"mesh.process_id must be in [0, mesh.num_processes{below}), got {self.process_id}")
        for name, least in (("timeout_seconds", 1), ("dead_after_seconds", 10)):
            if getattr(self, name) < least:
                raise UserError(f"mesh.{name} must be at least {least}, got {getattr(self, name)}")

    def place(self) -> processes.Place | None:
        """Place of this process, None for a single process."""
        given = {name: getattr(self, name) for name in ("coordinator", "num_processes", "process_id")}
        return processes.place(self.distributed, **given)

    def start(self) -> None:
        """Join the other processes of the run, where there are any; before any array exists. Safe to repeat."""
        times = {"timeout_seconds": self.timeout_seconds, "dead_after_seconds": self.dead_after_seconds}
        processes.start(self.place(), **times)

    def apart(self) -> tuple[int, int]:
        """(number of this process, how many there are), for work in which none needs another: nothing is joined."""
        at = self.place()
        if at is None or at.process_id is None or at.n_processes is None:
            self.start()
            return jax.process_index(), jax.process_count()
        if at.local_devices is not None:
            jax.config.update("jax_cuda_visible_devices", ",".join(map(str, at.local_devices)))
        return at.process_id, at.n_processes

    def anywhere(self) -> MeshConfig:
        """The same without what belongs to one process and one start, as a run directory keeps it."""
        return dataclasses.replace(self, coordinator=None, num_processes=None, process_id=None)

    def shape(self, n_devices: int, n_lanes: int | None = None) -> tuple[int, int]:
        """Sizes of the two axes on a machine.

        Args:
          n_devices: devices that JAX sees, over all processes; `ensemble` divides them among its members.
          n_lanes: lanes of the data stream; `data: null` then takes the largest divisor of it that fits.

        Returns:
          (data, latent).

        Raises:
          UserError: the mesh needs more devices than there are.

        Examples:
          >>> MeshConfig(latent=2).shape(8), MeshConfig().shape(6, n_lanes=8)
          ((4, 2), (4, 1))
        """
        wanted = (self.data or 1) * self.latent * self.ensemble
        if wanted > n_devices:
            times = f" x mesh.ensemble={self.ensemble}" if self.ensemble > 1 else ""
            raise UserError(
                f"mesh.data={'null' if self.data is None else self.data} x mesh.latent={self.latent}{times} needs "
                f"{wanted} devices, this machine has {n_devices}"
            )
        n_devices //= self.ensemble
        if self.data is not None:
            return self.data, self.latent
        most = n_devices // self.latent
        n_data = most if n_lanes is None else max(n for n in range(1, most + 1) if n_lanes % n == 0)
        if n_data * self.latent < n_devices:
            logger.warning("using %d of %d devices: mesh.data=%d", n_data * self.latent, n_devices, n_data)
        return n_data, self.latent


def make_mesh(n_data: int = 1, n_latent: int = 1, devices: Sequence[Any] | None = None, *, n_ensemble: int = 1) -> Mesh:
    """The mesh of a run, with axes `data` and `latent`, and before them `ensemble` where that is above 1.

    Args:
      n_data: devices along `data`.
      n_latent: devices along `latent`.
      devices: taken in order; by default the first n_data x n_latent x n_ensemble of `jax.devices()`.
      n_ensemble: devices along `ensemble`.

    Returns:
      A mesh whose axes XLA propagates by itself (`AxisType.Auto`).
    """
    n_all = n_data * n_latent * n_ensemble
    chosen = list(jax.devices() if devices is None else devices)[:n_all]
    if len(chosen) < n_all:
        raise UserError(f"mesh.data={n_data} x mesh.latent={n_latent} needs more than the {len(chosen)} devices here")
    idle = {device.process_index for device in jax.devices()} - {device.process_index for device in chosen}
    if devices is None and idle:
        raise UserError(
            f"a mesh of {n_all} of {jax.device_count()} devices leaves process {min(idle)} without a device: "
            "raise mesh.data (a divisor of train.n_lanes), or start fewer processes"
        )
    if n_ensemble > 1:
        grid = np.asarray(chosen).reshape(n_ensemble, n_data, n_latent)
        return Mesh(grid, (ENSEMBLE, DATA, LATENT), axis_types=(AxisType.Auto,) * 3)
    grid = np.asarray(chosen).reshape(n_data, n_latent)
    return Mesh(grid, (DATA, LATENT), axis_types=(AxisType.Auto,) * 2)


def spec_of(path: Sequence[Any]) -> P:
    """The `PartitionSpec` of a leaf, from the last known name on its tree path; replicated where none is known.

    Raises:
      UserError: an array of `SAEParams.extra` that no architecture declares.
    """
    names = [getattr(entry, "name", None) or getattr(entry, "key", None) for entry in path]
    for name in reversed(names):
        if name in SPECS:
            return SPECS[name]
        if name in leaves.LATENT_AXIS:
            axis = leaves.LATENT_AXIS[name]
            return P() if axis is None else P(*[None] * axis, LATENT)
    if "extra" in names[:-1]:
        raise UserError(f"leaf {names[-1]} has no placement: name it in the `leaves` of its architecture")
    return P()


def latent_axis(path: Sequence[Any], leaf: Any) -> int | None:
    """The axis of a leaf along which its latents lie, by the same rule; None where it has none."""
    spec = spec_of(path)
    return list(spec).index(LATENT) if LATENT in spec and len(spec) <= leaf.ndim else None


def tree_shardings(mesh: Mesh, tree: Any) -> Any:
    """A `NamedSharding` for every leaf of a state.

    Args:
      mesh: as from `make_mesh`.
      tree: arrays or `jax.ShapeDtypeStruct`s, any nesting. An axis that a leaf's shape cannot fill is replicated.

    Returns:
      The same tree with a sharding at each leaf.
    """

    def leaf_sharding(path: Sequence[Any], leaf: Any) -> NamedSharding:
        spec = spec_of(path)
        return NamedSharding(mesh, spec if len(spec) <= len(leaf.shape) else P())

    return jax.tree_util.tree_map_with_path(leaf_sharding, tree)


def placed(mesh: Mesh, tree: Any) -> Any:
    """The arrays of a tree where the rule wants them; copies that every process holds become one array of all."""

    def put(leaf: Any, where: NamedSharding) -> jax.Array:
        if where.is_fully_addressable or not getattr(leaf, "is_fully_addressable", True):
            return jax.device_put(leaf, where)
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(whole.shape, where, lambda index: whole[index])

    return jax.tree.map(put, tree, tree_shardings(mesh, tree))


def check_divides(mesh: Mesh, *, n_lanes: int, d_sae: int) -> None:
    """Refuse sizes that a mesh cannot split evenly, before any device work.

    Args:
      mesh: as from `make_mesh`.
      n_lanes: lanes of the data stream.
      d_sae: latents.

    Raises:
      UserError: naming the field, its value and what divides.
    """
    if n_lanes % mesh.shape[DATA]:
        raise UserError(f"mesh.data must divide train.n_lanes={n_lanes}, got {mesh.shape[DATA]}")
    if d_sae % mesh.shape[LATENT]:
        raise UserError(f"mesh.latent must divide sae.d_sae={d_sae}, got {mesh.shape[LATENT]}")
