"""Finiteness check of a user's rows before they are measured: one NaN would make every figure NaN."""

from collections.abc import Iterable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from saejax.errors import UserError

_LARGEST = float(np.finfo(np.float32).max)


def blocks(given: Iterable[Any]) -> Iterator[np.ndarray]:
    """Yields the blocks [..., d] as they are.

    Args:
      given: arrays of any float or integer dtype, of NumPy or of what NumPy can read.

    Raises:
      UserError: one of them is not of real numbers, holds a NaN or an infinity, or what float32 does not hold.
    """
    first = 0
    for block in given:
        array = np.asarray(block)
        if array.ndim < 1 or not (jnp.issubdtype(array.dtype, np.floating) or array.dtype.kind in "iu"):
            raise UserError(f"activations must be rows of real numbers, got {array.dtype} {list(array.shape)}")
        rows = array.reshape(-1, array.shape[-1]) if array.size else array
        with np.errstate(over="ignore"):
            bad = np.argwhere(~np.isfinite(rows.astype(np.float32, copy=False)))
        if len(bad):
            row, column = bad[0]
            value = float(rows[row, column])
            held = f"{value:.6g}, and float32 ends at {_LARGEST:.6g}" if np.isfinite(value) else "NaN or an infinity"
            raise UserError(f"activations: row {first + row} holds {held}; clean the array first")
        first += len(rows)
        yield array
