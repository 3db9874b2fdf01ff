"""Activation store writer: shard by shard, so a harvest may be killed at any moment and continued.

Third station of the harvest, after the language model. A shard is a fixed range of sequences, so its content does not
depend on which process writes it or when: process p of P takes shards p, p + P, ... A published shard is never written
again, and an unpublished one leaves no trace, so there are no duplicates. Writers share a store only as different p of
one P; any other writer is refused.
"""

import contextlib
import hashlib
import json
import logging
import os
import pathlib
import re
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Float, Int32

from saejax.activations.store import check as store_check
from saejax.activations.store import files as store_format
from saejax.activations.store import manifest_schema as store_schema
from saejax.errors import UserError
from saejax.fields import paths
from saejax.storage import atomic, lock

logger = logging.getLogger(__name__)

TURN, TURN_SECONDS = ".writers.lock", 3.0
"""Held for the moment in which a writer is admitted; a writer waits so long for those that come with it."""
_NAME = re.compile(r"(\.writer-(\d+)(?:-of-(\d+))?\.lock)")
"""Held by a writer while it is one; saejax 0.1 has the form without `-of-`."""
_LEFT = re.compile(r"\.?(?:shard-(\d+)\.\w+|manifest\.json)\.(?:[0-9a-f]{16}\.partial|partial(?:-\d+)?)")
"""An unfinished file, and the number of its shard; saejax 0.1 has the second form."""


class Writer:
    """One process's hand on a store: creates or reopens it, writes its share of the shards, completes it.

    Use as a context manager; see `admitted` for who may share a store.
    """

    def __init__(self, path: str | os.PathLike, facts: dict, *, process: int = 0, n_processes: int = 1):
        """Opens the store at `path`.

        Args:
          path: directory of the store; created if missing.
          facts: the manifest's fields but the progress: hook, dtype, d_in, context_length, shard_sequences,
            n_shards, sink, model, ... JSON-able.
          process: number of this writer, in [0, n_processes).
          n_processes: how many writers share the shards.

        Raises:
          UserError: the store was begun with other facts, or another process is writing it.
        """
        if not 0 <= process < n_processes:
            raise UserError(f"process must be in [0, n_processes={n_processes}), got {process}")
        self.path = paths.local(path, "path")
        self.process, self.n_processes = process, n_processes
        with _turn(self.path):
            self._lock, alone = _admitted(self.path, process, n_processes)
            try:
                self.manifest = self._open_manifest(facts, alone)
                self._remove_left(alone)
            except BaseException:
                self._lock.release()
                raise

    def _open_manifest(self, facts: dict, alone: bool) -> dict:
        # `sealed` is part of what the fingerprint is of: a manifest that says so has a checksum once it is complete.
        wanted = {"format": store_format.FORMAT, "format_version": store_format.FORMAT_VERSION, "sealed": True, **facts}
        wanted = json.loads(json.dumps(wanted))  # tuples become lists, as they will read back
        wanted["fingerprint"] = store_format.fingerprint(wanted)
        begun = {**wanted, "complete": False, "rows": 0, "shards": []}
        file = self.path / store_format.MANIFEST
        store_format.write_json(file, begun, keep_existing=True)
        manifest = store_schema.read_manifest(self.path)
        try:
            check_same({key: value for key, value in wanted.items() if key != "sealed"}, manifest, self.path)
        except UserError:
            # Nothing is lost by changing one's mind before the first shard.
            if store_format.published(self.path) or not alone:
                raise
            store_format.write_json(file, begun)
            return begun
        return manifest

    def _remove_left(self, all_of_them: bool = False) -> None:
        """Removes unfinished files of writers that are gone: of the shards of this one, which no other has."""
        for file in self.path.iterdir():
            found = _LEFT.fullmatch(file.name)
            if found and (all_of_them or found[1] and int(found[1]) % self.n_processes == self.process):
                file.unlink(missing_ok=True)

    def missing(self) -> list[int]:
        """Shards of this process that are not published yet, or no longer whole, in order."""
        there = set(store_format.published(self.path))
        missing = []
        for number in range(self.process, self.manifest["n_shards"], self.n_processes):
            if number in there and not store_check.is_whole(self.path, number, self.manifest):
                logger.warning("%s of %s is damaged and is written again", store_format.shard_name(number), self.path)
                (self.path / f"{store_format.shard_name(number)}.json").unlink()
                there.remove(number)
            missing += [number] * (number not in there)
        return missing

    def shard(self, number: int) -> "ShardWriter":
        """The writer of one shard, as a context: published when left, forgotten when left by an exception."""
        return ShardWriter(self.path, number, self.manifest)

    def finish(self) -> bool:
        """Completes the manifest if the shards of all processes are published; returns whether they are."""
        there = store_format.published(self.path)
        if there != list(range(self.manifest["n_shards"])):
            return False
        files = [self.path / f"{store_format.shard_name(n)}.json" for n in there]
        records = [store_format.read_json(file) for file in files]
        table = [
            {key: value for key, value in record.items() if key != "segment_documents"}
            | {"json_sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
            for record, file in zip(records, files, strict=True)
        ]
        self.manifest |= {"complete": True, "rows": sum(r["rows"] for r in records), "shards": table}
        self.manifest["sha256"] = store_format.checksum(self.manifest)
        store_format.write_json(self.path / store_format.MANIFEST, self.manifest)
        return True

    def close(self) -> None:
        """Removes what an interrupt left unfinished, and lets others in."""
        self._remove_left()
        self._lock.release()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_) -> None:
        self.close()


class ShardWriter:
    """Appends to one shard; nothing of it exists for readers until the context ends well."""

    def __init__(self, path: pathlib.Path, number: int, manifest: dict):
        self._path, self._manifest = path, manifest
        self._name = store_format.shard_name(number)
        self._files: dict[str, BinaryIO] = {}
        self._partial: dict[str, pathlib.Path] = {}
        self._hashes = {suffix: hashlib.sha256() for suffix in store_format.DATA_SUFFIXES}
        self._rows = self._sequences = self._tokens = 0
        self._masked: Counter[str] = Counter()
        self._segment_documents: list[list[int]] = []

    def append(
        self,
        rows: Float[np.ndarray, "n d_in"],
        index: Int32[np.ndarray, "n 4"],
        tokens: Int32[np.ndarray, "sequences context 2"],
        *,
        segment_documents: list[list[int]],
        masked: dict[str, int],
    ) -> None:
        """Adds whole sequences.

        Args:
          rows: activations of the tokens that are kept; checked for overflow where the dtype must be changed.
          index: token id, position in its segment, document, sequence of each row.
          tokens: token id and segment of every token of the sequences, kept or not.
          segment_documents: for each sequence the document of segment 1, 2, ...
          masked: how many tokens were left out, by reason.

        Raises:
          UserError: the dtype would overflow, or the disk is full.
        """
        arrays = {".rows": self._stored(rows), ".index": index, ".tokens": tokens}
        added = {"rows": len(rows), "sequences": len(tokens)}
        for suffix, (dtype, shape) in store_format.shard_shapes(added, self._manifest).items():
            if arrays[suffix].shape != shape:
                raise ValueError(f"{suffix[1:]} must have shape {shape}, got {arrays[suffix].shape}")
            data = np.ascontiguousarray(arrays[suffix], dtype).reshape(-1).view(np.uint8).data
            self._hashes[suffix].update(data)
            with store_format.disk_errors(self._path):
                self._files[suffix].write(data)
        self._rows += len(rows)
        self._sequences += len(tokens)
        self._tokens += int((tokens[..., 1] > 0).sum())
        self._masked.update(masked)
        self._segment_documents += segment_documents

    def _stored(self, rows: np.ndarray) -> np.ndarray:
        name = self._manifest["dtype"]
        if rows.dtype == store_format.numpy_dtype(name) or not len(rows):
            return rows
        store_format.check_range(float(np.abs(rows).max()), name, self._manifest["hook"])
        return rows.astype(store_format.numpy_dtype(name))

    def __enter__(self) -> "ShardWriter":
        with store_format.disk_errors(self._path):
            for suffix in store_format.DATA_SUFFIXES:
                self._files[suffix], self._partial[suffix] = atomic.partial(self._path / (self._name + suffix))
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            if kind is None:
                self._publish()
        finally:
            self._discard()

    def _publish(self) -> None:
        with store_format.disk_errors(self._path):
            for file in self._files.values():
                file.flush()
                os.fsync(file.fileno())
            for suffix in self._files:
                atomic.publish(self._partial[suffix], self._path / (self._name + suffix))
            atomic.sync_directory(self._path)
        record = {
            "name": self._name,
            "rows": self._rows,
            "sequences": self._sequences,
            "tokens": self._tokens,
            "masked": dict(self._masked),
            "sha256": {self._name + suffix: h.hexdigest() for suffix, h in self._hashes.items()},
            "segment_documents": self._segment_documents,
        }
        store_format.write_json(self._path / f"{self._name}.json", record)

    def _discard(self) -> None:
        for suffix, file in self._files.items():
            try:
                file.close()
            except OSError as error:  # the rest of a buffer on a full disk: the shard is lost anyway
                logger.debug("closing %s: %s", self._name + suffix, error)
            self._partial[suffix].unlink(missing_ok=True)


def admitted(path: str | os.PathLike, *, process: int = 0, n_processes: int = 1) -> lock.Lock:
    """Becomes a writer of a store, to be held until its writing is over; a `Writer` in it takes the same again.

    Writers with different numbers of the same `n_processes` share a store. Anything else is refused: they would write
    the same shards.

    Args:
      path: directory of the store; created if missing.
      process: number of this writer, in [0, n_processes).
      n_processes: how many writers share the shards.

    Raises:
      UserError: another writes it; names it.
    """
    path = paths.local(path, "path")
    with _turn(path):
        return _admitted(path, process, n_processes)[0]


@contextlib.contextmanager
def _turn(path: pathlib.Path) -> Iterator[None]:
    """Admits one writer at a time, so that its view of the others holds until it is one of them."""
    until, held = time.monotonic() + TURN_SECONDS, None
    with store_format.disk_errors(path):
        while held is None:
            try:
                held = lock.hold(path, "a harvest that begins", name=TURN)
            except UserError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.01)
    with held:
        yield


def _admitted(path: pathlib.Path, process: int, n_processes: int) -> tuple[lock.Lock, bool]:
    """The lock of a writer, and whether it is the only one; in its turn."""
    own, alone = f".writer-{process}-of-{n_processes}.lock", True
    for name, number, of in sorted({found.groups() for file in path.iterdir() if (found := _NAME.match(file.name))}):
        if name == own:
            continue
        try:
            lock.hold(path, name=name).release()
        except UserError:
            if of != str(n_processes) or int(number) == process:
                raise
            alone = False
    return lock.hold(path, f"harvest (writer {process} of {n_processes})", name=own, again=True), alone


def check_same(wanted: dict, manifest: dict, path: pathlib.Path) -> None:
    """Refuses to continue a store that was begun with other facts; names the first that differs.

    The measured sink median is no choice: the one that the store was begun with stays.
    """
    there = dict(_flat(manifest))
    for field, value in _flat(wanted):
        if field in ("fingerprint", "sink.median_norm"):
            continue
        if not _same(field, there.get(field), value):
            name = field.removeprefix("harvest.")  # the settings, by the names that the user types
            raise UserError(
                f"{name} is {value!r}, but the store at {path} was begun with {there.get(field)!r}; "
                "choose another path or put the setting back"
            )


_PLACES = ("harvest.model", "text.path", "text.origin.files")
"""Facts that are paths, which stores of older versions hold as they were typed."""


def _same(field: str, before: object, now: object) -> bool:
    return before == now or field in _PLACES and _absolute(before) == _absolute(now)


def _absolute(place: Any) -> Any:
    if isinstance(place, list):
        return [_absolute(part) for part in place]
    if not isinstance(place, str):
        return place
    marker, path = ("torch:", place[6:]) if place.startswith("torch:") else ("", place)
    return marker + os.path.abspath(os.path.expanduser(path))


def _flat(tree: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    # The settings first: a message about what the user typed says more than one about its consequence.
    for key in sorted(tree, key=lambda key: key != "harvest"):
        value = tree[key]
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
