"""Arrays on disk as a source: activations of any network, recordings of neurons, any [n, d_in].

It reads a `.npy` file, a tensor of a `.safetensors` file, or a directory of `.npy` files at all depths, end to end in
name order. Everything is memory-mapped; a batch touches only its own rows.
"""

import dataclasses
import hashlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np

from saejax.activations import array_digest, array_files
from saejax.activations.loader import PREFETCH_RECORDS, Identity, Stream, digest, open_rows
from saejax.activations.source import ActivationSource, differences, register
from saejax.errors import UserError
from saejax.fields import numeric, paths
from saejax.fields.resume_policy import Fixed, Free, Place

log = logging.getLogger(__name__)


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Arrays(ActivationSource):
    """Rows of arrays on disk. 16-bit floats and float32 keep their dtype; other numbers become float32."""

    name: ClassVar[str] = "arrays"

    path: Place[paths.Local]
    """A .npy file, a .safetensors file, or a directory of .npy files; arrays [n, d_in]."""
    tensor: Fixed[str] = ""
    """Name of the tensor in a .safetensors file; empty where the file holds only one."""
    sites: Fixed[tuple[int, ...]] = ()
    """Widths of the parts of a row that come from different hooks, in order (each >= 1; their sum is the row's width);
    fewer than two mean one part."""
    heldout_share: Fixed[float] = 0.05
    """Share of the rows, the last ones, kept for evaluation and never trained on (in [0, 1))."""
    refuse_nonfinite: Free[bool] = True
    """Whether to name a row with NaN or an infinity and end the run when it is read; false leaves it to
    train.on_nonfinite."""

    def __post_init__(self):
        numeric.check(self, "source.")
        paths.settle(self, "source.")
        object.__setattr__(self, "sites", tuple(self.sites) if len(self.sites) > 1 else ())
        if not 0 <= self.heldout_share < 1:
            raise UserError(f"source.heldout_share = {self.heldout_share}: a share in [0, 1) is needed")

    @property
    def d_in(self) -> int:
        """Width of a row, from the headers of the files.

        Raises:
            UserError: the files cannot be read, or `sites` do not add up to it.
        """
        width = self._table().shape[1]
        if self.sites and (min(self.sites) < 1 or sum(self.sites) != width):
            wanted = f"positive widths that add up to {width} are needed{self._table().hint()}"
            raise UserError(f"source.sites = {list(self.sites)}: {wanted}")
        return width

    @property
    def site_widths(self) -> tuple[int, ...]:
        """`sites`, or the width of the files where fewer than two are given."""
        width = self.d_in  # which compares the two
        return self.sites or (width,)

    def n_train(self) -> int:
        """Rows before the held-out ones."""
        n = self._table().shape[0]
        return n - round(n * self.heldout_share)

    def identity(self) -> dict[str, Any]:
        """Numbers of rows, and a hash of all of them; `array_digest` explains its sample beyond a GiB."""
        table = self._table()
        n, d_in = table.shape
        facts = {"type": self.name, "d_in": d_in, "dtype": table.dtype.name, "rows": n}
        return facts | {"heldout_rows": n - self.n_train(), "sha256": array_digest.of(table)}

    def fingerprint(self) -> dict[str, Any]:
        """The identity, and of each file its name, shape, dtype and a hash of its first and last MiB."""
        files = [{"file": label} for label, _ in self._table().parts]
        parts = [file | ends for file, ends in zip(files, self._ends(), strict=True)]
        identity = self.identity()
        return {"type": self.name, "heldout_share": self.heldout_share, "identity": identity, "parts": parts}

    def differs_from(self, saved: Mapping[str, Any]) -> str | None:
        """As for every source; records of older versions are compared by the ends of the files, their only content."""
        if isinstance(parts := saved.get("parts"), list) and "identity" not in saved:
            now = {"type": self.name, "heldout_share": self.heldout_share, "parts": self._ends()}
            kept = [{key: part[key] for key in part if key != "file"} for part in parts if isinstance(part, dict)]
            return differences({**saved, "parts": kept}, now)
        return super().differs_from(saved)

    def open(
        self, *, n_lanes: int, block_rows: int, lanes: range, seed: int, prefetch: int = PREFETCH_RECORDS
    ) -> Stream:
        """Blocks of the training rows, shuffled anew each epoch. A NaN or an infinity may end in a UserError."""
        table = self._table()
        if hint := table.hint():
            log.warning("source.path = %s%s", self.path, hint)
        facts = {key: value for key, value in self.identity().items() if key not in ("type", "heldout_rows")}
        return open_rows(
            table.first(self.n_train(), refuse_nonfinite=self.refuse_nonfinite),
            identity=Identity(lambda n_rows: digest(facts), older=lambda n_rows: digest(self._ends())),
            n_lanes=n_lanes,
            block_rows=block_rows,
            lanes=lanes,
            seed=seed,
            prefetch=prefetch,
            hint=hint,
        )

    def heldout(self, batch: int, max_rows: int | None = None) -> Iterator[np.ndarray]:
        """Yield the last rows, in order; at most `max_rows`. Nothing where the share is less than a row."""
        table, start = self._table(), self.n_train()
        return table.blocks(batch, start, None if max_rows is None else start + max_rows)

    def _ends(self) -> list[dict[str, Any]]:
        """Shape, dtype and ends of each file: what older versions knew of the data."""
        return [
            {"shape": list(part.shape), "dtype": part.dtype.name, "sha256_of_ends": _hash_ends(part)}
            for _, part in self._table().parts
        ]

    def _table(self) -> array_files.Table:
        return array_files.open_table(self.path, self.tensor)


def _hash_ends(part: np.ndarray) -> str:
    """sha256 of about the first and the last MiB of an array, in whole rows."""
    n = 1 + (1 << 20) // (part.shape[1] * part.dtype.itemsize)
    ends = (np.ascontiguousarray(rows).view(np.uint8) for rows in (part[:n], part[-n:]))
    return hashlib.sha256(b"".join(end.tobytes() for end in ends)).hexdigest()
