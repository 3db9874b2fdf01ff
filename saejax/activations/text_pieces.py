"""Train and held-out stretches of a corpus that is one document, such as a book in one .txt file.

`text` uses it. The text is cut into pieces of about equal length, at the end of a paragraph, else a line, a sentence
or a word. The pieces with the smallest hashes are held out, so they lie anywhere in the text: as many as the share
asks, at least one. The text between them stays in one stretch, so it loses context only at its edges.
"""

import hashlib
import itertools

_PIECE = 2**13
"""Characters in a piece of a long text. A few pieces are a fair sample, and each has context of a thousand tokens."""
_SHORTEST = 2**6
_ENDS = ("\n\n", "\n", ". ", " ")


def divide(text: str, share: float) -> list[tuple[str, bool]]:
    """(stretch, whether it is held out) in the order of the text; [] for a text that is too short to be divided.

    Args:
      text: the whole document; the stretches put together are the text again.
      share: of the pieces that are held out, in (0, 1).

    >>> found = divide("".join(f"Sentence {i} of a text. " for i in range(400)), 0.05)
    >>> [held for _, held in found], sum(len(stretch) for stretch, held in found if held)
    ([False, True, False], 480)
    """
    n = int(min(max(1 / share, 1 / (1 - share), 2, len(text) / _PIECE), len(text) / _SHORTEST))
    pieces = _cut(text, n) if n > 1 else []
    filled = [place for place, piece in enumerate(pieces) if piece.strip()]
    if len(filled) < 2:
        return []
    n_heldout = min(max(round(share * len(filled)), 1), len(filled) - 1)
    heldout = set(sorted(filled, key=lambda place: (_digest(pieces[place]), place))[:n_heldout])
    sides = itertools.groupby(range(n), key=heldout.__contains__)
    return [("".join(pieces[place] for place in places), held) for held, places in sides]


def _cut(text: str, n: int) -> list[str]:
    """n pieces that are the text again; each ends where something ends, if that is within half a piece."""
    cuts = [0, *(_end(text, i * len(text) // n, len(text) // (2 * n)) for i in range(1, n)), len(text)]
    return [text[start:stop] for start, stop in itertools.pairwise(cuts)]


def _end(text: str, place: int, reach: int) -> int:
    for end in _ENDS:
        if (found := text.find(end, place, place + reach)) >= 0:
            return found + len(end)
    return place


def _digest(piece: str) -> bytes:
    return hashlib.blake2b(piece.encode(), digest_size=8).digest()
