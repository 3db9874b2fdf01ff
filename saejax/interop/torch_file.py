"""PyTorch `.pt` and `.pth` files, read without PyTorch and without running code; also writes one.

Such a file is a zip archive: a pickle that describes containers and tensors, and one raw file per storage. A pickle
may name any function to call. This reader allows only the names in ALLOWED, and gives them inert stand-ins that build
dictionaries and tensors. Reading takes a small multiple of the file's size: nothing may be compressed, no instruction
may reserve memory, and a tensor is a view of its storage. It refuses tar archives and the legacy format (a bare
pickle, before PyTorch 1.6).

Sources:
  PyTorch 2.13, `torch/serialization.py` (archive layout) and `torch/_utils.py` (`_rebuild_tensor_v2`).
"""

import io
import math
import os
import pathlib
import pickle
import pickletools
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from saejax.errors import UserError
from saejax.fields import paths

STORAGES: dict[str, np.dtype] = {
    "FloatStorage": np.dtype("<f4"),
    "DoubleStorage": np.dtype("<f8"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}
"""Element type of every storage class that is understood."""

DAMAGE = (
    zipfile.BadZipFile, zlib.error, struct.error, pickle.UnpicklingError, EOFError, OSError, LookupError, ValueError,
    TypeError, AttributeError, OverflowError, MemoryError, NotImplementedError, RuntimeError,
)  # fmt: skip
"""What reading a broken or hostile archive may raise."""

ALLOWED = (
    "collections.OrderedDict",
    "torch.Size",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    *(f"torch.{name}" for name in STORAGES),
)
"""Everything that the pickle in a file may name."""


def read(path: str | os.PathLike) -> Any:
    """Returns the saved object, with tensors as numpy arrays (bfloat16 through ml_dtypes).

    Args:
      path: A file as written by `torch.save`.

    Raises:
      UserError: the file is missing, damaged, in the legacy format, or names anything but ALLOWED.
    """
    path = paths.local(path, "path")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if not zipfile.is_zipfile(path):
        raise UserError(
            f"{path}: no zip archive, so not a file of torch.save since PyTorch 1.6; older ones are pickles that may "
            "run code: load it where you trust it and save it again with torch.save or safetensors"
        )
    try:
        return _load(_Unpickler, path)
    except UserError:
        raise
    except DAMAGE as error:
        raise UserError(f"{path}: damaged ({type(error).__name__}: {_one_line(error)})") from None


def keys(path: str | os.PathLike) -> frozenset[str]:
    """Returns the names in a file that holds a dictionary, without reading its tensors; none of any other file."""
    path = paths.local(path, "path")
    try:
        if not path.is_file() or not zipfile.is_zipfile(path):
            return frozenset()
        found = _load(_Names, path)
    except (UserError, *DAMAGE):
        return frozenset()
    return frozenset(key for key in found if isinstance(key, str)) if isinstance(found, dict) else frozenset()


def read_state_dict(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Returns a file that holds a flat dictionary of tensors, and nothing else, by name.

    Raises:
      UserError: as `read`, or the file holds something else; the key is named.
    """
    found = read(path)
    if not isinstance(found, dict):
        raise UserError(f"{path}: must hold a dictionary of tensors, got {type(found).__name__}")
    for key, value in found.items():
        if not isinstance(key, str) or not isinstance(value, np.ndarray):
            raise UserError(f"{path}: {_one_line(key)} must be a tensor, got {type(value).__name__}")
    return dict(found)


def write_state_dict(path: str | os.PathLike, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a dictionary of tensors as `torch.save` does, for `torch.load(path, weights_only=True)`.

    Args:
      path: File.
      tensors: Arrays of the types in STORAGES, by name.
    """
    storage_of = {dtype: name for name, dtype in STORAGES.items()}
    items = []
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for number, (name, array) in enumerate(tensors.items()):
            array = np.asarray(array, order="C")
            strides = [stride // array.itemsize for stride in array.strides]
            kind = _text("storage") + _global("torch", storage_of[array.dtype])
            reference = b"(" + kind + _text(str(number)) + _text("cpu") + _integer(array.size) + b"tQ"
            shape = b"(" + b"".join(map(_integer, array.shape)) + b"t(" + b"".join(map(_integer, strides)) + b"t"
            hooks = _global("collections", "OrderedDict") + b")R"
            call = _global("torch._utils", "_rebuild_tensor_v2") + b"(" + reference + _integer(0) + shape
            items.append(_text(name) + call + b"\x89" + hooks + b"tR")
            archive.writestr(_entry(f"data/{number}"), array.tobytes())
        archive.writestr(_entry("data.pkl"), b"\x80\x02}(" + b"".join(items) + b"u.")
        archive.writestr(_entry("byteorder"), "little")
        archive.writestr(_entry("version"), "3\n")


def _entry(name: str) -> zipfile.ZipInfo:
    """An entry without a time of its own, as in torch.save: the same tensors are the same file."""
    return zipfile.ZipInfo(f"archive/{name}")


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _text(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def _integer(value: int) -> bytes:
    if value < 2**31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x08" + struct.pack("<q", value)


class _Storage(NamedTuple):
    """The raw elements behind one or more tensors."""

    elements: np.ndarray


class _Ordered(dict):
    """Stands for an OrderedDict; the attributes that a module's state dict has (its versions) are dropped."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        """Takes nothing."""


class _Stand(NamedTuple):
    """Stands for something of ALLOWED: to be called, or the type of a storage; it has no attributes to set."""

    make: Callable[..., Any] | None = None
    dtype: np.dtype | None = None

    def __call__(self, *arguments: Any) -> Any:
        """Returns the result of the function that this replaces."""
        if self.make is None:
            raise ValueError("the type of a storage is no function")
        return self.make(*arguments)


class _Unpickler(pickle.Unpickler):
    """Reads `data.pkl` of one archive; every name it meets goes through `find_class`."""

    def __init__(self, path: pathlib.Path, archive: zipfile.ZipFile):
        self._path, self._archive = path, archive
        pickles = [name for name in archive.namelist() if name.split("/")[1:] == ["data.pkl"]]
        if len(pickles) != 1:
            raise UserError(f"{path}: must hold one data.pkl, as torch.save writes it, found {len(pickles)}")
        self._root = pickles[0].split("/")[0]
        order = f"{self._root}/byteorder"
        if order in archive.namelist() and self._bytes(order) != b"little":
            raise UserError(f"{path}: byte order must be little")
        self._storages: dict[str, _Storage] = {}
        super().__init__(io.BytesIO(_plain(self._bytes(pickles[0]))))

    def find_class(self, module: str, name: str) -> Any:
        """Returns what stands for an allowed name; refuses all others."""
        qualified = f"{module}.{name}"
        if qualified not in ALLOWED:
            raise UserError(
                f"{self._path}: the file wants to call {qualified}; only tensors in dictionaries are read, "
                "never code. Save the state_dict alone, or use safetensors"
            )
        if name in STORAGES:
            return _Stand(dtype=STORAGES[name])
        makers = {
            "OrderedDict": _Ordered,
            "Size": tuple,
            "_rebuild_tensor_v2": _tensor,
            "_rebuild_parameter": _parameter,
        }
        return _Stand(make=makers[name])

    def persistent_load(self, pid: Any) -> _Storage:
        """Returns the storage that a tensor refers to."""
        kind, type_of, key, _, n_elements = pid
        dtype = type_of.dtype if isinstance(type_of, _Stand) else None
        if kind != "storage" or dtype is None or not isinstance(key, str):
            raise ValueError(f"a reference of kind {kind!r}")
        if key not in self._storages:
            raw = self._bytes(f"{self._root}/data/{key}")
            if len(raw) != n_elements * dtype.itemsize:
                raise ValueError(f"storage {key} has {len(raw)} bytes, not {n_elements} x {dtype.itemsize}")
            self._storages[key] = _Storage(np.frombuffer(raw, dtype))
        storage = self._storages[key]
        if storage.elements.dtype != dtype:
            raise ValueError(f"storage {key} has two types")
        return storage

    def _bytes(self, name: str) -> bytes:
        info = self._archive.getinfo(name)
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{name} is compressed; torch.save stores")
        return self._archive.read(info)


class _Names(_Unpickler):
    """Reads `data.pkl` alone: tensors become None."""

    def find_class(self, module: str, name: str) -> Any:
        """Returns what stands for an allowed name; refuses all others."""
        found = super().find_class(module, name)
        return _Stand(make=_nothing) if name.startswith("_rebuild") else found

    def persistent_load(self, pid: Any) -> Any:
        """Returns nothing in the place of a storage."""
        return None


def _load(reader: type[_Unpickler], path: pathlib.Path) -> Any:
    with zipfile.ZipFile(path) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd escapes in strings of protocol 0
        return reader(path, archive).load()


def _plain(program: bytes) -> bytes:
    """Returns a pickle, after none of its instructions is found to reserve more memory than it can fill."""
    for instruction, argument, _ in pickletools.genops(program):
        if instruction.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > len(program):
            raise ValueError(f"it numbers {argument} things in {len(program)} bytes")
    return program


def _nothing(*_: Any) -> None:
    return None


def _tensor(storage: _Storage, offset: int, size: tuple, stride: tuple, *_: Any) -> np.ndarray:
    """`torch._utils._rebuild_tensor_v2` within the storage's bounds: a read-only view of it."""
    elements = storage.elements
    plain = all(isinstance(n, int) and n >= 0 for n in (offset, *size, *stride)) and len(size) == len(stride)
    n_elements = math.prod(size) if plain else -1
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=False)) if n_elements else offset - 1
    if not 0 <= n_elements <= elements.size or last >= elements.size:
        raise ValueError(f"a tensor of shape {size}, stride {stride} lies outside its {elements.size} elements")
    strides = [s * elements.itemsize for s in stride]
    return np.lib.stride_tricks.as_strided(elements[offset:], size, strides, writeable=False)


def _parameter(tensor: np.ndarray, *_: Any) -> np.ndarray:
    return tensor


def _one_line(found: object) -> str:
    return str(found).replace("\n", " ")[:200]
