"""Compiled steps read as text: memory, collectives, the compiler's cycles, and operations that cost too much.

XLA's optimised program of TPUs and GPUs names every operation that runs, with shapes of one device. What a step makes
of AuxK runs only while latents are dead; such operations carry `aux_k` in their name and count apart.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re

import numpy as np
from jax.sharding import Mesh

WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\(")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{$")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One operation of a program.

    Attributes:
      opcode: as XLA calls it.
      shapes: (element type, sizes) of each array of its result, on one device.
      name: the path of the JAX operation it comes from.
      line: its whole text.
      fused: whether it is a part of a fusion, so that its result need not exist in memory.
    """

    opcode: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    name: str
    line: str
    fused: bool

    @property
    def n_bytes(self) -> int:
        """Bytes of its result."""
        return sum(WIDTHS.get(kind, 4) * math.prod(sizes) for kind, sizes in self.shapes)

    @property
    def of_aux_k(self) -> bool:
        """Whether it runs only while latents are dead."""
        return "aux_k" in self.name


@dataclasses.dataclass(frozen=True)
class Collective:
    """Data that devices exchange.

    Attributes:
      kind: all-reduce, all-gather, ...
      axes: the mesh axes along which they do.
      n_bytes: of the result, on one device.
      of_aux_k: whether it runs only while latents are dead.
    """

    kind: str
    axes: tuple[str, ...]
    n_bytes: int
    of_aux_k: bool


def instructions(text: str) -> list[Instruction]:
    """Returns every operation of a program's text, those inside fusions too."""
    fusions = set(re.findall(r"calls=%?([\w.\-]+)", text))
    found, inside = [], ""
    for line in text.splitlines():
        if (header := _COMPUTATION.match(line)) and "->" in line:
            inside = header[2]
        elif match := _INSTRUCTION.match(line):
            shapes = tuple(
                (kind, tuple(int(size) for size in sizes.split(",") if size))
                for kind, sizes in _ARRAY.findall(re.sub(r"\{[^}]*\}", "", match[2]))
            )
            named = re.search(r'op_name="([^"]*)"', line)
            found.append(Instruction(match[3], shapes, named[1] if named else "", line, inside in fusions))
    return found


def collectives(text: str, mesh: Mesh) -> list[Collective]:
    """Returns the collectives of a program, by the axes of its mesh."""
    found = []
    for one in instructions(text):
        kind = one.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            continue
        # A started one also lists its operands: the second half is the result.
        shapes = one.shapes[len(one.shapes) // 2 :] if one.opcode != kind and kind == "all-gather" else one.shapes
        n_bytes = dataclasses.replace(one, shapes=shapes).n_bytes
        found.append(Collective(kind, _axes(one.line, mesh), n_bytes, one.of_aux_k))
    return found


def cycles(text: str) -> int:
    """Returns the cycles that the TPU compiler estimates for a step's fusions, without AuxK's.

    It has none for custom calls, gathers, scatters and collectives.
    """
    return sum(
        int(match[1])
        for one in instructions(text)
        if not one.fused and not one.of_aux_k and (match := re.search(r'"estimated_cycles":"(\d+)"', one.line))
    )


def costly(text: str, *, widths: set[int], weights: set[int], gathered: set[tuple[int, int]]) -> dict[str, int]:
    """Returns how often a program has operations that a step should not have, by name; AuxK's are named apart.

    Args:
      text: of the program.
      widths: lengths of the rows that must not be sorted: latents of one device.
      weights: numbers of entries of a float32 weight on one device. Nothing may be added into one by atomics, as a
        scatter does whose indices may repeat; nor may one be copied.
      gathered: b, and b x k x d, of one device: float32 arrays of b rows and so many entries must not exist.
    """
    counts: collections.Counter[str] = collections.Counter()
    for one in instructions(text):
        sizes = {math.prod(shape) for kind, shape in one.shapes if kind == "f32"}
        last = {shape[-1] for _, shape in one.shapes if shape} | {max(shape, default=0) for _, shape in one.shapes}
        kinds = {
            "sorts": one.opcode == "sort" and bool(last & widths),
            "scatters": one.opcode == "scatter" and bool(sizes & weights) and "unique_indices=true" not in one.line,
            "copies": one.opcode in ("copy", "transpose") and not one.fused and bool(sizes & weights),
            "gathered rows": not one.fused
            and any((shape[0], math.prod(shape)) in gathered for kind, shape in one.shapes if shape and kind == "f32")
            and one.opcode not in ("bitcast", "get-tuple-element"),
        }
        for name in (name for name, there in kinds.items() if there):
            counts[name + (" (AuxK)" if one.of_aux_k else "")] += 1
    return dict(counts)


def _axes(line: str, mesh: Mesh) -> tuple[str, ...]:
    """The axes of a mesh along which the groups of a collective lie."""
    groups = _groups(line)
    if groups is None:
        return tuple(name for name, size in mesh.shape.items() if size > 1)
    numbers = np.arange(mesh.size).reshape(tuple(mesh.shape.values()))
    places = np.argwhere(np.isin(numbers, groups[0]))
    moves = [len(set(places[:, i])) > 1 for i in range(numbers.ndim)]
    return tuple(name for name, moved in zip(mesh.shape, moves, strict=True) if moved)


def _groups(line: str) -> np.ndarray | None:
    """The groups of devices that exchange data, [groups, size]; None where all do."""
    if match := re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", line):
        return np.array([[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", match[1])])
    iota = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
    if match := re.search(rf"replica_groups=\[([\d,]+)\]<={iota}", line):
        return _iota(match[2], match[3]).reshape(_sizes(match[1]))
    named = rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\({iota}\))? \{{([^}}]*)\}}"
    if match := re.search(named, line):
        sizes = [int(n) for n in re.findall(r"=(\d+)", match[1])]
        names = re.findall(r"'(\w+)'=", match[1])
        order = _iota(match[2], match[3]) if match[2] else np.arange(math.prod(sizes))
        along = [names.index(name) for name in re.findall(r"'(\w+)'", match[4])]
        ids = np.moveaxis(order.reshape(sizes), along, range(-len(along), 0))
        return ids.reshape(-1, math.prod(sizes[axis] for axis in along))
    return None


def _iota(sizes: str, order: str | None) -> np.ndarray:
    numbers = np.arange(math.prod(_sizes(sizes))).reshape(_sizes(sizes))
    return numbers.transpose(_sizes(order)).reshape(-1) if order else numbers.reshape(-1)


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split(","))
