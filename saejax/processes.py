"""Several processes as one run: which of them this is, how they start, agree with one another and part.

Level zero of the package, beside `sharding`. The engine is `jax.distributed`: process 0 is the coordinator, which hears
from every other one and ends all of them when one falls silent. Nothing here touches it unless `mesh.distributed` asks.

What must never differ between processes (which checkpoint is read, where the run lies, whether a save failed) is
agreed upon through `gather`, which needs no device. How a process leaves is decided in `together`: those that end well
wait for one another; one that fails alone does not wait, because the others hang in a collective until it is gone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import itertools
import logging
import os
import re
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from saejax.errors import DONE, FAILED, LOST, MISTAKE, UserError

logger = logging.getLogger(__name__)


class Distributed(enum.Enum):
    """Who says which process this is."""

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


def place(
    how: Distributed,
    *,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> Place | None:
    """Which process this is; what is given goes before JAX_* variables, these before those of a scheduler.

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
    """Whose environment this is, from what only a process that has company finds in it."""
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
    """What `srun` tells each of its tasks. The port follows from the job, so that two jobs on a node differ."""
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


def start(at: Place | None, *, timeout_seconds: int, dead_after_seconds: int) -> None:
    """Join the other processes; once in the life of a process, before any array or device is asked for.

    Where they do not come together in time, the process prints one line and ends with status 2: JAX would abort it.

    Args:
      at: from `place`; None, or a place among one, starts nothing.
      timeout_seconds: how long to wait for all of them.
      dead_after_seconds: silence after which a process counts as dead, and all others end.

    Raises:
      UserError: process 0 cannot listen at its address.
    """
    if at is None or at.n_processes == 1 or jax.distributed.is_initialized():
        return
    waiting = threading.Timer(timeout_seconds, _not_together, (at, timeout_seconds))
    waiting.daemon = True
    waiting.start()
    given: dict[str, Any] = {} if at.how is Distributed.tpu else {"cluster_detection_method": "deactivate"}
    try:
        jax.distributed.initialize(
            *(at.coordinator, at.n_processes, at.process_id, at.local_devices),
            initialization_timeout=timeout_seconds + 60,
            heartbeat_timeout_seconds=dead_after_seconds,
            shutdown_timeout_seconds=dead_after_seconds,
            **given,
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        where = f" at mesh.coordinator={at.coordinator}" if at.coordinator else ""
        raise UserError(f"mesh.distributed={at.how.name} could not start{where}: {reason}") from error
    finally:
        waiting.cancel()
    if jax.process_index() == 0:
        logger.info("%d processes, %d devices", jax.process_count(), jax.device_count())


def _not_together(at: Place, seconds: int) -> None:
    """Tell why the processes did not come together, and end this one."""
    why = f"not all of {at.n_processes} processes have come"
    if at.coordinator is not None and at.process_id != 0:
        host, _, port = at.coordinator.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except OSError as error:
            why = f"process 0 does not answer ({error.strerror or error})"
    where = f" at mesh.coordinator={at.coordinator}" if at.coordinator else ""
    text = f"saejax: mesh.distributed={at.how.name}{where}: {why} within mesh.timeout_seconds={seconds}"
    os.write(2, f"{text}\n".encode())
    os._exit(MISTAKE)


def several() -> bool:
    """Whether this process has company."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def first() -> bool:
    """Whether this is the process that logs and writes what is written once."""
    return not several() or jax.process_index() == 0


_numbers = itertools.count()
_DAY_MS = 86_400_000


def gather(value: str) -> list[str]:
    """The values of all processes, in their order. All must call it, in the same order; one alone gets its own.

    It waits for the slowest, say for one that still writes its part of a checkpoint; the silence of a dead one ends
    this process (`mesh.dead_after_seconds`).
    """
    if not several():
        return [value]
    client, key = _client(), f"saejax/{next(_numbers)}"
    client.key_value_set(f"{key}/{jax.process_index()}", f"={value}")
    return [client.blocking_key_value_get(f"{key}/{i}", _DAY_MS)[1:] for i in range(jax.process_count())]


@contextlib.contextmanager
def alike() -> Iterator[None]:
    """What fails inside in one process fails in all of them, so that they go on in the same way.

    Raises:
      UserError, RuntimeError: what another process met, where this one met nothing.
    """
    met: Exception | None = None
    try:
        yield
    except Exception as error:
        met = error
    kind = " " if met is None else "u" if isinstance(met, UserError) else "e"
    heard = gather(kind + (str(met or "").splitlines() or [""])[0])
    if met is not None:
        raise met
    for number, (kind, what) in enumerate((text[0], text[1:]) for text in heard):
        if kind != " ":
            raise UserError(what) if kind == "u" else RuntimeError(f"process {number}: {what}")


def stops_at(step: int) -> bool:
    """Whether all processes stop before this step, because one of them was told to by SIGTERM.

    JAX's preemption service notices the signal, finds the furthest step of all and names the one after it. To ask
    costs a microsecond; every process asks before every step.
    """
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(step)


def together(work: Callable[[], int]) -> int:
    """Do the work of a command, and leave the other processes, if it has joined any, as its end demands.

    Those that end well, or fail alike, meet once more. One that fails alone says why and is gone at once.

    Args:
      work: returns the exit status.

    Returns:
      The same.
    """
    try:
        status = work()
    except BaseException as error:
        if not several():
            raise
        status = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else told(error)
    if several():
        _part(status)
    return status


_PEER_LOST = re.compile(r"gloo|nccl|connection (reset|closed)|coordination ?service|heartbeat|barrier timed out", re.I)


def told(error: BaseException) -> int:
    """Say what ended one of several processes; returns its exit status."""
    if isinstance(error, UserError) or not _PEER_LOST.search(str(error)):
        traceback.print_exception(error)
        return FAILED
    first = str(error).splitlines()[0][:200]
    print(f"saejax: another process of this run is gone, its own output says why ({first})", file=sys.stderr)
    return LOST


def _part(status: int) -> None:
    well = status == DONE or status >= 128 and status != LOST
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    try:
        # Process 0 may still be writing a report; of those that fail, none will come when it is the only one.
        _client().wait_at_barrier(f"saejax/{'well' if well else 'failed'}", _DAY_MS if well else 5000)
    except Exception:
        os._exit(status or FAILED)
    jax.distributed.shutdown()


def _client() -> Any:
    """The line to the coordinator; JAX has no public name for it."""
    from jax._src import distributed

    return distributed.global_state.client
