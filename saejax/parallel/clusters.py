"""Number, count and coordinator of a run's processes, from the config, JAX_* variables or a scheduler."""

from __future__ import annotations

import dataclasses
import enum
import os
import re
from pathlib import Path

from saejax.errors import UserError
from saejax.parallel import rendezvous


class Distributed(enum.Enum):
    """Origin of a process's number."""

    none = "none"
    """Nobody: there is one process."""
    auto = "auto"
    """The first of slurm, kubernetes, tpu and manual whose environment is there; else one process."""
    slurm = "slurm"
    """`srun`, by its environment."""
    kubernetes = "kubernetes"
    """An indexed Job or a JobSet: JOB_COMPLETION_INDEX, JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES."""
    tpu = "tpu"
    """A TPU pod slice: JAX asks the machine."""
    manual = "manual"
    """The fields of this group, or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID."""


@dataclasses.dataclass(frozen=True)
class Place:
    """One process among those of a run.

    Attributes:
      how: who said so; never `none` or `auto`.
      process_id: its number, 0 is the coordinator; None where JAX finds out (`tpu`), as the other fields.
      n_processes: how many there are.
      coordinator: host:port of process 0.
      local_devices: numbers of this process's GPUs, None for all that it sees.
    """

    how: Distributed
    process_id: int | None = None
    n_processes: int | None = None
    coordinator: str | None = None
    local_devices: list[int] | None = None

    @property
    def address(self) -> rendezvous.Address | None:
        """Address where the processes meet; None where JAX finds out."""
        if self.coordinator is None or self.process_id is None or self.n_processes is None:
            return None
        return rendezvous.Address(self.coordinator, self.process_id, self.n_processes)


def place(
    how: Distributed,
    *,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> Place | None:
    """Place of this process. Its config overrides JAX_* variables, which override a scheduler's.

    Args:
      how: see `Distributed`.
      coordinator: host:port of process 0.
      num_processes: how many there are.
      process_id: number of this one.

    Returns:
      Its place; None where it is alone.

    Raises:
      UserError: something is missing or cannot be; says what and where it may be given.
    """
    how = _detected(coordinator) if how is Distributed.auto else how
    if how is Distributed.none:
        return None
    if how is Distributed.tpu:
        return Place(how)
    found = _slurm() if how is Distributed.slurm else {}
    if how is Distributed.kubernetes:
        found = {"process_id": os.environ.get("JOB_COMPLETION_INDEX")}
    number = _number(how, "process_id", process_id, "JAX_PROCESS_ID", found)
    n_processes = _number(how, "num_processes", num_processes, "JAX_NUM_PROCESSES", found)
    if not 0 <= number < n_processes:
        raise UserError(f"mesh.process_id must be in [0, mesh.num_processes={n_processes}), got {number}")
    address = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS") or found.get("coordinator")
    if address is None:
        raise _missing(how, "coordinator", "JAX_COORDINATOR_ADDRESS")
    if not re.fullmatch(r"\S+:\d{1,5}", address):
        raise UserError(f"mesh.coordinator must be host:port of process 0, got {address}")
    return Place(how, number, n_processes, address, _gpus() if how is Distributed.slurm else None)


def _number(how: Distributed, name: str, given: int | None, variable: str, found: dict[str, str | None]) -> int:
    value = given if given is not None else os.environ.get(variable, found.get(name))
    if value is None:
        raise _missing(how, name, variable)
    if not re.fullmatch(r"\d+", str(value)):
        raise UserError(f"mesh.{name} must be a number, got {value} from the environment")
    return int(value)


def _missing(how: Distributed, name: str, variable: str) -> UserError:
    return UserError(f"mesh.distributed={how.name} needs mesh.{name}, or {variable} in the environment")


def _detected(coordinator: str | None) -> Distributed:
    """Scheduler of this environment, detected from variables that only a process in a group has."""
    there = os.environ
    if "SLURM_STEP_NODELIST" in there and there.get("SLURM_STEP_NUM_TASKS", there.get("SLURM_NTASKS", "1")) != "1":
        return Distributed.slurm
    if "JOB_COMPLETION_INDEX" in there and "JAX_COORDINATOR_ADDRESS" in there:
        return Distributed.kubernetes
    if "," in there.get("TPU_WORKER_HOSTNAMES", "") or "MEGASCALE_NUM_SLICES" in there or _on_tpu_vm():
        return Distributed.tpu
    alone = coordinator is None and "JAX_COORDINATOR_ADDRESS" not in there
    return Distributed.none if alone else Distributed.manual


def _on_tpu_vm() -> bool:
    import importlib.util

    return importlib.util.find_spec("libtpu") is not None and any(Path("/dev").glob("accel*"))


def _slurm() -> dict[str, str | None]:
    """Place of a task of `srun`. The port follows from the job, so that two jobs on a node differ."""
    there = os.environ
    if "SLURM_PROCID" not in there or "SLURM_STEP_NODELIST" not in there:
        raise UserError("mesh.distributed=slurm: SLURM_STEP_NODELIST is not set; start the command with srun")
    first = re.match(r"([^,\[]+)(?:\[([^,\-\]]+))?", there["SLURM_STEP_NODELIST"])
    host = "".join(part or "" for part in first.groups()) if first else ""
    port = 61440 + (int(there.get("SLURM_JOB_ID", "0")) + int(there.get("SLURM_STEP_ID", "0"))) % 4096
    return {
        "process_id": there["SLURM_PROCID"],
        "num_processes": there.get("SLURM_STEP_NUM_TASKS", there.get("SLURM_NTASKS")),
        "coordinator": f"{host}:{port}",
    }


def _gpus() -> list[int] | None:
    """One GPU for each of several tasks of a node, all for a single one; SLURM may have chosen already."""
    there = os.environ
    bound = there.get("CUDA_VISIBLE_DEVICES") or there.get("ROCR_VISIBLE_DEVICES") or ""
    one_per_node = there.get("SLURM_STEP_NUM_TASKS") == there.get("SLURM_STEP_NUM_NODES", "1")
    chosen = len(bound.split(",")) == 1 if bound else False
    if one_per_node or chosen or "JAX_LOCAL_DEVICE_IDS" in there or "SLURM_LOCALID" not in there:
        return None
    return [int(there["SLURM_LOCALID"])]
