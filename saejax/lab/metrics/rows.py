"""Row storage of metrics that need all rows: same random choices for any order and any blocks.

Some scores need all rows at once (ranks, retrieval, triplets). Their metrics keep rows on the host, sort them by
`row_id` at the end, and draw by a hash of `row_id`. So the order of the rows, the batch size and the number of devices
do not show in the result. Row ids are distinct and in [0, 2^31).
"""

from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from saejax.errors import UserError

Rows = Any
"""An array with one entry per row, numpy or jax."""

_MASK = 0xFFFFFFFF


def hashed(row_id: Any, *salt: int) -> Any:
    """Returns a pseudo-random uint32 for each row: for one salt a bijection, so distinct rows never tie.

    Args:
      row_id: [...] integers, numpy or jax.
      salt: What else the draw depends on: a seed, a unit, a trial.

    Returns:
      [...] uint32 of the same kind of array, the same bits on the host and on a device.

    Examples:
      >>> hashed(np.arange(3), 7).tolist()
      [48414340, 3188993769, 480857166]
    """
    key = 0x9E3779B9
    for value in salt:
        key = _mixed_int((key ^ (value & _MASK)) * 0x01000193 & _MASK)
    h = (jnp if hasattr(row_id, "at") else np).asarray(row_id).astype(np.uint32)
    return _mixed(_mixed(h ^ np.uint32(key)) + np.uint32(_mixed_int(key)))


def shuffled(row_id: np.ndarray, *salt: int) -> np.ndarray:
    """Returns for each row the place of another one: the next in hashed order, so no row is paired with itself.

    Args:
      row_id: [n] distinct integers.
      salt: See `hashed`.

    Returns:
      Places [n]: a single cycle through all rows, fixed by the ids alone.
    """
    order = np.argsort(hashed(np.asarray(row_id), *salt))
    other = np.empty_like(order)
    other[order] = np.roll(order, -1)
    return other


def ordered(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns kept rows in the order of `row_id`.

    Raises:
      UserError: two rows have one id, or there are none.
    """
    if not state:
        raise UserError("there are no rows to measure: the arrays are empty")
    row_id = np.asarray(state["row_id"])
    order = np.argsort(row_id, kind="stable")
    if len(row_id) > 1 and not np.diff(row_id[order]).all():
        raise UserError("row_id must be distinct for every row, got repeated ids")
    return {name: np.asarray(rows)[order] for name, rows in state.items()}


class Kept:
    """Mixin, ahead of `Metric`: the state is a dict of row arrays, joined by merging; no rows is the empty dict."""

    on_host: ClassVar[bool] = True

    def kept(self, batch: Any) -> dict[str, np.ndarray]:
        """Returns the kept fields of a batch, `row_id` among them, each with one entry per row."""
        raise NotImplementedError

    def init(self, batch: Any) -> dict[str, np.ndarray]:
        """Returns no rows."""
        return {}

    def update(self, state: dict[str, np.ndarray], batch: Any) -> dict[str, np.ndarray]:
        """Returns the rows of the state and of the batch."""
        real = np.asarray(batch.weight) > 0
        return self.merge(state, {name: np.asarray(rows)[real] for name, rows in self.kept(batch).items()})

    def merge(self, a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns the rows of both."""
        if not a or not b:
            return a or b
        return {name: np.concatenate([a[name], b[name]]) for name in a}


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of each row of `a` with the same row of `b`, 0 where either is zero."""
    return (unit(a) * unit(b)).sum(axis=-1)


def unit(a: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1 in float64; rows of zeros stay zero."""
    a = np.asarray(a, np.float64)
    length = np.linalg.norm(a, axis=-1, keepdims=True)
    return a / np.where(length > 0, length, 1.0)


def known_mean(scores: np.ndarray) -> float:
    """Mean of the scores that are not NaN; NaN if none is known."""
    known = scores[~np.isnan(scores)]
    return float(known.mean()) if known.size else float("nan")


def _mixed(h: Any) -> Any:
    """Murmur3's finaliser, a bijection of uint32."""
    h = (h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return h ^ (h >> np.uint32(16))


def _mixed_int(h: int) -> int:
    """The same of one Python integer."""
    h = (h ^ (h >> 16)) * 0x85EBCA6B & _MASK
    h = (h ^ (h >> 13)) * 0xC2B2AE35 & _MASK
    return h ^ (h >> 16)
