"""A harvested activation store as a source: `train/` to learn from, `heldout/` to be judged by.

The two lie side by side under one path and hold different documents.
"""

import dataclasses
import hashlib
import json
import logging
import pathlib
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

from saejax.activations import store
from saejax.activations.loader import PREFETCH_RECORDS, Stream, open_rows
from saejax.activations.source import ActivationSource, register
from saejax.errors import UserError

log = logging.getLogger(__name__)


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Store(ActivationSource):
    """Rows of an activation store, in the dtype they were harvested in."""

    name: ClassVar[str] = "store"

    path: str
    """Directory that `saejax harvest` wrote, with the stores train/ and heldout/ in it."""

    def __post_init__(self):
        # Absolute, so that a run finds its data again from any working directory.
        object.__setattr__(self, "path", str(pathlib.Path(self.path).expanduser().absolute()))

    @property
    def d_in(self) -> int:
        """Width of a row, from the store's manifest."""
        return self.reader("train").d_in

    @property
    def sites(self) -> tuple[int, ...]:
        """Widths at the hooks whose rows lie side by side, from the store's manifest."""
        return self.reader("train").sites

    def reader(self, split: str) -> store.Reader:
        """The store of a split, `train` or `heldout`, with everything that is published now.

        Raises:
            UserError: there is none.
        """
        path = pathlib.Path(self.path).expanduser() / split
        if not path.is_dir():
            raise UserError(f"source.path = {self.path}: no {split}/ store in it; saejax harvest writes one")
        return store.Reader(path)

    def fingerprint(self) -> dict[str, Any]:
        """What was harvested, and a hash over the manifests, which hold a checksum of every shard."""
        manifests = {split: self.reader(split).manifest for split in ("train", "heldout")}
        digest = hashlib.sha256(json.dumps(manifests, sort_keys=True).encode()).hexdigest()
        keys = ("hook", "model", "dtype", "d_in", "sites", "complete", "rows")
        described = {key: manifests["train"][key] for key in keys if key in manifests["train"]}
        return {"type": self.name, "path": self.path, "sha256_of_manifests": digest, **described}

    def open(
        self, *, n_lanes: int, block_rows: int, lanes: range, seed: int, prefetch: int = PREFETCH_RECORDS
    ) -> Stream:
        """Blocks of the training store as published now, shuffled anew each epoch.

        A run that is resumed after the store has grown goes on with the rows that it began with.
        """
        reader = self.reader("train")
        if not reader.complete:
            log.warning("the harvest of %s is not finished: training on its first %d rows", self.path, reader.n_rows)
        return open_rows(
            _StoreRows(reader),
            identity=reader.sha256_of_rows,
            n_lanes=n_lanes,
            block_rows=block_rows,
            lanes=lanes,
            seed=seed,
            prefetch=prefetch,
        )

    def heldout(self, batch: int, max_rows: int | None = None) -> Iterator[np.ndarray]:
        """Yield the rows of the held-out store, in order; at most `max_rows`. Nothing where it has none."""
        reader = self.reader("heldout")
        total = reader.n_rows if max_rows is None else min(max_rows, reader.n_rows)
        for start in range(0, total, batch):
            yield reader.rows(start, min(start + batch, total))


class _StoreRows:
    """A reader that slices like an array, as the loader wants it."""

    def __init__(self, reader: store.Reader):
        self._reader = reader
        self.shape = (reader.n_rows, reader.d_in)
        self.dtype = reader.dtype

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(self.shape[0])
        return self._reader.rows(start, stop)
