"""Content hash of a table of rows, independent of its files, at a bounded cost.

Up to `WHOLE` bytes it hashes everything and sees any change. Beyond that it hashes `SAMPLED` bytes: one block of up to
`BLOCK` bytes out of each of N >= 4,096 equal stretches (fewer where a single row exceeds `BLOCK`). The shape alone
decides the places; the first and the last row are among them. It then sees a change

* of a stretch longer than 2 / N of the data, always: it covers one of the N;
* of k changed blocks at random places, with probability 1 - (1 - p)^k, where p = `SAMPLED` / (bytes of the data). One
  changed block in 100 GB is seen with p = 0.0027, one block in a thousand changed (1,500) with probability 0.98.

It costs about a second per GiB up to `WHOLE`, and reading N places beyond that. Large files in Fortran order are
hashed as they lie, because a row is spread over the whole file. The same rows in the other order then count as
different data.
"""

import contextlib
import functools
import hashlib
import mmap
from collections.abc import Iterator
from typing import Any

import numpy as np

from saejax.activations.array_files import Table

WHOLE = 2**30
"""Bytes up to which all are hashed."""

SAMPLED = 2**28
"""Bytes that are hashed of more."""

BLOCK = 2**16
"""Bytes of a block, rounded down to whole rows."""


@functools.lru_cache(maxsize=8)
def of(table: Table) -> str:
    """The hash of all rows; equal rows of equal dtype give equal hashes, however they are cut into files."""
    sums = hashlib.sha256(f"{table.shape} {table.dtype.name}".encode())
    every = Table(table.parts, refuse_nonfinite=False)
    size = _bytes(every)
    if size <= WHOLE:
        for start, stop in _all(every):
            _add(sums, every[start:stop])
        return sums.hexdigest()
    in_rows = all(part.flags.c_contiguous for _, part in table.parts)
    views = [every] if in_rows else [part if part.flags.c_contiguous else part.T for _, part in table.parts]
    with _here_and_there(table):
        for view in views:
            n, width = view.shape
            for start, stop in spans(n, width, table.dtype.itemsize, SAMPLED * _bytes(view) // size):
                _add(sums, view[start:stop].astype(table.dtype, copy=False))
    return sums.hexdigest()


@contextlib.contextmanager
def _here_and_there(table: Table) -> Iterator[None]:
    """Nothing is read ahead of the places that are asked for: megabytes at each would take most of the time."""
    maps = [found for _, part in table.parts if (found := _map_of(part)) is not None]
    for mapped in maps:
        mapped.madvise(mmap.MADV_RANDOM)
    try:
        yield
    finally:
        for mapped in maps:
            mapped.madvise(mmap.MADV_NORMAL)


def _map_of(part: Any) -> mmap.mmap | None:
    while isinstance(part, np.ndarray):
        part = part.base
    return part if isinstance(part, mmap.mmap) else None


def spans(n: int, width: int, itemsize: int, budget: int) -> list[tuple[int, int]]:
    """Rows of [n, width] to hash: (first, end) of a block in each of equal stretches, `budget` bytes."""
    block = min(n, max(1, BLOCK // (width * itemsize)))
    count = min(n // block, max(1, budget // (block * width * itemsize)))
    found = []
    for number in range(count):
        start, stop = number * n // count, (number + 1) * n // count - block
        if number == count - 1:
            start = stop
        elif number:
            drawn = hashlib.sha256(f"{n} {width} {itemsize} {number}".encode()).digest()
            start += int.from_bytes(drawn[:8], "little") % (stop - start + 1)
        found.append((start, start + block))
    return found


def _all(table: Table) -> Iterator[tuple[int, int]]:
    step = max(1, 2**24 // (table.shape[1] * table.dtype.itemsize))
    return ((at, min(at + step, table.shape[0])) for at in range(0, table.shape[0], step))


def _bytes(rows: Table | np.ndarray) -> int:
    return rows.shape[0] * rows.shape[1] * rows.dtype.itemsize


def _add(sums: "hashlib._Hash", rows: np.ndarray) -> None:
    sums.update(np.ascontiguousarray(rows).view(np.uint8).data)
