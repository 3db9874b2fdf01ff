"""What every source of activations offers: an endless, checkpointable stream, and held-out rows.

First station of the data path (source -> loader -> shuffle buffer -> normaliser -> train step). A source is a
frozen config object; nothing is read before it is asked for something.

The stream is cut into `n_lanes` lanes, a number of the run and not of the machine. Each step takes
`block_rows` rows of every lane, so a batch holds `n_lanes * block_rows` rows. A process reads only the lanes
that its devices hold, and because what a lane yields depends on nothing but (source, n_lanes, block_rows,
seed), any mesh and any number of processes see the same batches.
"""

import abc
import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import numpy as np

from saejax.errors import UserError


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
    """Where activation rows come from. Subclasses are final, frozen and cheap to construct."""

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
    def fingerprint(self) -> dict[str, Any]:
        """Identity of the data for the run's record, JSON-able; other data, other fingerprint."""

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


_Source = TypeVar("_Source", bound=type[ActivationSource])

SOURCES: dict[str, type[ActivationSource]] = {}
"""Every source by its name. A new source is one file that registers itself, plus one YAML."""


def register(cls: _Source) -> _Source:
    """Class decorator: enter a source into SOURCES under its `name`."""
    SOURCES[cls.name] = cls
    return cls


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
