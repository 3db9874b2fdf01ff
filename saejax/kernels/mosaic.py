"""Pallas' Mosaic GPU backend: every name of this experimental interface that saejax uses.

Importing this module needs no Pallas; `available` says whether it is installed. Kernels use `plgpu.kernel`, since jax
is retiring both `pl.pallas_call` on Mosaic and the Triton backend. The compiler chooses register layouts (warpgroup
semantics), so one source runs on the GPU and in the GPU interpreter on a CPU.
"""

import importlib
import math
from collections.abc import Callable
from typing import Any

import jax

Interpret = bool
"""Whether a kernel is interpreted on the CPU, which is slow and for tests."""


def available() -> bool:
    """Returns whether this jax has the backend; a GPU need not be there."""
    try:
        api()
    except (ImportError, AttributeError):
        return False
    return True


def api() -> tuple[Any, Any]:
    """Returns the modules `pallas` and `pallas.mosaic_gpu`.

    Raises:
      ImportError: Where this jax was built without them.
    """
    pl = importlib.import_module("jax.experimental.pallas")
    plgpu = importlib.import_module("jax.experimental.pallas.mosaic_gpu")
    return pl, plgpu


def run(
    body: Callable[..., None],
    args: tuple[jax.Array, ...],
    out_type: Any,
    grid: dict[str, int],
    *,
    interpret: Interpret = False,
    **threads: Any,
) -> Any:
    """Runs `body(*references to args, *references to outputs)` once per point of the grid, the last axis fastest."""
    _, plgpu = api()
    call = plgpu.kernel(
        body,
        out_type=out_type,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=_interpreter() if interpret else None,
        **threads,
    )
    return call(*args)


def load(ref: Any, interpret: Interpret) -> jax.Array:
    """Reads a reference into whatever layout its use needs, also where that read cannot be vectorised."""
    _, plgpu = api()
    if interpret:  # the interpreter knows plain reads only
        return ref[...]
    try:
        return plgpu.load(ref, optimized=False)
    except TypeError:  # jax 0.10 asks for an index as well
        return plgpu.load(ref, (), optimized=False)


def divisor(n: int, largest: int, smallest: int) -> int | None:
    """Returns the largest power of two in [smallest, largest] that divides n; None without one.

    Examples:
      >>> divisor(768, 1024, 128), divisor(4096, 1024, 128), divisor(100, 1024, 128)
      (256, 1024, None)
    """
    found = math.gcd(n, largest)
    return found if found >= smallest else None


def _interpreter() -> Any:
    """Parameters of the GPU interpreter, which jax 0.10 does not export."""
    _, plgpu = api()
    if hasattr(plgpu, "InterpretGPUParams"):
        return plgpu.InterpretGPUParams()
    return importlib.import_module("jax._src.pallas.mosaic_gpu.interpret.params").InterpretGPUParams()
