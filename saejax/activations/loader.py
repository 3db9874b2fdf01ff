"""Data loader (Grain): shuffled blocks of rows, with a position that is one integer.

Second station of the data path. Grain shuffles block numbers, repeats epochs (each in a new order) and deals `n_lanes`
blocks to a step. Only then are rows read, straight from the memory map, and only for the lanes of this process. So a
record number names the rows of every lane for any number of processes, and resuming costs nothing. The buffer on the
devices mixes rows later: reading single rows in random order costs far more than reading blocks.
"""

import functools
import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Int

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

    def __init__(
        self,
        make: Callable[[int], np.ndarray],
        *,
        identity: dict[str, Any],
        n_rows: int | None = None,
        prefetch: int = PREFETCH_RECORDS,
        first_rows: "Callable[[int], Stream] | None" = None,
        older: Callable[[], str] | None = None,
        starts: Callable[[int], np.ndarray] | None = None,
    ):
        """Opens the stream.

        Args:
            make: record number -> record.
            identity: what the records depend on, JSON-able and free of paths: equal identity, equal records.
                Holds "rows" (as `n_rows`), "lanes", "block_rows", "seed", and "data", a hash of the rows.
            n_rows: rows of an epoch; None where the stream never repeats.
            prefetch: records to read ahead.
            first_rows: opens the same stream over that many rows only, for sources that grow.
            older: the "data" that older versions saved for the same rows; called where a position holds another one.
            starts: record number -> place of each lane's first row among the rows of the source.
        """
        import grain  # 0.6 s to import: not before a stream is opened

        self.n_rows = n_rows
        self._identity, self._first_rows, self._older = identity, first_rows, older
        self._make, self._starts = make, starts
        options = grain.ReadOptions(num_threads=min(prefetch, 1), prefetch_buffer_size=prefetch)
        self._iterator = iter(_record_numbers().map(make).to_iter_dataset(options))

    def __iter__(self) -> Iterator[np.ndarray]:
        return self

    def __next__(self) -> np.ndarray:
        return next(self._iterator)

    def record(self, number: int) -> np.ndarray:
        """A record by its number; the position stays."""
        return self._make(number)

    def starts(self, number: int) -> Int[np.ndarray, " n_lanes"] | None:
        """First source row of each lane in a record; None where rows have no place."""
        return None if self._starts is None else self._starts(number)

    def get_state(self) -> dict[str, Any]:
        """Number of the next record, and the stream that it refers to; read-ahead records do not count."""
        return {"position": int(self._iterator.get_state()["next_index"]), "stream": self._identity}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to a position of the same stream; where the source has grown since, of its first rows.

        Raises:
            UserError: the state belongs to other data, another batch or another seed; says which of them.
        """
        saved = state["stream"] if isinstance(state["stream"], dict) else {}
        stream = self._of_rows(saved.get("rows")) if saved.get("block_rows") == self._identity["block_rows"] else self
        same_stream(state, stream._as_saved(saved))
        if stream is not self:
            log.info("continuing on the first %d of now %d rows", stream.n_rows, self.n_rows)
        self.n_rows, self._identity, self._iterator = stream.n_rows, stream._identity, stream._iterator
        self._make, self._starts, self._older = stream._make, stream._starts, stream._older
        self._iterator.set_state({"next_index": int(state["position"])})

    def _as_saved(self, saved: dict[str, Any]) -> dict[str, Any]:
        """The identity; as an older version formed it, where the position is of that form and the rows are the same."""
        if self._older is None or saved.get("data") in (None, self._identity["data"]):
            return self._identity
        older = self._identity | {"data": self._older()}
        return older if saved["data"] == older["data"] else self._identity

    def _of_rows(self, n_rows: int | None) -> "Stream":
        """This stream, or the one over its first `n_rows` rows where those are fewer."""
        if self._first_rows is None or self.n_rows is None or n_rows is None or n_rows >= self.n_rows:
            return self
        return self._first_rows(n_rows)


def same_stream(state: dict[str, Any], identity: dict[str, Any]) -> None:
    """Refuse a position in another stream.

    Raises:
        UserError: says what differs.
    """
    saved = state["stream"] if isinstance(state["stream"], dict) else {}
    wrong = [
        f"{key} was {str(saved.get(key))[:12]} and is {str(value)[:12]}"
        for key, value in identity.items()
        if saved.get(key) != value
    ]
    if wrong:
        raise UserError(
            f"the loader cannot continue: {', '.join(wrong)}; resume needs the same data, batch, lanes and seed"
        )


def _record_numbers():
    """All record numbers, as a Grain dataset; its length (2^62) stands for endless."""
    import grain

    return grain.MapDataset.range(1 << 62)


def shuffled_blocks(*, n_blocks: int, n_lanes: int, seed: int):
    """Blocks that each step reads: endless dataset of int arrays [n_lanes].

    Every epoch deals every block exactly once, in an order of its own; a step may straddle two epochs.
    """
    import grain

    return grain.MapDataset.range(n_blocks).seed(seed).shuffle().repeat().batch(n_lanes, drop_remainder=True)


class Identity(NamedTuple):
    """Hashes of the first n rows, independent of their place, as functions of n; a resumed run compares them."""

    now: Callable[[int], str]
    """The hash of this version, which positions are saved with."""
    older: Callable[[int], str] | None = None
    """The hash of older versions, which their positions hold."""


def open_rows(
    rows: Rows,
    *,
    identity: Identity,
    n_lanes: int,
    block_rows: int,
    lanes: range,
    seed: int,
    prefetch: int = PREFETCH_RECORDS,
    hint: str = "",
) -> Stream:
    """Stream over rows on disk: blocks of `block_rows` contiguous rows, shuffled anew each epoch.

    Args:
        rows: [n, d_in], sliced only while records are made. A tail shorter than a block is never read.
        identity: of the rows.
        n_lanes: lanes of the whole run.
        block_rows: rows per lane and step.
        lanes: the lanes to read.
        seed: order of the blocks.
        prefetch: records to read ahead; `get_state` is that of the last record handed out in any case.
        hint: what else to say where the rows are too few.

    Raises:
        UserError: fewer rows than one step takes.
    """
    check_lanes(n_lanes=n_lanes, block_rows=block_rows, lanes=lanes)
    n, d_in = rows.shape
    n_blocks, tail = divmod(n, block_rows)
    if n_blocks < n_lanes:
        raise UserError(
            f"{n} training rows: a step takes {n_lanes * block_rows} ({n_lanes} lanes x {block_rows} rows); "
            f"give more data or lower the batch{hint}"
        )
    if tail:
        log.info("the last %d of %d rows are shorter than a block of %d and stay unread", tail, n, block_rows)

    def open_first(n_rows: int) -> Stream:
        order = shuffled_blocks(n_blocks=n_rows // block_rows, n_lanes=n_lanes, seed=seed)

        def make(step: int) -> np.ndarray:
            blocks = np.asarray(order[step])
            record = np.empty((len(lanes), block_rows, d_in), rows.dtype)
            for slot, lane in enumerate(lanes):
                start = int(blocks[lane]) * block_rows
                record[slot] = rows[start : start + block_rows]
            return record

        facts = {"rows": n_rows, "lanes": n_lanes, "block_rows": block_rows, "seed": seed, "data": identity.now(n_rows)}
        starts = functools.partial(_starts, order, block_rows)
        then = None if identity.older is None else functools.partial(identity.older, n_rows)
        at_most: Any = {"first_rows": open_first, "older": then, "starts": starts}
        return Stream(make, identity=facts, n_rows=n_rows, prefetch=prefetch, **at_most)

    return open_first(n_blocks * block_rows)


def _starts(order: Any, block_rows: int, step: int) -> np.ndarray:
    return np.asarray(order[step], np.int64) * block_rows


def digest(facts: Any) -> str:
    """sha256 of JSON-able facts: the "data" of a stream's identity."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
