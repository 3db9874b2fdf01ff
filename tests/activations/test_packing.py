"""Packing loses nothing, invents nothing, and keeps documents apart."""

import itertools

import numpy as np
import pytest

from saejax.activations import packing, text
from saejax.errors import UserError

BOS = 9999


def _documents(seed: int, n: int, longest: int) -> list[tuple[int, list[int]]]:
    rng = np.random.default_rng(seed)
    ids = itertools.count(1)  # every token of the corpus is another number, so that nothing can hide
    return [(3 * i + 1, list(itertools.islice(ids, int(rng.integers(0, longest))))) for i in range(n)]


@pytest.mark.parametrize("bos", [None, BOS])
@pytest.mark.parametrize("open_rows", [1, 8])
@pytest.mark.parametrize(("context_length", "longest"), [(16, 12), (16, 70), (2, 9), (64, 40)])
def test_every_token_arrives_once_in_its_document(bos, open_rows, context_length, longest):
    documents = _documents(seed=context_length, n=60, longest=longest)
    packer = packing.Packer(context_length, bos, open_rows)
    found: dict[int, list[list[int]]] = {}
    for row in packer.pack(documents):
        assert row.tokens.shape == row.segments.shape == (context_length,)
        assert row.tokens.dtype == row.segments.dtype == np.int32
        used = row.segments[row.segments > 0]
        assert np.all(row.segments[: len(used)] > 0), "padding only at the end"
        assert np.all(np.diff(used) >= 0) and set(used) == set(range(1, len(row.segment_documents) + 1))
        assert len(set(row.segment_documents)) == len(row.segment_documents)
        for segment, document in enumerate(row.segment_documents, start=1):
            piece = row.tokens[row.segments == segment].tolist()
            if bos is not None:
                assert piece[0] == bos and len(piece) > 1
                piece = piece[1:]
            found.setdefault(document, []).append(piece)
    for document, ids in documents:
        pieces = sorted(found.pop(document, []))  # ids rise along a document, so pieces sort into its order
        assert sum(pieces, []) == ids
        room = context_length - (bos is not None)
        assert [len(piece) for piece in pieces[:-1]] == [room] * (len(pieces) - 1), "cut only where it must be"
    assert not found


def test_short_documents_share_rows():
    documents = [(i, [1] * 30) for i in range(40)]
    rows = list(packing.Packer(context_length=128, bos_id=0).pack(documents))
    assert len(rows) == 10  # 4 * 31 <= 128 < 5 * 31
    # Mixed lengths: first fit keeps the padding small.
    rows = list(packing.Packer(context_length=256, bos_id=0).pack(_documents(seed=0, n=500, longest=300)))
    filled = np.mean([row.n_tokens / 256 for row in rows])
    assert filled > 0.95


def test_long_documents_of_one_row_leave_at_once_and_rows_are_deterministic():
    documents = _documents(seed=1, n=50, longest=90)
    packer = packing.Packer(context_length=32, bos_id=0)
    first, second = list(packer.pack(documents)), list(packer.pack(iter(documents)))
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert np.array_equal(a.tokens, b.tokens) and np.array_equal(a.segments, b.segments)
        assert a.segment_documents == b.segment_documents


def test_documents_and_positions_of_tokens():
    row = next(packing.Packer(context_length=8, bos_id=0).pack([(5, [1, 2]), (6, [3])]))
    assert row.documents().tolist() == [5, 5, 5, 6, 6, -1, -1, -1]
    assert packing.positions(row.segments).tolist() == [0, 1, 2, 0, 1, 0, 1, 2]
    both = np.stack([row.segments, row.segments[::-1]])
    assert packing.positions(both)[0].tolist() == [0, 1, 2, 0, 1, 0, 1, 2]


def test_until_ends_with_the_row_that_reaches_the_limit():
    rows = list(packing.Packer(context_length=4, bos_id=0).pack([(i, [1, 2, 3]) for i in range(10)]))
    assert len(list(packing.until(rows, 9))) == 3
    assert len(list(packing.until(rows, 8))) == 2
    assert len(list(packing.until(rows, None))) == 10


def test_encoding_keeps_the_order_over_its_batches(monkeypatch):
    monkeypatch.setattr(packing, "_CHARACTERS_AT_ONCE", 20)
    documents = [text.Document(i, "", str(i)) for i in range(150)]
    encoded = list(packing.encode_documents(documents, lambda texts: [[int(t)] for t in texts]))
    assert encoded == [(i, [i]) for i in range(150)]


def test_context_of_one_token_is_refused():
    with pytest.raises(UserError, match="context_length must be at least 2, got 1"):
        packing.Packer(context_length=1, bos_id=None)
