"""Packing of tokenised documents into rows of fixed length: short ones share a row, long ones are cut.

Second station of the harvest: `text` -> packing -> language model -> store. A row of `context_length` tokens holds one
or more segments, numbered 1, 2, ... from the left, then padding (segment 0). A segment is one piece of one document;
attention never crosses segments, and positions restart in each. A document is cut only where it exceeds the row. The
rest of a long document, like every short document, goes into the first open row with room.
"""

import dataclasses
import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
from jaxtyping import Int32

from saejax.errors import UserError

logger = logging.getLogger(__name__)

Encode = Callable[[list[str]], list[list[int]]]
_CHARACTERS_AT_ONCE = 2**18  # enough for the tokeniser's threads, little to have read in vain at a limit


@dataclasses.dataclass(frozen=True, eq=False)
class Sequence:
    """One row for the language model: `tokens`, `segments` [context_length] int32; segment 0 is padding."""

    tokens: np.ndarray
    segments: np.ndarray
    segment_documents: tuple[int, ...]
    """The document of segment 1, 2, ...; no document appears twice in a row."""

    @property
    def n_tokens(self) -> int:
        """Tokens that are not padding."""
        return int((self.segments > 0).sum())

    def documents(self) -> Int32[np.ndarray, " context_length"]:
        """Document number of every token, -1 at padding."""
        return np.array((-1, *self.segment_documents), np.int32)[self.segments]


@dataclasses.dataclass(frozen=True)
class Packer:
    """The packing policy; a frozen value, so that the same documents always give the same rows."""

    context_length: int
    """Tokens in a row, the leading special token of each segment included; at least 2."""

    bos_id: int | None
    """Token that begins every segment, also the later pieces of a long document; None for no such token."""

    open_rows: int = 32
    """Rows that wait for a fitting piece; the oldest is closed when one more is opened."""

    def __post_init__(self):
        if self.context_length < 2:
            raise UserError(f"context_length must be at least 2, got {self.context_length}")

    def pack(self, documents: Iterable[tuple[int, list[int]]]) -> Iterator[Sequence]:
        """Packs (document number, token ids) into rows.

        Rows leave in the order in which they are closed: full ones at once, the others oldest first.

        >>> rows = Packer(context_length=4, bos_id=0).pack([(7, [1, 2, 3, 4]), (8, [5])])
        >>> [(row.tokens.tolist(), row.segments.tolist(), row.segment_documents) for row in rows]
        [([0, 1, 2, 3], [1, 1, 1, 1], (7,)), ([0, 4, 0, 5], [1, 1, 2, 2], (7, 8))]
        """
        waiting: list[_OpenRow] = []
        for document, ids in documents:
            for piece in self._pieces(ids):
                row = next((row for row in waiting if row.room >= len(piece)), None)
                if row is None:
                    row = _OpenRow(self.context_length)
                    waiting.append(row)
                row.add(document, piece)
                # A row without room for two tokens can take nothing more that is worth reading.
                if row.room <= (self.bos_id is not None):
                    waiting.remove(row)
                    yield row.close()
            while len(waiting) > self.open_rows:
                yield waiting.pop(0).close()
        yield from (row.close() for row in waiting)

    def policy(self) -> dict:
        """Record of the packing for a store."""
        return {"bos_id": self.bos_id, "bos_at": "start of every segment", "open_rows": self.open_rows}

    def _pieces(self, ids: list[int]) -> Iterator[list[int]]:
        start = [] if self.bos_id is None else [self.bos_id]
        length = self.context_length - len(start)
        for offset in range(0, len(ids), length):
            yield start + ids[offset : offset + length]


class _OpenRow:
    """A row that still has room."""

    def __init__(self, context_length: int):
        self.room = context_length
        self.pieces: list[list[int]] = []
        self.documents: list[int] = []

    def add(self, document: int, piece: list[int]) -> None:
        self.room -= len(piece)
        self.pieces.append(piece)
        self.documents.append(document)

    def close(self) -> Sequence:
        padding = [0] * self.room
        tokens = np.array(sum(self.pieces, []) + padding, np.int32)
        lengths = [*map(len, self.pieces), self.room]
        segments = np.repeat(np.array([*range(1, len(lengths)), 0], np.int32), lengths)
        return Sequence(tokens, segments, tuple(self.documents))


def encode_documents(documents: Iterable, encode: Encode) -> Iterator[tuple[int, list[int]]]:
    """Tokenises documents (objects with `number` and `text`), several at a time, in order."""
    batch: list = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= _CHARACTERS_AT_ONCE:
            yield from _encoded(batch, encode)
            batch, characters = [], 0
    yield from _encoded(batch, encode)


def _encoded(batch: list, encode: Encode) -> Iterator[tuple[int, list[int]]]:
    ids = encode([document.text for document in batch]) if batch else []
    yield from zip((document.number for document in batch), ids, strict=True)


def until(sequences: Iterable[Sequence], n_tokens: int | None) -> Iterator[Sequence]:
    """The first whole rows that hold at least `n_tokens` tokens between them; all of them for None."""
    seen = 0
    for sequence in sequences:
        yield sequence
        seen += sequence.n_tokens
        if n_tokens is not None and seen >= n_tokens:
            return


def positions(segments: Int32[np.ndarray, "*rows s"]) -> Int32[np.ndarray, "*rows s"]:
    """Position of each token in its segment, from 0; padding counts on from its own start.

    >>> positions(np.array([1, 1, 2, 2, 2, 0], np.int32)).tolist()
    [0, 1, 0, 1, 2, 0]
    """
    column = np.broadcast_to(np.arange(segments.shape[-1], dtype=np.int32), segments.shape)
    begins = np.diff(segments, axis=-1, prepend=-1) != 0
    return column - np.maximum.accumulate(np.where(begins, column, 0), axis=-1)


@dataclasses.dataclass(frozen=True)
class Survey:
    """Facts about the rows before any is run: how many there are, and a checksum of all tokens."""

    n_documents: int
    n_sequences: int
    n_tokens: int
    sha256: str


def survey(sequences: Iterable[Sequence]) -> Survey:
    """Counts documents, rows and tokens; two streams with the same checksum hold the same rows."""
    n_sequences = n_tokens = 0
    digest = hashlib.sha256()
    seen = bytearray()  # by the number of the document
    for sequence in sequences:
        seen.extend(bytes(max(0, 1 + max(sequence.segment_documents) - len(seen))))
        for document in sequence.segment_documents:
            seen[document] = 1
        n_sequences += 1
        n_tokens += sequence.n_tokens
        digest.update(np.stack([sequence.tokens, sequence.segments, sequence.documents()]).tobytes())
    return Survey(sum(seen), n_sequences, n_tokens, digest.hexdigest())


def report(surveys: Mapping[str, Survey], limits: Mapping[str, tuple[str, int | None]]) -> None:
    """Says how much text there is before the model runs on any of it.

    Args:
      surveys: of the splits "train" and "heldout".
      limits: split -> (the key that limits its tokens, its value).

    Raises:
      UserError: the tokeniser makes nothing of the documents of a split.
    """
    names = {"train": "for training", "heldout": "held out"}
    for split, survey in surveys.items():
        if not survey.n_sequences:
            raise UserError(f"the documents {names[split]} hold no token: the tokenizer makes nothing of their text")
    parts = (f"{found.n_documents} documents {names[s]} ({found.n_tokens} tokens)" for s, found in surveys.items())
    logger.info("text: %s", ", ".join(parts))
    for split, (key, limit) in limits.items():
        if limit is not None and surveys[split].n_tokens < limit:
            logger.warning(
                "%s=%d exceeds the text: taking all of its %d tokens %s",
                key, limit, surveys[split].n_tokens, names[split],
            )  # fmt: skip
