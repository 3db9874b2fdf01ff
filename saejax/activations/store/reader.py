"""Activation store reader: memory-mapped rows and blocks, and the way from a row back to its token.

The loader reads through it. On first opening, a file whose checksum differs from the harvest's is refused by name, so
damaged data never reaches training. A store may be read while it grows. Its rows are those of the longest unbroken run
of shards from shard 0, so a row keeps its number as shards follow.
"""

import bisect
import collections
import hashlib
import itertools
import json
import math
import os
import pathlib
import threading
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32, Shaped

from saejax.activations import packing
from saejax.activations.store import files as store_format
from saejax.activations.store import manifest_schema as store_schema
from saejax.errors import UserError
from saejax.fields import paths
from saejax.storage import json_yaml

_SOUND: set[tuple[str, int, int, int, str]] = set()
"""Files that this process has compared with their checksums, by path, inode, size, time of writing and checksum."""

_OPEN_MAPS = 256  # each holds a file descriptor, and systems allow about a thousand


class Origin(NamedTuple):
    """Origin of a row: its token, position, document and sequence."""

    token: int
    """Token id at which the activation was read."""

    position: int
    """Position in its segment, from 0."""

    document: int
    """Number of the document in the corpus."""

    sequence: int
    """Number of the token sequence in the store."""

    column: int
    """Place of the token in that sequence."""


class Reader:
    """A store, or what is published of it when this object is made or refreshed; threads may share it.

    Args:
      path: directory of the store.
      verify: whether each file's checksum is compared when it is first opened by this process. That reads the whole
        file, about a second per 1.5 GB; what is read stays in the page cache for the rows that follow.
    """

    def __init__(self, path: str | os.PathLike, *, verify: bool = True):
        self.path = paths.local(path, "path")
        self._verify = verify
        self._maps: collections.OrderedDict[str, np.ndarray] = collections.OrderedDict()
        self._lock = threading.Lock()
        self.refresh()

    def refresh(self) -> int:
        """Looks again for published shards; returns the number of rows."""
        self.manifest = store_schema.read_manifest(self.path)
        if self.manifest["complete"]:
            self._shards = self.manifest["shards"]
        else:
            numbers = store_format.published(self.path)
            run = [n for place, n in enumerate(numbers) if place == n]
            self._shards = [store_schema.read_record(self.path, n) for n in run]
        self._ends = list(itertools.accumulate(shard["rows"] for shard in self._shards))
        return self.n_rows

    @property
    def n_rows(self) -> int:
        """Rows that can be read: [0, n_rows)."""
        return self._ends[-1] if self._ends else 0

    @property
    def n_sequences(self) -> int:
        """Token sequences that can be read: [0, n_sequences)."""
        return sum(shard["sequences"] for shard in self._shards)

    @property
    def d_in(self) -> int:
        """Width of a row."""
        return self.manifest["d_in"]

    @property
    def sites(self) -> tuple[int, ...]:
        """Widths of the parts of a row, in order: one for each of `hooks`."""
        return tuple(site["d_in"] for site in store_format.sites(self.manifest))

    @property
    def hooks(self) -> tuple[str, ...]:
        """Hooks of the parts of a row."""
        return tuple(site["hook"] for site in store_format.sites(self.manifest))

    @property
    def dtype(self) -> np.dtype:
        """dtype of the rows; bfloat16 is that of ml_dtypes."""
        return store_format.numpy_dtype(self.manifest["dtype"])

    @property
    def complete(self) -> bool:
        """Whether the store will grow no more."""
        return self.manifest["complete"]

    def rows(self, start: int, stop: int) -> Shaped[np.ndarray, "n d_in"]:
        """Rows start ... stop - 1 in the store's dtype; a read-only view where one shard holds them all."""
        return self._range(".rows", start, stop)

    def sha256_of_rows(self, n_rows: int) -> str:
        """Hash of the first `n_rows` rows, from the checksums of their shards; reads no file."""
        last = bisect.bisect_left(self._ends, n_rows)
        shards = [
            (shard["rows"], shard["sha256"][store_format.shard_name(number) + ".rows"])
            for number, shard in enumerate(self._shards[: last + 1])
        ]
        facts = {"rows": n_rows, "dtype": self.manifest["dtype"], "d_in": self.d_in, "shards": shards}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def identity(self, n_rows: int | None = None) -> dict[str, Any]:
        """Identity of the data: rows, and a hash of the checksums of all files of their shards; reads no file.

        Args:
          n_rows: of the first shards only, those that held so many rows when it was asked before; None for all.
        """
        last = len(self._shards) if n_rows is None else bisect.bisect_left(self._ends, n_rows) + 1
        shards = [[shard["rows"], sorted(shard["sha256"].items())] for shard in self._shards[:last]]
        facts = {"dtype": self.manifest["dtype"], "d_in": self.d_in, "shards": shards}
        rows = sum(shard["rows"] for shard in self._shards[:last])
        return {"rows": rows, "sha256": hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()}

    def shards(self) -> list[tuple[str, int, int]]:
        """Name, first row and end of the rows of every shard, in order."""
        return [
            (store_format.shard_name(number), end - shard["rows"], end)
            for number, (shard, end) in enumerate(zip(self._shards, self._ends, strict=True))
        ]

    def damaged(self) -> dict[str, str]:
        """Shards whose rows are missing, cut off or changed, and what is wrong with each; reads every byte of them."""
        found = {}
        for number, (name, _, _) in enumerate(self.shards()):
            try:
                self._map(number, ".rows")
            except UserError as error:
                found[name] = str(error)
        return found

    def index(self, start: int, stop: int) -> Int32[np.ndarray, "n 4"]:
        """Token id, position in its segment, document and sequence of rows start ... stop - 1."""
        return self._range(".index", start, stop)

    def block(self, number: int, block_rows: int) -> Shaped[np.ndarray, "n d_in"]:
        """Rows of block `number`: `block_rows` of them, fewer in the last block of the store."""
        return self.rows(number * block_rows, min((number + 1) * block_rows, self.n_rows))

    def sequences(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and segments, int32 [stop - start, context_length] each, of sequences start ... stop - 1."""
        if not 0 <= start <= stop <= self.n_sequences:
            raise IndexError(f"sequences {start}:{stop} of a store that holds {self.n_sequences}")
        size = self.manifest["shard_sequences"]
        parts = [
            self._map(number, ".tokens")[max(start - number * size, 0) : stop - number * size]
            for number in range(start // size, -(-stop // size))
        ]
        empty = np.empty((0, self.manifest["context_length"], 2), store_format.INT)
        both = np.concatenate(parts) if parts else empty
        return both[..., 0], both[..., 1]

    def tokens(self, sequence: int) -> tuple[Int32[np.ndarray, " context"], Int32[np.ndarray, " context"]]:
        """Tokens and segments of one sequence, as the language model saw them."""
        tokens, segments = self.sequences(sequence, sequence + 1)
        return tokens[0], segments[0]

    def trace(self, row: int) -> Origin:
        """The token that a row was read at.

        `tokens(origin.sequence)[0][origin.column]` is that token again, with its context around it.
        """
        token, position, document, sequence = (int(value) for value in self.index(row, row + 1)[0])
        number, place = divmod(sequence, self.manifest["shard_sequences"])
        try:
            segment = 1 + self._record(number)["segment_documents"][place].index(document)
            _, segments = self.tokens(sequence)
            column = int(np.flatnonzero((segments == segment) & (packing.positions(segments) == position))[0])
        except (LookupError, ValueError):
            raise UserError(
                f"{self._file(number, '.json')} is damaged: row {row} is not in sequence {sequence}"
            ) from None
        return Origin(token, position, document, sequence, column)

    def _range(self, suffix: str, start: int, stop: int) -> np.ndarray:
        if not 0 <= start <= stop <= self.n_rows:
            raise IndexError(f"rows {start}:{stop} of a store that holds {self.n_rows}")
        parts = []
        number = bisect.bisect_right(self._ends, start)
        while start < stop:
            begin = self._ends[number] - self._shards[number]["rows"]
            end = min(stop, self._ends[number])
            if end > start:
                parts.append(self._map(number, suffix)[start - begin : end - begin])
            start, number = end, number + 1
        if not parts:
            dtype, shape = store_format.shard_shapes({"rows": 0, "sequences": 0}, self.manifest)[suffix]
            return np.empty(shape, dtype)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _map(self, number: int, suffix: str) -> np.ndarray:
        file = self._file(number, suffix)
        with self._lock:
            if file.name in self._maps:
                self._maps.move_to_end(file.name)
                return self._maps[file.name]
            dtype, shape = store_format.shard_shapes(self._shards[number], self.manifest)[suffix]
            mapped = _open_map(file, dtype, shape)
            if self._verify:
                _check(file, mapped, self._shards[number]["sha256"][file.name])
            self._maps[file.name] = mapped
            if len(self._maps) > _OPEN_MAPS:
                self._maps.popitem(last=False)
            return mapped

    def _record(self, number: int) -> dict:
        shard = self._shards[number]
        if "segment_documents" not in shard:  # the manifest's table leaves them to the shard's own record
            file, wanted = self._file(number, ".json"), shard.get("json_sha256")
            content = file.read_bytes() if file.is_file() else b""
            if self._verify and wanted is not None and hashlib.sha256(content).hexdigest() != wanted:
                raise UserError(f"{file} is missing, or not that of the harvest: {_REMEDY}")
            record = store_schema.read_record(self.path, number)
            if "segment_documents" not in record:
                raise UserError(f"{file}: segment_documents is missing: {_REMEDY}")
            shard["segment_documents"] = record["segment_documents"]
        return shard

    def _file(self, number: int, suffix: str) -> pathlib.Path:
        return json_yaml.inside(self.path, store_format.shard_name(number) + suffix)

    def __getstate__(self) -> dict:
        """For worker processes: the maps and the lock stay here."""
        return {"path": self.path, "verify": self._verify}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["path"], verify=state["verify"])


def _open_map(file: pathlib.Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    expected = dtype.itemsize * math.prod(shape)
    size = file.stat().st_size if file.is_file() else None
    if size != expected:
        found = "is missing" if size is None else f"has {size} bytes"
        raise UserError(f"{file} {found}, expected {expected} bytes: {_REMEDY}")
    if expected == 0:
        return np.empty(shape, dtype)
    return np.memmap(file, mode="r", dtype=np.uint8).view(np.ndarray).view(dtype).reshape(shape)


def _check(file: pathlib.Path, mapped: np.ndarray, sha256: str) -> None:
    """Refuses a file that is not what its record says; one that was compared already is not read again."""
    stat = file.stat()
    key = (str(file.absolute()), stat.st_ino, stat.st_size, stat.st_mtime_ns, sha256)
    if key in _SOUND:
        return
    if hashlib.sha256(mapped.reshape(-1).view(np.uint8).data).hexdigest() != sha256:
        raise UserError(f"{file}: the checksum is not that of the harvest: {_REMEDY}")
    _SOUND.add(key)


_REMEDY = "the shard is damaged; delete its files and run the same harvest again to write it anew"
