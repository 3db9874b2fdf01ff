"""Rows with their text, for the page of latents; an activation store provides them.

search.py reads the rows in order; snippets.py reads the text around a few of them.
"""

import dataclasses
import os
from typing import Protocol

import numpy as np
from jaxtyping import Float

from saejax.activations import store


@dataclasses.dataclass(frozen=True)
class Window:
    """A stretch of text around one row, within one document.

    Attributes:
      tokens: Token ids, [w] int32.
      rows: The row of each token, [w] int64; -1 where the token was masked and has no row.
      centre: Place of the row asked for.
      document: Number of the document.
      position: Position of the centre in its segment.
    """

    tokens: np.ndarray
    rows: np.ndarray
    centre: int
    document: int
    position: int


class Corpus(Protocol):
    """Activation rows with their text."""

    @property
    def n_rows(self) -> int: ...

    def read(self, start: int, stop: int) -> Float[np.ndarray, "n d_in"]:
        """Rows start to stop in the data's own scale, float32."""
        ...

    def window(self, row: int, before: int, after: int) -> Window:
        """The text around one row: up to `before` tokens to its left and `after` to its right."""
        ...


class StoreCorpus:
    """The rows and the text of an activation store."""

    def __init__(self, path: str | os.PathLike):
        self._reader = store.Reader(path)

    @property
    def n_rows(self) -> int:
        """Rows that can be read now."""
        return self._reader.n_rows

    def read(self, start: int, stop: int) -> Float[np.ndarray, "n d_in"]:
        """Rows start to stop as float32."""
        return np.asarray(self._reader.rows(start, stop), np.float32)

    def window(self, row: int, before: int, after: int) -> Window:
        """The text around one row, cut at the ends of its segment."""
        origin = self._reader.trace(row)
        tokens, segments = self._reader.tokens(origin.sequence)
        own = np.flatnonzero(segments == segments[origin.column])
        first, last = max(own[0], origin.column - before), min(own[-1], origin.column + after)
        rows = np.full(last - first + 1, -1, np.int64)
        for number, position in self._neighbours(row, before, after):
            column = origin.column + position - origin.position
            if first <= column <= last:
                rows[column - first] = number
        centre = origin.column - first
        return Window(tokens[first : last + 1], rows, centre, origin.document, origin.position)

    def _neighbours(self, row: int, before: int, after: int) -> list[tuple[int, int]]:
        """(row, position) of `row` and its neighbours; where positions do not rise, a segment begins."""
        start = max(row - before, 0)
        index = self._reader.index(start, min(row + after + 1, self.n_rows))
        here = row - start
        same = (index[:, 2] == index[here, 2]) & (index[:, 3] == index[here, 3])
        found = [(row, int(index[here, 1]))]
        for step in (-1, 1):
            at = here
            while 0 <= at + step < len(index) and same[at + step] and step * (index[at + step, 1] - index[at, 1]) > 0:
                at += step
                found.append((start + at, int(index[at, 1])))
        return found
