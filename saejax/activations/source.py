"""Activation source interface: an endless, checkpointable stream, and held-out rows.

First station of the data path (source -> loader -> shuffle buffer -> normaliser -> train step). A source is a frozen
config object that reads nothing until asked.

The stream is cut into `n_lanes` lanes, a number of the run and not of the machine. Each step takes `block_rows` rows
of every lane, so a batch holds `n_lanes * block_rows` rows. A process reads only the lanes of its devices. A lane
depends on (source, n_lanes, block_rows, seed) alone, so any mesh and any number of processes see the same batches.
"""

import abc
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np

from saejax.errors import UserError
from saejax.fields import registry
from saejax.storage import json_yaml


@runtime_checkable
class RowIterator(Protocol):
    """Endless stream of records [len(lanes), block_rows, d_in] in the source's dtype, with an exact place."""

    n_rows: int | None
    """Rows that one epoch hands out over all lanes; None where the stream never repeats."""

    def __iter__(self) -> Iterator[np.ndarray]: ...

    def __next__(self) -> np.ndarray: ...

    def get_state(self) -> dict[str, Any]:
        """Position after the last record handed out, as a JSON-able dict."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue exactly where `get_state` was called, on an iterator opened with the same arguments.

        The lanes may differ: the position belongs to the run, not to the process.
        """
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActivationSource(abc.ABC):
    """Source of activation rows. Subclasses are final, frozen and cheap to construct."""

    name: ClassVar[str]
    """Key in SOURCES and value of `type:` in a run's config."""

    @property
    @abc.abstractmethod
    def d_in(self) -> int:
        """Width of a row. A config field where it is a choice, read from the files where it is a fact."""

    @property
    def site_widths(self) -> tuple[int, ...]:
        """Widths of the parts of a row, in order: one, unless rows of several hooks lie side by side."""
        return (self.d_in,)

    @abc.abstractmethod
    def identity(self) -> dict[str, Any]:
        """Identity of the data, for training and held out, JSON-able: equal if and only if the data are.

        Holds no path, costs seconds at most, and begins with `type`; `differences` names its keys as they stand. A
        source whose data may grow tells by `differs_from` whether what is there now begins with what was there then.
        """

    @abc.abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """Description of the data for people, JSON-able; holds the `identity` under that key."""

    def differs_from(self, saved: Mapping[str, Any]) -> str | None:
        """Returns one phrase about the difference between these data and a run's; None where they are the same.

        Args:
            saved: an `identity`, or a `fingerprint`, as it was recorded; by older versions too.
        """
        return differences(recorded(saved), self.identity())

    def place(self) -> str:
        """Place of the data, for messages: the key and its value, or the type of data without a place."""
        keys = [key for key in ("path", "paths", "model") if hasattr(self, key)]
        values = {key: getattr(self, key) for key in keys}
        said = [v if isinstance(v, str) else ", ".join(v) for v in values.values()]
        return f"source.{keys[0]} = {said[0]}" if keys else f"source = {self.name}"

    def skipped(self) -> dict[str, list[str]]:
        """Parts of the data that are damaged and left out, for the run's record; nothing for most sources."""
        return {}

    @abc.abstractmethod
    def open(self, *, n_lanes: int, block_rows: int, lanes: range, seed: int) -> RowIterator:
        """Open the training stream.

        Args:
            n_lanes: lanes of the whole run.
            block_rows: rows per lane and step.
            lanes: the lanes this process reads; `range(n_lanes)` on one process.
            seed: order of the data; for generated data, the data.

        Raises:
            UserError: the data cannot fill one step.
        """

    @abc.abstractmethod
    def heldout(self, batch: int, max_rows: int | None = None) -> Iterator[np.ndarray]:
        """Yield rows [<= batch, d_in] that training never sees: finite, and the same on every call."""


def recorded(saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """The identity in a fingerprint; what holds none is one."""
    inner = saved.get("identity")
    return inner if isinstance(inner, dict) else saved


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Says in one phrase what two identities differ in: all that has a name, or else that checksums do.

    Args:
        saved: of the data that a run had.
        now: of the data that are there.

    Returns:
        None where they are equal.

    Examples:
        >>> differences({"type": "store", "hook": "a", "sha256": "12"}, {"type": "store", "hook": "b", "sha256": "34"})
        'hook was a and is b'
        >>> differences({"train": {"rows": 8, "sha256": "12"}}, {"train": {"rows": 8, "sha256": "34"}})
        'the checksums of train differ'
    """
    before, after = _flat(saved), _flat(now)
    if before.get("type") != after.get("type"):
        return f"type was {_said(before.get('type'))} and is {_said(after.get('type'))}"
    wrong = [key for key in {**after, **before} if before.get(key) != after.get(key)]
    named = [key for key in wrong if not _is_checksum(key)]
    if named:
        more = f" (and {len(named) - _NAMED} more)" if len(named) > _NAMED else ""
        return (
            ", ".join(f"{_of(k)} was {_said(before.get(k))} and is {_said(after.get(k))}" for k in named[:_NAMED])
            + more
        )
    parts = dict.fromkeys(_of(key.partition("sha256")[0].rstrip(".")) for key in wrong)
    return f"the checksums{' of ' if any(parts) else ''}{', '.join(filter(None, parts))} differ" if wrong else None


_NAMED = 4
"""Keys that `differences` names at most."""


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings and lists as one mapping, keys joined by dots."""
    if isinstance(tree, Mapping):
        items: Any = tree.items()
    elif isinstance(tree, (list, tuple)):
        items = enumerate(tree)
    else:
        return {prefix: tree}
    flat = {} if items or not prefix else {prefix: tree}
    for key, value in items:
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _is_checksum(key: str) -> bool:
    return "sha256" in key


def _of(key: str) -> str:
    return key.replace(".", " ")


def _said(value: Any) -> str:
    return "none" if value is None else json_yaml.one_line(value)[:80]


SOURCES: registry.Registry[type[ActivationSource]] = registry.Registry(
    "source", ActivationSource, check=registry.check_fields
)
"""Every source by its name in a config (`source.type`)."""

register = SOURCES.register
"""Class decorator: enters a source under its `name`."""


def check_lanes(*, n_lanes: int, block_rows: int, lanes: range) -> None:
    """Refuse a cut of the stream that no source can serve.

    Raises:
        UserError: a size below 1, or lanes outside `range(n_lanes)`.
    """
    for name, value in (("n_lanes", n_lanes), ("block_rows", block_rows)):
        if value < 1:
            raise UserError(f"{name} = {value}: at least 1 is needed")
    if len(lanes) == 0 or min(lanes) < 0 or max(lanes) >= n_lanes:
        raise UserError(f"lanes = {lanes}: a non-empty part of range(0, {n_lanes}) is needed")
