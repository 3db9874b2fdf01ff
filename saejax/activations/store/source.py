"""Activation store as a source: `train/` for training, `heldout/` for evaluation.

The two lie side by side under one path and hold different documents.
"""

import bisect
import dataclasses
import enum
import hashlib
import json
import logging
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np

from saejax.activations import store
from saejax.activations.loader import PREFETCH_RECORDS, Identity, Stream, digest, open_rows
from saejax.activations.source import ActivationSource, differences, recorded, register
from saejax.errors import UserError
from saejax.fields import paths
from saejax.fields.resume_policy import Place

log = logging.getLogger(__name__)


class Verify(enum.Enum):
    """Time at which the checksums of a store's rows are compared."""

    first_use = "first_use"
    start = "start"
    never = "never"


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Store(ActivationSource):
    """Rows of an activation store, in the dtype they were harvested in."""

    name: ClassVar[str] = "store"

    path: Place[paths.Local]
    """Directory that `saejax harvest` wrote, with the stores train/ and heldout/ in it."""
    verify: Place[Verify] = Verify.first_use
    """When checksums are compared: first_use, when a shard's first row is read; start, all before the first step;
    never. Each costs one reading of the shard per process, about a second per 1.5 GB."""
    skip_damaged: Place[bool] = False
    """Whether to leave out damaged, cut-off and missing shards, counted in run.json, instead of refusing them; all
    shards are then checked before the first step."""

    def __post_init__(self):
        paths.settle(self, "source.")
        if self.skip_damaged and self.verify is Verify.never:
            raise UserError("source.skip_damaged=true needs source.verify=first_use or start, got never")

    @property
    def d_in(self) -> int:
        """Width of a row, from the store's manifest."""
        return self.reader("train").d_in

    @property
    def site_widths(self) -> tuple[int, ...]:
        """Widths at the hooks whose rows lie side by side, from the store's manifest."""
        return self.reader("train").sites

    def reader(self, split: str) -> store.Reader:
        """The store of a split, `train` or `heldout`, with everything that is published now.

        Raises:
            UserError: there is none.
        """
        path = pathlib.Path(self.path) / split
        if not path.is_dir():
            raise UserError(f"source.path = {self.path}: no {split}/ store in it; saejax harvest writes one")
        return store.Reader(path, verify=self.verify is not Verify.never)

    def skipped(self) -> dict[str, list[str]]:
        """Damaged shards that the stream leaves out, by split."""
        return {split: self.rows(split).without for split in ("train", "heldout")} if self.skip_damaged else {}

    def rows(self, split: str) -> "StoreRows":
        """Rows of a split, checked as `verify` and `skip_damaged` say.

        Raises:
            UserError: there are none, or one of the shards is damaged, none may be left out, and all are looked at.
        """
        reader = self.reader(split)
        damaged = reader.damaged() if self.skip_damaged or self.verify is Verify.start else {}
        if damaged and not self.skip_damaged:
            raise UserError(f"{len(damaged)} damaged: {'; '.join(damaged.values())}; or source.skip_damaged=true")
        for name, why in damaged.items():
            log.warning("left out, with its rows: %s of %s (%s)", name, reader.path, why)
        return StoreRows(reader, list(damaged))

    def identity(self) -> dict[str, Any]:
        """Hooks of the rows, and for each split a hash of the checksums of its shards."""
        readers = {split: self.reader(split) for split in ("train", "heldout")}
        train = readers["train"]
        facts = {"type": self.name, "hook": ",".join(train.hooks), "d_in": train.d_in, "dtype": train.dtype.name}
        return facts | {split: reader.identity() for split, reader in readers.items()}

    def differs_from(self, saved: Mapping[str, Any]) -> str | None:
        """As for every source; a store that has grown counts as the same data."""
        then, now = recorded(saved), self.identity()
        if "sha256_of_manifests" in then:
            return self._differs_from_older(then)
        for split in ("train", "heldout"):
            before, after = then.get(split), now[split]
            rows = before.get("rows") if isinstance(before, dict) else None
            if isinstance(rows, int) and 0 <= rows < after["rows"]:
                now[split] = self.reader(split).identity(rows)
                if now[split] == before:
                    log.info("%s/%s has grown from %d to %d rows", self.path, split, rows, after["rows"])
                elif now[split]["rows"] != rows:
                    now[split] = after  # it was cut elsewhere: other data
        return differences(then, now)

    def _differs_from_older(self, then: Mapping[str, Any]) -> str | None:
        """Older versions recorded a hash of the manifests, and those change while a store grows."""
        now = self.fingerprint()
        keys = ["type", "hook", "model", "dtype", "d_in", "sites"]
        keys += ["complete", "rows", "sha256_of_manifests"] if then.get("complete") else []
        before, after = ({key: facts[key] for key in keys if key in facts} for facts in (then, now))
        for facts in (before, after):  # weights are what they are under any name
            model = facts.get("model")
            facts["model"] = (
                {k: model[k] for k in model if k not in ("name", "file")} if isinstance(model, dict) else {}
            )
        return differences(before, after)

    def fingerprint(self) -> dict[str, Any]:
        """Description of the harvest and its place, the identity, and a hash over the manifests."""
        manifests = {split: self.reader(split).manifest for split in ("train", "heldout")}
        digest = hashlib.sha256(json.dumps(manifests, sort_keys=True).encode()).hexdigest()
        keys = ("hook", "model", "dtype", "d_in", "sites", "complete", "rows")
        described = {key: manifests["train"][key] for key in keys if key in manifests["train"]}
        named = {"type": self.name, "path": self.path, "identity": self.identity()}
        return named | {"sha256_of_manifests": digest, **described}

    def open(
        self, *, n_lanes: int, block_rows: int, lanes: range, seed: int, prefetch: int = PREFETCH_RECORDS
    ) -> Stream:
        """Blocks of the training store as published now, shuffled anew each epoch.

        A run resumed after the store has grown continues with its original rows.
        """
        rows = self.rows("train")
        if not rows.reader.complete:
            log.warning("the harvest of %s is not finished: training on its first %d rows", self.path, rows.shape[0])
        return open_rows(
            rows,
            identity=Identity(rows.identity),
            n_lanes=n_lanes,
            block_rows=block_rows,
            lanes=lanes,
            seed=seed,
            prefetch=prefetch,
        )

    def heldout(self, batch: int, max_rows: int | None = None) -> Iterator[np.ndarray]:
        """Yield the rows of the held-out store, in order; at most `max_rows`. Nothing where it has none."""
        rows = self.rows("heldout")
        total = rows.shape[0] if max_rows is None else min(max_rows, rows.shape[0])
        for start in range(0, total, batch):
            yield rows[start : min(start + batch, total)]


class StoreRows:
    """Rows of a reader without some shards, as one array for the loader to slice."""

    def __init__(self, reader: store.Reader, without: list[str]):
        self.reader, self.without = reader, without
        self._kept: list[tuple[int, int, int]] = []  # of each kept shard: place of its first row here; its rows there
        n_rows = 0
        for name, start, stop in reader.shards():
            if name not in without:
                self._kept.append((n_rows, start, stop))
                n_rows += stop - start
        self.shape = (n_rows, reader.d_in)
        self.dtype = reader.dtype

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(self.shape[0])
        if not self.without:
            return self.reader.rows(start, stop)
        number = max(bisect.bisect_right(self._kept, start, key=lambda kept: kept[0]) - 1, 0)
        pieces = []
        for first, begin, end in self._kept[number:]:
            if first >= stop:
                break
            pieces.append(self.reader.rows(begin + max(start - first, 0), min(begin + stop - first, end)))
        return np.concatenate(pieces) if pieces else self.reader.rows(0, 0)

    def identity(self, n_rows: int) -> str:
        """Hash of the first `n_rows` rows."""
        stop = max(begin + min(n_rows - first, end - begin) for first, begin, end in self._kept if first < n_rows)
        before = [name for name, start, _ in self.reader.shards() if name in self.without and start < stop]
        whole = self.reader.sha256_of_rows(stop)
        return digest({"rows": whole, "without": before}) if before else whole
