"""Arrays on disk as a source: activations of any network, recordings of neurons, anything [n, d_in].

A `.npy` file, a tensor of a `.safetensors` file, or a directory of `.npy` files read end to end in the order
of their names. Everything is memory-mapped; rows are touched when a batch needs them.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import pathlib
from collections.abc import Iterator
from typing import Any, ClassVar

import ml_dtypes
import numpy as np

from saejax import numeric
from saejax.activations.loader import PREFETCH_RECORDS, Stream, digest, open_rows
from saejax.activations.source import ActivationSource, register
from saejax.errors import UserError
from saejax.resume_policy import Fixed, Free, Place

log = logging.getLogger(__name__)

_SAFETENSORS_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}

_EXPONENTS = {
    np.dtype(np.float32): (np.uint32, 0x7F800000),
    np.dtype(np.float16): (np.uint16, 0x7C00),
    np.dtype(ml_dtypes.bfloat16): (np.uint16, 0x7F80),
}
"""Per dtype: the integer of its size, and the exponent bits; all set means infinite or not a number."""


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Arrays(ActivationSource):
    """Rows of arrays on disk. 16-bit floats and float32 keep their dtype; other numbers become float32."""

    name: ClassVar[str] = "arrays"

    path: Place[str]
    """A .npy file, a .safetensors file, or a directory of .npy files; arrays [n, d_in]."""
    tensor: Fixed[str] = ""
    """Name of the tensor in a .safetensors file; empty where the file holds only one."""
    sites: Fixed[tuple[int, ...]] = ()
    """Widths of the parts of a row that were read in different places, in order (columns, each >= 1, together all of
    them); fewer than two are one part."""
    heldout_share: Fixed[float] = 0.05
    """Share of the rows, the last ones, kept for evaluation and never trained on (in [0, 1))."""
    refuse_nonfinite: Free[bool] = True
    """Whether a row with NaN or an infinity is named and ends the run when it is read; false leaves it to
    train.on_nonfinite."""

    def __post_init__(self):
        numeric.check(self, "source.")
        # Absolute, so that a run finds its data again from any working directory.
        object.__setattr__(self, "path", str(pathlib.Path(self.path).expanduser().absolute()))
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
            raise UserError(f"source.sites = {list(self.sites)}: positive widths that add up to {width} are needed")
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

    def fingerprint(self) -> dict[str, Any]:
        """Shapes and dtypes of all parts, and a hash of the first and last MiB of each."""
        parts = [
            {
                "file": label,
                "shape": list(part.shape),
                "dtype": part.dtype.name,
                "sha256_of_ends": _hash_ends(part),
            }
            for label, part in self._table().parts
        ]
        return {"type": self.name, "heldout_share": self.heldout_share, "parts": parts}

    def open(
        self, *, n_lanes: int, block_rows: int, lanes: range, seed: int, prefetch: int = PREFETCH_RECORDS
    ) -> Stream:
        """Blocks of the training rows, shuffled anew each epoch. A NaN or an infinity may end in a UserError."""
        return open_rows(
            Table(self._table().parts, stop=self.n_train(), refuse_nonfinite=self.refuse_nonfinite),
            identity=lambda n_rows: self._identity(),
            n_lanes=n_lanes,
            block_rows=block_rows,
            lanes=lanes,
            seed=seed,
            prefetch=prefetch,
        )

    def heldout(self, batch: int, max_rows: int | None = None) -> Iterator[np.ndarray]:
        """Yield the last rows, in order; at most `max_rows`. Nothing where the share is less than a row."""
        table, start = self._table(), self.n_train()
        stop = table.shape[0] if max_rows is None else min(table.shape[0], start + max_rows)
        for at in range(start, stop, batch):
            yield table[at : min(at + batch, stop)]

    def _identity(self) -> str:
        """The fingerprint without the names of the files: what the rows are, wherever they lie."""
        parts = self.fingerprint()["parts"]
        return digest([{key: value for key, value in part.items() if key != "file"} for part in parts])

    def _table(self) -> "Table":
        return _open_table(self.path, self.tensor)


class Table:
    """Several memory-mapped arrays end to end, as one [n, d_in] to slice; checked for NaN and Inf."""

    def __init__(self, parts: list[tuple[str, np.ndarray]], *, stop: int | None = None, refuse_nonfinite: bool = True):
        self.parts, self._refuses = parts, refuse_nonfinite
        self._ends = np.cumsum([len(part) for _, part in parts])
        dtypes = {part.dtype for _, part in parts}
        dtype = dtypes.pop()
        self.dtype = dtype if not dtypes and dtype in _EXPONENTS else np.dtype(np.float32)
        self.shape = (int(self._ends[-1]) if stop is None else stop, parts[0][1].shape[1])

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Rows start ... stop - 1 in `dtype`.

        Raises:
            UserError: one of them is not finite.
        """
        start, stop, _ = rows.indices(self.shape[0])
        pieces = []
        number = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            label, part = self.parts[number]
            begin = int(self._ends[number]) - len(part)
            end = min(stop, int(self._ends[number]))
            piece = _cast(part[start - begin : end - begin], self.dtype)
            if self._refuses:
                _refuse_non_finite(piece, label, start - begin)
            pieces.append(piece)
            start, number = end, number + 1
        if not pieces:
            return np.empty((0, self.shape[1]), self.dtype)
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def _cast(rows: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore"):  # an overflow becomes Inf, which is refused by name
        return rows.astype(dtype, copy=False)


def _refuse_non_finite(rows: np.ndarray, label: str, first: int) -> None:
    """The exponent bits alone tell NaN and Inf, several times faster than np.isfinite on 16-bit floats."""
    integer, mask = _EXPONENTS[rows.dtype]
    exponents = rows.view(integer) & integer(mask)
    if exponents.max() == mask:
        row = first + int((exponents == mask).any(axis=1).argmax())
        raise UserError(f"source.path = {label}: row {row} holds NaN or an infinity; clean the array first")


@functools.lru_cache(maxsize=8)
def _open_table(path: str, tensor: str) -> Table:
    """Map the arrays under `path`; their headers are read once per process.

    Raises:
        UserError: nothing readable there, or the arrays are not [n, d_in] of one width.
    """
    root = pathlib.Path(path).expanduser()
    if root.is_dir():
        files = sorted(root.glob("*.npy"))
    else:
        files = [root]
    if not files or not all(file.is_file() for file in files):
        raise UserError(f"source.path = {path}: no .npy or .safetensors file, nor a directory of .npy files")
    parts = [(str(file), _map_file(file, tensor)) for file in files]
    for label, part in parts:
        if part.ndim != 2 or 0 in part.shape:
            raise UserError(f"source.path = {label}: shape {part.shape}, but rows [n, d_in] are needed")
        if part.dtype.kind not in "fiu" and part.dtype != ml_dtypes.bfloat16:
            raise UserError(f"source.path = {label}: dtype {part.dtype}, but real numbers are needed")
        if part.shape[1] != parts[0][1].shape[1]:
            raise UserError(
                f"source.path = {label}: width {part.shape[1]}, but {parts[0][0]} has {parts[0][1].shape[1]}"
            )
    return Table(parts)


def _map_file(file: pathlib.Path, tensor: str) -> np.ndarray:
    if file.suffix == ".npy":
        if tensor:
            raise UserError(f"source.tensor = {tensor}: only .safetensors files name their tensors")
        try:
            array = np.load(file, mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            raise UserError(f"source.path = {file}: not a readable .npy file ({error})") from None
        # NumPy writes bfloat16 as two bytes without a name; no other type of that size ends up so.
        return array.view(ml_dtypes.bfloat16) if array.dtype == np.dtype("V2") else array
    if file.suffix == ".safetensors":
        return _map_safetensors(file, tensor)
    raise UserError(f"source.path = {file}: .npy or .safetensors is needed")


def _map_safetensors(file: pathlib.Path, tensor: str) -> np.ndarray:
    """Map one tensor: the file is a length (8 bytes, little endian), a JSON header of that length, data."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= file.stat().st_size - 8:
            raise UserError(f"source.path = {file}: not a .safetensors file")
        try:
            header = json.loads(stream.read(length))
        except ValueError:
            raise UserError(f"source.path = {file}: not a .safetensors file") from None
    header.pop("__metadata__", None)
    names = sorted(header)
    name = tensor or (names[0] if len(names) == 1 else "")
    if name not in header:
        raise UserError(f"source.tensor = {tensor or 'not given'}: {file} holds {', '.join(names)}")
    entry = header[name]
    if entry["dtype"] not in _SAFETENSORS_DTYPES:
        raise UserError(f"source.tensor = {name}: dtype {entry['dtype']}, not one of {', '.join(_SAFETENSORS_DTYPES)}")
    dtype, shape = _SAFETENSORS_DTYPES[entry["dtype"]], tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if end - begin != dtype.itemsize * int(np.prod(shape)) or 8 + length + end > file.stat().st_size:
        raise UserError(f"source.path = {file}: the data of tensor {name} is cut off")
    if begin == end:
        return np.empty(shape, dtype)
    return (
        np.memmap(file, mode="r", offset=8 + length + begin, dtype=np.uint8, shape=end - begin)
        .view(dtype)
        .reshape(shape)
    )


def _hash_ends(part: np.ndarray) -> str:
    """sha256 of about the first and the last MiB of an array, in whole rows."""
    n = 1 + (1 << 20) // (part.shape[1] * part.dtype.itemsize)
    ends = (np.ascontiguousarray(rows).view(np.uint8) for rows in (part[:n], part[-n:]))
    return hashlib.sha256(b"".join(end.tobytes() for end in ends)).hexdigest()
