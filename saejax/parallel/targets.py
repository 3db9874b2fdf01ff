"""Accelerators that a step can be compiled for without one: their memory, rates and links, and a mesh of them.

The compilers come as packages: libtpu (extra `plan-tpu`) for TPUs, the CUDA plugin of JAX with ptxas (extra `plan-gpu`)
for NVIDIA GPUs. They need no device and no driver.

Sources:
  Google Cloud, TPU v5e, v5p and v6e system architecture; NVIDIA, H100, H200 and B200 data sheets (dense rates).
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from saejax.errors import UserError
from saejax.parallel import sharding

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of accelerator.

    Attributes:
      name: as in `target=`.
      platform: tpu or cuda.
      memory: bytes that a program may use.
      flops: dense bfloat16 operations per second.
      bandwidth: bytes per second of its memory.
      links: bytes per second that leave the chip towards its neighbours, all links together, one way.
      clock: cycles per second in which the TPU compiler counts; 0 for GPUs.
      compute_capability: of NVIDIA GPUs.
      cores: streaming multiprocessors of NVIDIA GPUs.
    """

    name: str
    platform: str
    memory: int
    flops: float
    bandwidth: float
    links: float
    clock: float = 0.0
    compute_capability: tuple[int, int] = (0, 0)
    cores: int = 0


CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip("v5e", "tpu", round(15.75 * GIB), 1.97e14, 8.19e11, 4 * 4.5e10, clock=1.5e9),
        Chip("v5p", "tpu", round(95.74 * GIB), 4.59e14, 2.765e12, 6 * 9.0e10, clock=1.75e9),
        Chip("v6e", "tpu", round(31.25 * GIB), 9.18e14, 1.64e12, 4 * 9.0e10, clock=1.75e9),
        Chip("h100", "cuda", 80 * 10**9, 9.89e14, 3.35e12, 4.5e11, compute_capability=(9, 0), cores=132),
        Chip("h200", "cuda", 141 * 10**9, 9.89e14, 4.8e12, 4.5e11, compute_capability=(9, 0), cores=132),
        Chip("b200", "cuda", 180 * 10**9, 2.25e15, 8.0e12, 9.0e11, compute_capability=(10, 0), cores=148),
    )
}
"""Every chip by its name."""


@dataclasses.dataclass(frozen=True)
class Target:
    """Chips of one kind in a given arrangement.

    Attributes:
      chip: their kind.
      shape: of a TPU slice, as in 4x4; of GPUs (hosts, chips per host).
    """

    chip: Chip
    shape: tuple[int, ...]

    @property
    def n_devices(self) -> int:
        """Chips in all."""
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def package(self) -> str:
        """The extra of saejax that brings the compiler."""
        return "plan-tpu" if self.chip.platform == "tpu" else "plan-gpu"

    def compiles_here(self) -> bool:
        """Returns whether the compiler is installed."""
        module = "libtpu" if self.chip.platform == "tpu" else "jax_plugins.xla_cuda12"
        with contextlib.suppress(ModuleNotFoundError):
            return importlib.util.find_spec(module) is not None
        return False

    def devices(self) -> list[Any]:
        """Returns descriptions of the chips, for a mesh to compile for.

        Raises:
          UserError: the compiler is not installed, or it knows no such arrangement.
        """
        if not self.compiles_here():
            raise UserError(f"target={self}: the compiler is not installed: pip install 'saejax[{self.package}]'")
        from jax.experimental import topologies

        try:
            if self.chip.platform == "cuda":
                hosts, per_host = self.shape
                settings: dict[str, Any] = {
                    "target_config": _gpu_config(self.chip),
                    "topology": f"{hosts}x1x{per_host}",
                }
                return list(topologies.get_topology_desc("", platform="cuda", **settings).devices)
            with _no_tpu_here():
                described = topologies.get_topology_desc(platform="tpu", topology_name=_whole_hosts(self))
            return list(described.devices)[: self.n_devices]
        except jax.errors.JaxRuntimeError as error:
            said = str(error).splitlines()[0]
            raise UserError(f"target={self}: the compiler knows no such arrangement: {said}") from error

    def mesh(self, n_data: int, n_latent: int, n_ensemble: int = 1) -> Mesh:
        """Returns a mesh of all its chips."""
        return sharding.make_mesh(n_data, n_latent, devices=self.devices(), n_ensemble=n_ensemble)


def parse(text: str) -> Target:
    """Read `target=`.

    Example:
      >>> str(parse("v5e:4x4")), parse("h200").n_devices, parse("h100:2x8").shape
      ('v5e:4x4', 1, (2, 8))

    Raises:
      UserError: no such chip or arrangement.
    """
    name, colon, arrangement = text.partition(":")
    named = re.fullmatch(r"[1-9]\d*(x[1-9]\d*){0,2}", arrangement) or not colon
    if name not in CHIPS or not named:
        raise UserError(
            f"target must be one of {', '.join(CHIPS)}, with an arrangement such as v5e:4x4, v5p:2x2x1, h200:8 or "
            f"h200:2x8 (hosts x GPUs), got {text}"
        )
    chip = CHIPS[name]
    shape = tuple(int(size) for size in arrangement.split("x")) if arrangement else (1,)
    if chip.platform == "cuda":
        if len(shape) > 2:
            raise UserError(f"target={text}: GPUs are hosts x GPUs per host, as in {name}:2x8")
        return Target(chip, shape if len(shape) == 2 else (1, *shape))
    if len(shape) == 1 and shape[0] > 1:
        raise UserError(f"target={text}: a TPU slice is named by its shape, as in {name}:{_example(chip)}")
    return Target(chip, shape)


def _example(chip: Chip) -> str:
    return "2x2x1" if chip.name == "v5p" else "4x4"


def _whole_hosts(target: Target) -> str:
    """The smallest slice that the compiler describes and that holds the target: hosts have four chips."""
    flat = target.shape if len(target.shape) > 1 else (1, 1)
    sizes = [max(2, size) for size in flat[:2]]
    rest = flat[2:] or ((1,) if target.chip.name == "v5p" else ())
    return f"{target.chip.name}:{'x'.join(map(str, (*sizes, *rest)))}"


@contextlib.contextmanager
def _no_tpu_here() -> Iterator[None]:
    """Environment in which libtpu describes chips instead of looking for its own."""
    own = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-4"}
    before = {name: os.environ.get(name) for name in own}
    os.environ.update(own)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _gpu_config(chip: Chip) -> str:
    """The figures of a GPU as XLA's compiler reads them, a `GpuTargetConfigProto` in text form."""
    major, minor = chip.compute_capability
    return f"""
      gpu_device_info {{
        threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: {chip.cores}
        shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
        fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
        memory_bandwidth: {round(chip.bandwidth)} l2_cache_size: 52428800 clock_rate_ghz: 1.98
        device_memory_size: {chip.memory} registers_per_core_limit: 65536 registers_per_block_limit: 65536
        cuda_compute_capability {{ major: {major} minor: {minor} }}
      }}
      platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} runtime_version {{ major: 12 minor: 8 patch: 0 }}
      device_description_str: "NVIDIA {chip.name.upper()}"
    """
