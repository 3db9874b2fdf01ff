"""Memory of a step before it runs, and of the process afterwards."""

from __future__ import annotations

import logging
import math
import os
import resource
import sys
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from saejax.errors import UserError
from saejax.kernels import choice, top_k
from saejax.parallel.sharding import DATA
from saejax.training.ensemble import EnsembleState, EnsembleStep
from saejax.training.state import TrainState
from saejax.training.step import Step

logger = logging.getLogger(__name__)


def compile_step(
    step: Step | EnsembleStep,
    wanted: TrainState | EnsembleState,
    lane_sharding: NamedSharding,
    mesh: Mesh,
    n_members: int = 1,
) -> Any:
    """Compile the step ahead of time, log its memory, and refuse a step that cannot fit.

    Args:
      step: pure, from `training.step.make` or `training.ensemble.make`.
      wanted: the state's shapes and shardings.
      lane_sharding: of the record that each step takes.
      mesh: where it runs.
      n_members: of an ensemble.

    Returns:
      The compiled step; it donates the state.

    Raises:
      UserError: a device has less memory than the step needs.
    """
    compiled, state_bytes, temporaries = analysed(step, wanted, lane_sharding, mesh)
    if temporaries is not None:
        need = state_bytes + temporaries
        logger.info("memory per device: state and batch %s, step %s in all", gib(state_bytes), gib(need))
        limit = limit_bytes()
        if limit is not None and need > limit:
            if n_members > 1:
                raise UserError(
                    f"one step of {n_members} members needs {gib(need)} per device, there is {gib(limit)}: about "
                    f"{fitting(need, limit, _bytes(wanted.buffer) // mesh.shape[DATA], n_members)} of them would fit"
                )
            raise UserError(
                f"one step needs {gib(need)} per device, there is {gib(limit)}: lower train.batch, buffer.rows "
                "or sae.d_sae, or raise mesh.latent"
            )
    return compiled


def analysed(
    step: Step | EnsembleStep,
    wanted: TrainState | EnsembleState,
    lane_sharding: NamedSharding,
    mesh: Mesh,
    **options: Any,
) -> tuple[Any, int, int | None]:
    """The step compiled for a mesh; bytes per device of its state and batch, and of all it needs besides.

    Nothing is allocated. Where the compiler does not say, the bytes are 0 and None. `options` go to the compiler.
    """
    fresh, device = record(wanted, lane_sharding), mesh.devices.flat[0]
    state_shardings = jax.tree.map(lambda leaf: leaf.sharding, wanted)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(state_shardings, None))
    with jax.set_mesh(mesh), choice.compiling_for(device):
        compiled = jitted.lower(wanted, fresh).compile(
            compiler_options=top_k.compiler_options(device.platform) | options
        )
    analysis = compiled.memory_analysis()
    if analysis is None:
        return compiled, 0, None
    # Donated arguments and outputs share their bytes.
    new = analysis.output_size_in_bytes - analysis.alias_size_in_bytes + analysis.temp_size_in_bytes
    return compiled, analysis.argument_size_in_bytes, new


def record(wanted: TrainState | EnsembleState, lane_sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    """Shape and place of a step's inputs besides its state."""
    lanes, _, block_rows, d_in = wanted.buffer.rows.shape
    return jax.ShapeDtypeStruct((lanes, block_rows, d_in), wanted.buffer.dtype, sharding=lane_sharding)


def peak_bytes() -> int | None:
    """Largest memory in use so far: of the first local device, or of the process where the device is the CPU."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def limit_bytes() -> int | None:
    """Memory of one device; fake CPU devices share what the machine has."""
    device = jax.local_devices()[0]
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    if device.platform == "cpu" and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // jax.local_device_count()
    return None


def fitting(need: int, limit: int, shared: int, n_members: int) -> int:
    """Members of an ensemble that a device has room for, each taking an equal part of what they do not share.

    Args:
      need: bytes of the step with all of them.
      limit: bytes of the device.
      shared: bytes that one member alone would need as well: the buffer.
      n_members: all of them.

    Examples:
      >>> fitting(need=810, limit=500, shared=10, n_members=8)
      4
    """
    return max(0, (limit - shared) * n_members // max(need - shared, 1))


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def gib(n_bytes: int) -> str:
    """Bytes as text, in GiB."""
    return f"{n_bytes / 2**30:.2f} GiB"
