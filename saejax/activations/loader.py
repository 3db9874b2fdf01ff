"""Blocks of rows in shuffled order, with a position that is one integer: Grain's only door.

Second station of the data path. Grain shuffles block numbers, repeats epochs (each in a new order) and deals
`n_lanes` blocks to a step; only then are rows read, straight from the memory map, and only those of the lanes
this process holds. A record number therefore names the rows of every lane, whatever the number of processes,
and resuming costs nothing. Rows are mixed later, in the buffer on the devices: reading single rows in random
order costs far more than reading blocks.
"""

import logging
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np

from saejax.activations.source import check_lanes
from saejax.errors import UserError

log = logging.getLogger(__name__)

PREFETCH_RECORDS = 2
"""Records read ahead by one thread; 0 reads in the caller's thread."""


class Rows(Protocol):
    """Anything that slices like an array [n, d_in]: a memory map, or several of them end to end."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def __getitem__(self, rows: slice, /) -> np.ndarray: ...


class Stream:
    """Records made by number: `make(i)` for i = 0, 1, ..., read ahead by one thread; meets RowIterator."""

    def __init__(self, make: Callable[[int], np.ndarray], *, stream_id: str, n_rows: int | None, prefetch: int):
        import grain  # 0.6 s to import: not before a stream is opened

        self.n_rows = n_rows
        self._stream_id = stream_id
        options = grain.ReadOptions(num_threads=min(prefetch, 1), prefetch_buffer_size=prefetch)
        self._iterator = iter(_record_numbers().map(make).to_iter_dataset(options))

    def __iter__(self) -> Iterator[np.ndarray]:
        return self

    def __next__(self) -> np.ndarray:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """Number of the next record, and what it is a position in; read-ahead records do not count."""
        return {"position": int(self._iterator.get_state()["next_index"]), "stream": self._stream_id}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to a position of the same stream.

        Raises:
            UserError: the state belongs to other data, another batch or another seed.
        """
        if state["stream"] != self._stream_id:
            raise UserError(
                f"loader state of stream '{state['stream']}' cannot continue '{self._stream_id}': "
                "resume needs the same data, batch, lanes and seed"
            )
        self._iterator.set_state({"next_index": int(state["position"])})


def _record_numbers():
    """All record numbers, as a Grain dataset; its length (2^62) stands for endless."""
    import grain

    return grain.MapDataset.range(1 << 62)


def shuffled_blocks(*, n_blocks: int, n_lanes: int, seed: int):
    """Which blocks each step reads: endless dataset of int arrays [n_lanes].

    Every epoch deals every block exactly once, in an order of its own; a step may straddle two epochs.
    """
    import grain

    return grain.MapDataset.range(n_blocks).seed(seed).shuffle().repeat().batch(n_lanes, drop_remainder=True)


def open_rows(
    rows: Rows,
    *,
    n_lanes: int,
    block_rows: int,
    lanes: range,
    seed: int,
    prefetch: int = PREFETCH_RECORDS,
) -> Stream:
    """Stream over rows on disk: blocks of `block_rows` contiguous rows, shuffled anew each epoch.

    Args:
        rows: [n, d_in], sliced only while records are made. A tail shorter than a block is never read.
        n_lanes: lanes of the whole run.
        block_rows: rows per lane and step.
        lanes: the lanes to read.
        seed: order of the blocks.
        prefetch: records to read ahead; `get_state` is that of the last record handed out in any case.

    Raises:
        UserError: fewer rows than one step takes.
    """
    check_lanes(n_lanes=n_lanes, block_rows=block_rows, lanes=lanes)
    n, d_in = rows.shape
    n_blocks, tail = divmod(n, block_rows)
    if n_blocks < n_lanes:
        raise UserError(
            f"{n} training rows: a step takes {n_lanes * block_rows} ({n_lanes} lanes x {block_rows} rows); "
            "give more data or lower the batch"
        )
    if tail:
        log.info("the last %d of %d rows are shorter than a block of %d and stay unread", tail, n, block_rows)
    order = shuffled_blocks(n_blocks=n_blocks, n_lanes=n_lanes, seed=seed)

    def make(step: int) -> np.ndarray:
        blocks = np.asarray(order[step])
        record = np.empty((len(lanes), block_rows, d_in), rows.dtype)
        for slot, lane in enumerate(lanes):
            start = int(blocks[lane]) * block_rows
            record[slot] = rows[start : start + block_rows]
        return record

    stream_id = f"{n_blocks} blocks of {block_rows} rows, {n_lanes} lanes, seed {seed}"
    return Stream(make, stream_id=stream_id, n_rows=n_blocks * block_rows, prefetch=prefetch)
