"""Memory map of one array file: a .npy file, or a tensor of a .safetensors file.

An unreadable file ends in one line that names the file and what it is instead. Nothing in a file is run or unpickled.
saejax trusts no header until the file is long enough for it.
"""

import functools
import json
import pathlib
import warnings
from typing import Any

import ml_dtypes
import numpy as np

from saejax.errors import UserError
from saejax.storage import json_yaml

_SAFETENSORS_DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}

_NPY = b"\x93NUMPY"
_OTHERS = (
    (b"version https://git-lfs", "a git-lfs pointer, not the data; `git lfs pull` brings them"),
    (b"PK", "a zip archive, as torch.save and np.savez write; save the one array with np.save"),
    (b"\x80", "a pickle; save the array with np.save"),
    (b"\x89HDF", "an HDF5 file; save the array with np.save"),
    (b"\x1f\x8b", "compressed with gzip; unpack it first"),
    (_NPY, "a .npy file; let its name end in .npy"),
)
"""First bytes of files that people mistake for arrays, and their real types."""


def rows_of(file: pathlib.Path, tensor: str, field: str) -> np.ndarray:
    """Maps the array of a file.

    Args:
      file: .npy or .safetensors.
      tensor: name of the tensor in a .safetensors file; empty where it holds only one.
      field: key that the user named the file by, for messages.

    Raises:
      UserError: it cannot be read, or is not of real numbers [n, d_in].
    """
    where = f"{field} = {file}"
    if file.suffix not in (".npy", ".safetensors"):
        raise UserError(f"{where}: .npy or .safetensors is needed")
    if file.suffix == ".npy" and tensor:
        raise UserError(f"source.tensor = {tensor}: only .safetensors files name their tensors")
    try:
        array = _map_npy(file, where) if file.suffix == ".npy" else _map_safetensors(file, tensor, where)
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror or error})") from None
    if array.ndim != 2 or 0 in array.shape:
        raise UserError(f"{where}: shape {array.shape}, but rows [n, d_in] are needed{_reshaped(array.shape)}")
    if array.dtype.kind not in "fiu" and array.dtype != ml_dtypes.bfloat16:
        raise UserError(f"{where}: dtype {array.dtype}, but real numbers are needed")
    return array


def _reshaped(shape: tuple[int, ...]) -> str:
    if 0 in shape:
        return "; it holds no number"
    if len(shape) > 2:
        return f"; reshape it to [n, d_in], say array.reshape(-1, {shape[-1]})"
    return "; reshape it to [n, d_in], say array.reshape(-1, d_in)" if shape else "; it is a single number"


def _refuse_others(file: pathlib.Path, where: str, wanted: str) -> None:
    """Refuses a file that begins as something else than what its name says."""
    with file.open("rb") as stream:
        start = stream.read(32)
    if not start:
        raise UserError(f"{where}: not a readable {wanted} file, because it is empty")
    for prefix, what in _OTHERS:
        if start.startswith(prefix):
            raise UserError(f"{where}: not a readable {wanted} file, but {what}")


def _map_npy(file: pathlib.Path, where: str) -> np.ndarray:
    with file.open("rb") as stream:
        if stream.read(len(_NPY)) != _NPY:
            _refuse_others(file, where, ".npy")
            raise UserError(f"{where}: not a readable .npy file; np.save writes one")
        stream.seek(0)
        try:
            dtype, order, shape = _npy_header(stream)
        except Exception:  # a damaged header surfaces as one of many kinds, whose messages say nothing of files
            raise UserError(f"{where}: not a readable .npy file, because its header is damaged") from None
        begin = stream.tell()
    if dtype.hasobject:
        raise UserError(f"{where}: not a readable .npy file of numbers: it holds Python objects, which are not loaded")
    if not dtype.itemsize or (dtype.kind == "V" and dtype != np.dtype("V2")):
        raise UserError(
            f"{where}: dtype {json_yaml.one_line(dtype)}, but real numbers are needed: save one plain array"
        )
    _check_size(file, where, begin, dtype, shape, exactly=True)
    if 0 in shape:
        return np.empty(shape, dtype)
    array = np.asarray(np.memmap(file, dtype, "r", begin, shape, order))
    # NumPy writes bfloat16 as two bytes without a name; no other type of that size ends up so.
    return array.view(ml_dtypes.bfloat16) if dtype.kind == "V" else array


def _npy_header(stream: Any) -> tuple[np.dtype, Any, tuple[int, ...]]:
    """dtype, order in memory and shape; the stream then stands at the data."""
    version = np.lib.format.read_magic(stream)
    read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}[version[0]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Python says of a damaged header
        shape, fortran, dtype = read(stream)
    if any(isinstance(n, bool) or n < 0 for n in shape):
        raise ValueError("a length below 0")
    return dtype, "F" if fortran else "C", shape


def _check_size(
    file: pathlib.Path, where: str, begin: int, dtype: np.dtype, shape: tuple[int, ...], *, exactly: bool
) -> None:
    size, needed = file.stat().st_size - begin, dtype.itemsize
    for n in shape:
        needed *= n
    if size < needed:
        raise UserError(
            f"{where}: is cut off: {json_yaml.one_line(shape)} of {dtype} take {needed} bytes, it has {size}"
        )
    if exactly and size > needed:
        raise UserError(
            f"{where}: holds {size - needed} bytes behind its array {shape}; were several arrays saved into one file?"
        )


def _map_safetensors(file: pathlib.Path, tensor: str, where: str) -> np.ndarray:
    """Map one tensor: the file is a length (8 bytes, little endian), a JSON header of that length, data."""
    header, begin = _safetensors_header(file, where)
    names = sorted(header)
    name = tensor or (names[0] if len(names) == 1 else "")
    if name not in header:
        listed = json_yaml.one_line(", ".join(names)) or "no tensor"
        if not where.startswith("source.path"):  # where no key takes a name
            raise UserError(f"{where}: holds {listed}; a file of one tensor is needed")
        raise UserError(f"source.tensor = {tensor or 'not given'}: {file} holds {listed}")
    dtype, shape, start, _ = header[name]
    if dtype not in _SAFETENSORS_DTYPES:
        allowed = ", ".join(_SAFETENSORS_DTYPES)
        raise UserError(
            f"{where}: tensor {json_yaml.one_line(name)} is of dtype {json_yaml.one_line(dtype)}, not of {allowed}"
        )
    dtype = _SAFETENSORS_DTYPES[dtype]
    if 0 in shape:
        return np.empty(shape, dtype)
    return np.asarray(np.memmap(file, np.uint8, "r", begin + start, (_bytes(dtype, shape),))).view(dtype).reshape(shape)


def _bytes(dtype: np.dtype, shape: tuple[int, ...]) -> int:
    return functools.reduce(lambda size, n: size * n, shape, dtype.itemsize)


def _safetensors_header(file: pathlib.Path, where: str) -> tuple[dict[str, tuple[str, tuple[int, ...], int, int]], int]:
    """Name -> (dtype, shape, first byte, end) of every tensor, none over another; and where the data begin."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= size - 8:
            _refuse_others(file, where, ".safetensors")
            raise UserError(f"{where}: not a .safetensors file: a header of {length} bytes, and {size} in all")
        try:
            header = json.loads(stream.read(length), object_pairs_hook=_once)
        except (ValueError, RecursionError, MemoryError):
            _refuse_others(file, where, ".safetensors")
            raise UserError(f"{where}: not a .safetensors file: its header is not JSON") from None
    if not isinstance(header, dict):
        raise UserError(f"{where}: not a .safetensors file: its header is not a JSON object")
    header.pop("__metadata__", None)
    begin, tensors = 8 + length, {}
    for name, entry in header.items():
        said = f"{where}: the header of tensor {json_yaml.one_line(name)}"
        if not isinstance(entry, dict):
            raise UserError(f"{said} is not a JSON object")
        dtype, shape, offsets = entry.get("dtype"), _lengths(entry.get("shape")), _lengths(entry.get("data_offsets"))
        if not isinstance(dtype, str) or shape is None or offsets is None or len(offsets) != 2:
            raise UserError(
                f"{said} has {json_yaml.one_line(entry)[:200]}; dtype, shape and two data_offsets are needed"
            )
        if not offsets[0] <= offsets[1] <= size - begin:
            cut = f"{where}: the data of tensor {json_yaml.one_line(name)} is cut off: "
            raise UserError(f"{cut}data_offsets are {offsets}, the file has {size - begin} bytes of data")
        known = _SAFETENSORS_DTYPES.get(dtype)
        if known is not None and _bytes(known, shape) != offsets[1] - offsets[0]:
            raise UserError(f"{said} says {dtype} {shape} in {offsets[1] - offsets[0]} bytes")
        tensors[name] = (dtype, shape, offsets[0], offsets[1])
    _refuse_overlaps(tensors, where)
    return tensors, begin


def _refuse_overlaps(tensors: dict[str, tuple[str, tuple[int, ...], int, int]], where: str) -> None:
    filled = sorted((start, end, name) for name, (_, _, start, end) in tensors.items() if end > start)
    for (_, end, name), (start, _, after) in zip(filled, filled[1:], strict=False):
        if start < end:
            raise UserError(f"{where}: tensors {json_yaml.one_line(name)} and {json_yaml.one_line(after)} overlap")


def _lengths(value: Any) -> tuple[int, ...] | None:
    """A list of numbers of things, None where it is not one; memory knows none that are larger."""
    counts = isinstance(value, list) and all(isinstance(n, int) and not isinstance(n, bool) for n in value)
    return tuple(value) if counts and all(0 <= n < 2**63 for n in value) else None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys stand in it once."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)
