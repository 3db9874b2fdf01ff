"""GGUF header parser: metadata and the place of each tensor.

It compares every count, length and offset with the bytes of the file before using it. The library `gguf` does not: an
array of 2^60 numbers is an endless loop to it, and a string that is cut off is a shorter string. saejax uses its table
of types here, and its dequantisation in `gguf_file.py`.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import pathlib
import struct
from typing import Any, NamedTuple

import gguf
import numpy as np

from saejax.errors import UserError
from saejax.storage import json_yaml

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_LONGEST_ARRAY = 2**24
"""Entries: sixty times the largest vocabulary."""
_MOST_AXES = 4


class GGUFTensor(NamedTuple):
    """One tensor of a GGUF file, as its head describes it."""

    shape: tuple[int, ...]
    """Outermost axis first; the file says it the other way round."""
    kind: gguf.GGMLQuantizationType
    """How its numbers are stored."""
    bytes: np.ndarray
    """A view of the file, one row of bytes for each row of numbers."""


class GGUFHeader(NamedTuple):
    """Content of a GGUF file before its tensor data."""

    metadata: dict[str, Any]
    """Key -> number, true or false, text, or a list of these."""
    tensors: dict[str, GGUFTensor]
    """Name -> tensor, all of whose bytes are there."""


def read(path: pathlib.Path) -> GGUFHeader:
    """The head of a GGUF file, which is mapped, not read.

    Args:
      path: of the file.

    Raises:
      UserError: it is none, is cut off, or says of itself what cannot be.
    """
    try:
        if path.stat().st_size < 24:
            raise ValueError("it is shorter than the head of one")
        return _Cursor(np.memmap(path, mode="r")).header()
    except (OSError, ValueError) as error:
        reason = json_yaml.one_line(error)
        hint = json_yaml.pointer_hint(path)
        raise UserError(f"model={str(path)!r} is not a readable GGUF file: {reason}{hint}") from None


class _Cursor:
    """A place in the file, moved on by whatever is read there; ValueError where that cannot be."""

    def __init__(self, file: np.ndarray) -> None:
        self.file, self.view, self.at = file, file.data, 0

    def header(self) -> GGUFHeader:
        """Everything up to the first tensor's bytes."""
        if self.take(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version = self.number("I")
        if version not in _VERSIONS:
            order = ", with its bytes in the other order" if version % 2**16 == 0 else ""
            raise ValueError(f"its version is {version}{order}, allowed: {' or '.join(map(str, _VERSIONS))}")
        n_tensors, n_keys = self.number("Q"), self.number("Q")
        metadata: dict[str, Any] = {}
        for _ in range(n_keys):
            key = self.text()
            if key in metadata:
                raise ValueError(f"the key {json_yaml.one_line(key)!r} stands in it twice")
            metadata[key] = self.value(self.number("I"))
        described = [self.tensor() for _ in range(n_tensors)]
        alignment = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"general.alignment={alignment!r}, allowed: a power of two")
        start = self.at + -self.at % alignment
        tensors = {}
        for name, shape, kind, offset in described:
            if name in tensors:
                raise ValueError(f"the tensor {json_yaml.one_line(name)!r} stands in it twice")
            tensors[name] = GGUFTensor(shape, kind, self.rows(name, shape, kind, start, offset, alignment))
        return GGUFHeader(metadata, tensors)

    def take(self, n_bytes: int) -> bytes:
        """The next bytes."""
        if n_bytes > len(self.view) - self.at:
            raise ValueError(f"it is cut off: {n_bytes} bytes should stand at {self.at} of {len(self.view)}")
        self.at += n_bytes
        return bytes(self.view[self.at - n_bytes : self.at])

    def number(self, code: str) -> Any:
        """The next number, of a type that `struct` names by a letter."""
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def text(self) -> str:
        """The next text; UnicodeDecodeError is a ValueError."""
        return self.take(self.number("Q")).decode("utf-8")

    def value(self, kind: int) -> Any:
        """The next value of the metadata."""
        if kind == _STRING:
            return self.text()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != _ARRAY:
            raise ValueError(f"type {kind} of a value is unknown")
        kind, count = self.number("I"), self.number("Q")
        if count > _LONGEST_ARRAY:
            raise ValueError(f"an array of {count} entries, allowed: up to {_LONGEST_ARRAY}")
        if kind == _STRING:
            return [self.text() for _ in range(count)]
        if kind not in _SCALARS:
            raise ValueError(f"type {kind} of an array's entries is unknown")
        dtype = np.dtype("<" + _SCALARS[kind])
        return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()

    def tensor(self) -> tuple[str, tuple[int, ...], gguf.GGMLQuantizationType, int]:
        """The next tensor's name, shape, type and offset."""
        name, n_axes = self.text(), self.number("I")
        if not 1 <= n_axes <= _MOST_AXES:
            raise ValueError(f"the tensor {json_yaml.one_line(name)!r} has {n_axes} axes, allowed: 1 to {_MOST_AXES}")
        shape = tuple(self.number("Q") for _ in range(n_axes))[::-1]
        return name, shape, gguf.GGMLQuantizationType(self.number("I")), self.number("Q")

    def rows(
        self,
        name: str,
        shape: tuple[int, ...],
        kind: gguf.GGMLQuantizationType,
        start: int,
        offset: int,
        alignment: int,
    ) -> np.ndarray:
        """The bytes of a tensor."""
        block, size = gguf.GGML_QUANT_SIZES[kind]
        n_bytes = math.prod(shape) // block * size
        where = f"the tensor {json_yaml.one_line(name)!r} of shape {shape}"
        if 0 in shape or shape[-1] % block:
            raise ValueError(f"{where} cannot be stored as {kind.name}")
        if offset % alignment:
            raise ValueError(f"{where} is not aligned")
        if start + offset + n_bytes > len(self.file):
            raise ValueError(f"it is cut off: {where} ends after the file, at {start + offset + n_bytes}")
        return self.file[start + offset :][:n_bytes].reshape(*shape[:-1], shape[-1] // block * size)
