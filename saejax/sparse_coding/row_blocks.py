"""Blocks of rows for the solvers, so that [rows, n_atoms] fits the cache (CPU) or a small part of memory.

Every solver runs through it: a solver handles one block and never sees the whole batch. Blocks stop on their own, so a
hard signal delays only its neighbours. On a mesh with a "data" axis each device takes its share of the rows.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from saejax.kernels import partition

_CPU_ELEMENTS = 2**20
_ACCELERATOR_ELEMENTS = 2**27


def block_rows(n_rows: int, width: int) -> int:
    """Returns the rows of a block whose widest array has `width` columns."""
    elements = _CPU_ELEMENTS if jax.default_backend() == "cpu" else _ACCELERATOR_ELEMENTS
    fitting = max(elements // max(width, 1), 8)
    n_blocks = -(-n_rows // fitting)
    return -(-n_rows // n_blocks)  # even blocks: little padding


def over_blocks(body: Callable, rows: tuple[Any, ...], shared: tuple[Any, ...], width: int) -> Any:
    """Returns `body(*rows, *shared)`, computed block by block.

    Args:
      body: From a block of rows to a pytree of arrays with as many rows. A row of zeros must be harmless.
      rows: Arrays [b, ...], or None.
      shared: Arrays that every block needs.
      width: Columns of the widest array per row that `body` makes.
    """
    leaves, tree = jax.tree.flatten(rows)
    cut = partition.of(leaves[0].shape[0], 1)

    def shard(leaves, shared):
        b = leaves[0].shape[0]
        size = block_rows(b, width)
        n_blocks = -(-b // size)
        if n_blocks == 1:
            return body(*tree.unflatten(leaves), *shared)
        padded = [jnp.pad(a, [(0, n_blocks * size - b)] + [(0, 0)] * (a.ndim - 1)) for a in leaves]
        blocks = [a.reshape(n_blocks, size, *a.shape[1:]) for a in padded]
        out = lax.map(lambda block: body(*tree.unflatten(block), *shared), blocks)
        return jax.tree.map(lambda a: a.reshape(n_blocks * size, *a.shape[2:])[:b], out)

    return cut.run(shard, (P(cut.rows), P()), P(cut.rows))(leaves, shared)
