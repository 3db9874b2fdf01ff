"""Array files as one table of rows: a .npy or .safetensors file, or a directory of .npy files end to end.

`Table` checks every row that it hands out, and names the first that is not finite by file and row.
"""

import functools
import logging
import os
import pathlib
from collections.abc import Iterator

import ml_dtypes
import numpy as np

from saejax.activations import array_map
from saejax.errors import UserError

log = logging.getLogger(__name__)

_EXPONENTS = {
    np.dtype(np.float32): (np.uint32, 0x7F800000),
    np.dtype(np.float16): (np.uint16, 0x7C00),
    np.dtype(ml_dtypes.bfloat16): (np.uint16, 0x7F80),
}
"""Per dtype: the integer of its size, and the exponent bits; all set means infinite or not a number."""


class Table:
    """Several memory-mapped arrays end to end, as one [n, d_in] to slice; checks that rows are finite.

    Args:
      parts: file and array [n_i, d_in] each; at least one.
      field: key by which the user named them, for messages.
      stop: rows to offer, from the first; None for all.
      refuse_nonfinite: whether a NaN or an infinity is refused.
    """

    def __init__(
        self,
        parts: list[tuple[str, np.ndarray]],
        *,
        field: str = "source.path",
        stop: int | None = None,
        refuse_nonfinite: bool = True,
    ):
        self.parts, self.field, self._refuses = parts, field, refuse_nonfinite
        self._ends = np.cumsum([len(part) for _, part in parts])
        dtypes = {part.dtype.newbyteorder("=") for _, part in parts}
        dtype = dtypes.pop()
        self.dtype = dtype if not dtypes and dtype in _EXPONENTS else np.dtype(np.float32)
        self.shape = (int(self._ends[-1]) if stop is None else stop, parts[0][1].shape[1])

    def first(self, n_rows: int, *, refuse_nonfinite: bool = True) -> "Table":
        """The first rows alone."""
        return Table(self.parts, field=self.field, stop=n_rows, refuse_nonfinite=refuse_nonfinite)

    def hint(self) -> str:
        """Advice where the rows are too few, or of an odd width: "" unless they may be columns."""
        n, d_in = self.shape
        return f"; they are {n} rows of width {d_in}: is the array [d_in, n], transposed?" if n < d_in else ""

    def blocks(self, batch: int, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        """Yields rows [<= batch, d_in] in order."""
        stop = self.shape[0] if stop is None else min(stop, self.shape[0])
        for at in range(start, stop, batch):
            yield self[at : min(at + batch, stop)]

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Rows start ... stop - 1 in `dtype`.

        Raises:
          UserError: one of them is not finite, or is not in float32.
        """
        start, stop, _ = rows.indices(self.shape[0])
        pieces = []
        number = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            label, part = self.parts[number]
            begin = int(self._ends[number]) - len(part)
            end = min(stop, int(self._ends[number]))
            raw = part[start - begin : end - begin]
            piece = _cast(raw, self.dtype)
            if self._refuses:
                self._check(piece, raw, label, start - begin)
            pieces.append(piece)
            start, number = end, number + 1
        if not pieces:
            return np.empty((0, self.shape[1]), self.dtype)
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _check(self, piece: np.ndarray, raw: np.ndarray, label: str, first: int) -> None:
        """The exponent bits alone tell NaN and Inf, several times faster than np.isfinite on 16-bit floats."""
        integer, mask = _EXPONENTS[piece.dtype]
        exponents = np.ascontiguousarray(piece).view(integer) & integer(mask)
        if exponents.max() == mask:
            row, column = np.argwhere(exponents == mask)[0]
            where, value = f"{self.field} = {label}: row {first + row}", raw[row, column]
            if np.isfinite(value):
                largest = float(ml_dtypes.finfo(piece.dtype).max)
                raise UserError(
                    f"{where} holds {value:.6g}, and {piece.dtype.name} ends at {largest:.6g}; scale the array down"
                )
            raise UserError(f"{where} holds NaN or an infinity; clean the array first")
        if raw.dtype.itemsize > piece.dtype.itemsize and not piece.any() and raw.any():
            raise UserError(
                f"{self.field} = {label}: rows from {first} on hold nothing above {np.abs(raw).max():.6g}, which "
                f"{piece.dtype.name} rounds to 0; scale the array up"
            )


def _cast(rows: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore", under="ignore"):  # an overflow becomes Inf, which is refused by name
        return rows.astype(dtype, copy=False)


def open_table(path: str | os.PathLike[str], tensor: str = "", field: str = "source.path") -> Table:
    """Maps the arrays under a path; headers are read again only where a file has changed.

    Args:
      path: a .npy or .safetensors file, or a directory of .npy files.
      tensor: name of the tensor in a .safetensors file; empty where it holds only one.
      field: key that the user named it by, for messages.

    Raises:
      UserError: nothing readable there, or the arrays are not [n, d_in] of one width.
    """
    try:
        return _table(stamps(find(pathlib.Path(path), field)), tensor, field)
    except OSError as error:
        raise UserError(f"{field} = {error.filename or path}: cannot be read ({error.strerror or error})") from None


Stamp = tuple[str, int, int, int]
"""Path, inode, size and time of writing of a file: what changes when its bytes do."""


def stamps(files: list[pathlib.Path]) -> tuple[Stamp, ...]:
    """The stamp of each file."""
    found = ((file, file.stat()) for file in files)
    return tuple((str(file), stat.st_ino, stat.st_size, stat.st_mtime_ns) for file, stat in found)


@functools.lru_cache(maxsize=8)
def _table(files: tuple[Stamp, ...], tensor: str, field: str) -> Table:
    parts = [(path, array_map.rows_of(pathlib.Path(path), tensor, field)) for path, *_ in files]
    for label, part in parts:
        if part.shape[1] != parts[0][1].shape[1]:
            raise UserError(f"{field} = {label}: width {part.shape[1]}, but {parts[0][0]} has {parts[0][1].shape[1]}")
    return Table(parts, field=field)


def find(root: pathlib.Path, field: str) -> list[pathlib.Path]:
    """The files of a path. In a directory: at all depths, in name order, without hidden ones.

    Links are followed, also to directories; each target counts once.

    Raises:
      UserError: there is none.
    """
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise UserError(f"{field} = {root}: no .npy or .safetensors file, nor a directory of .npy files")
    met: set[str] = set()
    files = []
    for file in sorted(_below(root, met, field), key=lambda file: file.relative_to(root).parts):
        if (real := os.path.realpath(file)) in met:
            log.warning("%s = %s is %s, which was read already: left out", field, file, real)
            continue
        met.add(real)
        files.append(file)
    if not files:
        others = sorted(root.glob("*.safetensors"))
        hint = f"; {others[0].name} is read by its own name" if others else ""
        raise UserError(f"{field} = {root}: no .npy or .safetensors file, nor a directory of .npy files{hint}")
    return files


def _below(folder: pathlib.Path, met: set[str], field: str) -> Iterator[pathlib.Path]:
    if (real := os.path.realpath(folder)) in met:
        log.warning("%s = %s is %s, which was read already: left out", field, folder, real)
        return
    met.add(real)
    for path in (folder / name for name in sorted(os.listdir(folder)) if not name.startswith(".")):
        if path.is_dir():
            yield from _below(path, met, field)
        elif path.suffix == ".npy":
            if not path.exists():
                raise UserError(f"{field} = {path}: a link that leads nowhere")
            yield path
