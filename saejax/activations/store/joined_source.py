"""Stores of the same tokens side by side: layers harvested apart, or two models with one tokenizer.

A row joins the rows of all stores at one token, in the order of the paths. saejax verifies that the tokens are the
same: a store's index names the token of every row, and the index checksums of all shards must agree.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np

from saejax.activations import store
from saejax.activations.loader import PREFETCH_RECORDS, Identity, Stream, digest, open_rows
from saejax.activations.source import ActivationSource, differences, recorded, register
from saejax.activations.store import files as store_format
from saejax.activations.store.source import Store, Verify
from saejax.errors import UserError
from saejax.fields import paths
from saejax.fields.paths import Local
from saejax.fields.resume_policy import Place


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Joined(ActivationSource):
    """Rows of several finished activation stores, concatenated token by token."""

    name: ClassVar[str] = "joined"

    paths: Place[tuple[Local, ...]]
    """Directories that `saejax harvest` wrote, at least 2, in the order in which their rows are joined."""
    verify: Place[Verify] = Verify.first_use
    """When checksums are compared, as for source=store; a damaged shard is refused."""

    def __post_init__(self):
        paths.settle(self, "source.")
        if len(self.paths) < 2:
            raise UserError(f"source.paths = {list(self.paths)}: at least 2 stores are needed; source=store reads one")

    @property
    def d_in(self) -> int:
        """Width of a row: the widths of the stores together."""
        return sum(self.site_widths)

    @property
    def site_widths(self) -> tuple[int, ...]:
        """Widths at the hooks of the stores, in order."""
        return tuple(width for reader in self.readers("train") for width in reader.sites)

    def readers(self, split: str) -> list[store.Reader]:
        """The stores of a split, `train` or `heldout`, which hold the same tokens.

        Raises:
            UserError: a store is missing or unfinished, or its rows are of other tokens than those of the first.
        """
        readers = [Store(path=path, verify=self.verify).reader(split) for path in self.paths]
        for reader in readers:
            if not reader.complete:
                raise UserError(f"source.paths: the harvest of {reader.path} is not finished; run it again to continue")
        first, *others = readers
        for other in others:
            if _tokens(other) != _tokens(first):
                raise UserError(
                    f"source.paths: {other.path} has rows of other tokens than {first.path}; harvest the same text "
                    "with the same settings and sink_factor=null, or all hooks at once with hook='\"A,B\"'"
                )
        return readers

    def identity(self) -> dict[str, Any]:
        """The identities of the stores, in order."""
        return {"type": self.name, "stores": [one.identity() for one in self._stores()]}

    def fingerprint(self) -> dict[str, Any]:
        """The fingerprints of the stores, in order."""
        stores = [one.fingerprint() for one in self._stores()]
        return {"type": self.name, "identity": self.identity(), "stores": stores}

    def differs_from(self, saved: Mapping[str, Any]) -> str | None:
        """As of every source, for each store by itself."""
        then, stores = recorded(saved), self._stores()
        parts = then.get("stores")
        if then.get("type") != self.name or not isinstance(parts, list) or len(parts) != len(stores):
            return differences(then, {"type": self.name, "stores": [one.identity() for one in stores]})
        for number, (part, one) in enumerate(zip(parts, stores, strict=True), start=1):
            if found := one.differs_from(part if isinstance(part, dict) else {}):
                return f"store {number}: {found}"
        return None

    def _stores(self) -> list[Store]:
        return [Store(path=path, verify=self.verify) for path in self.paths]

    def open(
        self, *, n_lanes: int, block_rows: int, lanes: range, seed: int, prefetch: int = PREFETCH_RECORDS
    ) -> Stream:
        """Blocks of the training rows, shuffled anew each epoch."""
        if self.verify is Verify.start:
            for path in self.paths:
                Store(path=path, verify=self.verify).rows("train")
        readers = self.readers("train")
        return open_rows(
            _JoinedRows(readers),
            identity=Identity(lambda n_rows: digest([reader.sha256_of_rows(n_rows) for reader in readers])),
            n_lanes=n_lanes,
            block_rows=block_rows,
            lanes=lanes,
            seed=seed,
            prefetch=prefetch,
        )

    def heldout(self, batch: int, max_rows: int | None = None) -> Iterator[np.ndarray]:
        """Yield the rows of the held-out stores, in order; at most `max_rows`."""
        rows = _JoinedRows(self.readers("heldout"))
        total = rows.shape[0] if max_rows is None else min(max_rows, rows.shape[0])
        for start in range(0, total, batch):
            yield rows[start : min(start + batch, total)]


class _JoinedRows:
    """Readers side by side, sliced like one array; float32 where their dtypes differ."""

    def __init__(self, readers: list[store.Reader]):
        self._readers = readers
        self.shape = (readers[0].n_rows, sum(reader.d_in for reader in readers))
        dtypes = {reader.dtype for reader in readers}
        self.dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(self.shape[0])
        parts = [reader.rows(start, stop).astype(self.dtype, copy=False) for reader in self._readers]
        return np.concatenate(parts, axis=1)


def _tokens(reader: store.Reader) -> list[tuple[int, str]]:
    """Per shard the number of its rows and the checksum of its index: equal exactly where the tokens are."""
    shards = enumerate(reader.manifest["shards"])
    return [(shard["rows"], shard["sha256"][f"{store_format.shard_name(number)}.index"]) for number, shard in shards]
