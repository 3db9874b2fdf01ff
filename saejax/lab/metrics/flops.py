"""Cost of one inference: floating-point operations as the compiler counts them.

The compiler counts the body of a loop once, however often it runs. So a solver that loops is compiled with its loop
unrolled, or counted per iteration; `loops` marks the latter.
"""

from collections.abc import Callable
from typing import Any

import jax

from saejax.errors import UserError


def inference_flops(fn: Callable[..., Any], *args: Any, rows: int) -> dict[str, float]:
    """Counts the work of `fn(*args)` by compiling it; nothing is run.

    Args:
      fn: A pure function that JAX can compile, from rows to their codes.
      args: Its arguments, arrays or `jax.ShapeDtypeStruct`.
      rows: Rows in them that the cost is divided by, at least 1.

    Returns:
      `flops_per_row`; `bytes_per_row`, memory read and written, with what all rows share spread over them; `loops`, 1
      where the program has a loop whose body was counted once, so that both are a lower bound.

    Raises:
      UserError: `rows` below 1.

    Examples:
      >>> shapes = jax.ShapeDtypeStruct((8, 16), "float32"), jax.ShapeDtypeStruct((16, 32), "float32")
      >>> inference_flops(lambda x, w: x @ w, *shapes, rows=8)["flops_per_row"]
      1024.0
    """
    if rows < 1:
        raise UserError(f"rows must be at least 1, got {rows}")
    compiled = jax.jit(fn).lower(*args).compile()
    cost = compiled.cost_analysis()
    cost = cost[0] if isinstance(cost, list) else cost
    cost = cost or {}
    return {
        "flops_per_row": float(cost.get("flops", float("nan"))) / rows,
        "bytes_per_row": float(cost.get("bytes accessed", float("nan"))) / rows,
        "loops": float(" while(" in (compiled.as_text() or "")),
    }
