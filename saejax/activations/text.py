"""Text corpora: documents in a fixed order, split into train and held-out.

First station of the harvest: it yields documents as plain strings, which `packing` turns into rows of tokens. The
split is by document and follows from the document's text alone. So a growing corpus keeps its held-out documents, and
two copies of one document are on the same side. A corpus of one document is split by stretches. Half of a surrogate
pair, which is not Unicode text, is read as U+FFFD.
"""

import abc
import bz2
import dataclasses
import functools
import hashlib
import importlib.util
import itertools
import math
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

from saejax.activations import text_files, text_pieces
from saejax.errors import UserError
from saejax.fields import numeric, paths, registry

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")

READING = 2
"""Version of the rules for finding and reading files. Stores record it; a store without it has version 1."""


class Document(NamedTuple):
    """One document: `number` counts through the whole corpus, both splits together."""

    number: int
    title: str
    text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextCorpus(abc.ABC):
    """A finite corpus of documents in a stable order; subclasses say where the text comes from."""

    name: ClassVar[str]
    keys: ClassVar[dict[str, str]] = {"path": "text.path", "share": "text.heldout_share"}
    """Names of the settings in messages."""
    divides: ClassVar[bool] = True
    """Whether a single document is split by stretches."""

    heldout_share: float = 0.05
    """Expected share of the documents held out from training, in (0, 1); decided by a hash of the text."""

    def __post_init__(self):
        numeric.check(self, self.keys["share"].removesuffix("heldout_share"))
        if not 0 < self.heldout_share < 1:
            raise UserError(f"{self.keys['share']} must be in (0, 1), got {self.heldout_share}")

    @abc.abstractmethod
    def read(self) -> Iterator[tuple[str, str]]:
        """Yields (title, text) of every document, always in the same order."""

    @abc.abstractmethod
    def origin(self) -> dict:
        """Identity of the text: JSON-able facts that change when the corpus on disk changes."""

    def documents(self, split: Split) -> Iterator[Document]:
        """Yields the documents of one split in the order of the corpus; documents without text are left out.

        >>> corpus = Pydoc(heldout_share=0.2)
        >>> train, heldout = ({d.title for d in corpus.documents(split)} for split in SPLITS)
        >>> bool(train & heldout), len(train) > len(heldout) > 0
        (False, True)
        """
        return (document for document, place in self._placed() if _side(place, self.heldout_share) == split)

    def count(self, *, whole: bool = True) -> dict[Split, int]:
        """Number of documents in each split.

        Args:
          whole: whether to count all of them; otherwise the corpus is read as far as there is one of each.

        Raises:
          UserError: a split has none, and the message says what to do; or a file cannot be read.
        """
        counts: dict[Split, int] = {"train": 0, "heldout": 0}
        low, high = 2**64, 0
        for _, place in self._placed():
            counts[_side(place, self.heldout_share)] += 1
            low, high = min(low, place), max(high, place)
            if not whole and all(counts.values()):
                break
        if not all(counts.values()):
            raise UserError(self._unsplit(counts, low, high))
        return counts

    def identity(self) -> dict:
        """Name, settings and origin."""
        return {"type": self.name, **dataclasses.asdict(self), "origin": self.origin()}

    def record(self) -> dict:
        """The identity, and how the text is read: `text` in a manifest."""
        return self.identity()

    def as_begun(self, records: Sequence[dict]) -> "TextCorpus":
        """The corpus as it was read for stores that were begun with it; `records` are their `text`."""
        return self

    def _placed(self) -> Iterator[tuple[Document, int]]:
        """Every document with its place in [0, 2^64]; what lies below the share is held out."""
        filled = ((number, title, text) for number, (title, text) in enumerate(self.read()) if text.strip())
        first = list(itertools.islice(filled, 2))
        if len(first) == 1 and self.divides:
            number, title, text = first[0]
            stretches = text_pieces.divide(_unicode(text), self.heldout_share)
            if stretches:
                for count, (stretch, heldout) in enumerate(stretches):
                    if stretch.strip():
                        yield Document(number + count, f"{title}, part {count + 1}", stretch), 0 if heldout else 2**64
                return
        for number, title, text in itertools.chain(first, filled):
            yield Document(number, title, _unicode(text)), _place(text)

    def _unsplit(self, counts: dict[Split, int], low: int, high: int) -> str:
        """Message for a split without a document; `low` and `high` are the places of the outermost ones."""
        n, where, share = sum(counts.values()), self._where(), self.keys["share"]
        if not n:
            return f"{where}: no document in it, all of it is blank"
        if n == 1:
            return f"{where}: one document, and too short to be split into text for training and held-out text"
        missing = "for training" if not counts["train"] else "held out"
        found = f"{where}: none of its {n} documents is {missing} at {share}={self.heldout_share}"
        if low == high:
            return f"{found}, for they are copies of one text"
        return f"{found}; {share}={_share_between(low, high)} gives both, and so may more documents"

    def _where(self) -> str:
        return f"text {self.name!r}"


TEXTS: registry.Registry[type[TextCorpus]] = registry.Registry("text", TextCorpus, check=registry.check_fields)
"""Every corpus by its name in a config (`text.type`)."""


@TEXTS.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Wikipedia(TextCorpus):
    """About a hundred English Wikipedia articles (3 M characters) out of the `gensim` wheel; CC BY-SA."""

    name: ClassVar[str] = "wikipedia"

    min_characters: int = 200
    """Articles shorter than this after the markup is stripped are left out (redirects always are)."""

    def read(self) -> Iterator[tuple[str, str]]:
        return iter(_wikipedia_articles(_wikipedia_dump(), self.min_characters))

    def origin(self) -> dict:
        dump = _wikipedia_dump()
        return {"file": dump.name, "sha256": hashlib.sha256(dump.read_bytes()).hexdigest()}


@TEXTS.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Pydoc(TextCorpus):
    """The language reference that every CPython carries (465 kB of English prose): small, for tests."""

    name: ClassVar[str] = "pydoc"

    def read(self) -> Iterator[tuple[str, str]]:
        from pydoc_data import topics  # 0.5 MB of text that nobody else needs in memory

        yield from sorted(topics.topics.items())

    def origin(self) -> dict:
        joined = "\0".join(f"{title}\0{text}" for title, text in self.read())
        return {"sha256": hashlib.sha256(joined.encode()).hexdigest()}


@TEXTS.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class TextFiles(TextCorpus):
    """Text on disk: a `.txt` file is one document, each line of a `.jsonl` file is one (its `text` field)."""

    name: ClassVar[str] = "files"

    path: paths.Local
    """A file, a directory (searched at all depths, also through links) or a glob pattern; read in the order of the
    file names. A corpus of one document is split by stretches of it."""

    text_field: str = "text"
    """The field of each `.jsonl` object that holds the text."""

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "path", str(paths.local(self.path, self.keys["path"])))

    def read(self) -> Iterator[tuple[str, str]]:
        for file in self.files():
            if file.suffix == ".jsonl":
                for number, text in text_files.read_lines(file, self.text_field, self.keys["path"]):
                    yield f"{file}:{number}", text
            else:
                yield str(file), self._whole(file)

    def origin(self) -> dict:
        return {"files": [[str(file), file.stat().st_size] for file in self.files()]}

    def files(self) -> list[pathlib.Path]:
        """The files in the order of reading.

        Raises:
          UserError: the path holds no `.txt` or `.jsonl` file.
        """
        return text_files.find(self.path, self.keys["path"])

    def record(self) -> dict:
        return self.identity() | {"reading": READING}

    def as_begun(self, records: Sequence[dict]) -> TextCorpus:
        if all(record.get("reading") == READING for record in records):
            return self
        return FilesAsBefore(**dataclasses.asdict(self))

    def _whole(self, file: pathlib.Path) -> str:
        return text_files.without_mark(text_files.read_whole(file, self.keys["path"]))

    def _where(self) -> str:
        return f"{self.keys['path']}={self.path}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FilesAsBefore(TextFiles):
    """Text on disk as stores that record no `reading` were begun with it: a pattern before a file, folders behind links
    left out, a byte order mark part of a `.txt`, one document never split."""

    divides: ClassVar[bool] = False

    def files(self) -> list[pathlib.Path]:
        """The files in the order of reading."""
        return text_files.find_as_before(self.path, self.keys["path"])

    def record(self) -> dict:
        return self.identity()

    def _whole(self, file: pathlib.Path) -> str:
        return text_files.read_whole(file, self.keys["path"])

    def _where(self) -> str:
        return f"{super()._where()} (as the store was begun; another path may do)"


def _unicode(text: str) -> str:
    """Text for tokenisers: half of a surrogate pair becomes U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _place(text: str) -> int:
    """Place of a document in [0, 2^64), by a hash of its text."""
    return int.from_bytes(hashlib.blake2b(text.encode(errors="replace"), digest_size=8).digest(), "little")


def _side(place: int, share: float) -> Split:
    return "heldout" if place < share * 2**64 else "train"


def _share_between(low: int, high: int) -> float:
    """A share with few digits that holds out what lies at `low`, and not what lies at `high`."""
    places = (
        round(step * 10.0**-digits, digits)
        for digits in range(1, 17)
        for step in (math.floor(low / 2**64 * 10**digits) + 1, math.floor(high / 2**64 * 10**digits))
    )
    between = (share for share in places if _side(low, share) == "heldout" and _side(high, share) == "train")
    return next(between, 0.5)


_DUMP = "test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"


def _wikipedia_dump() -> pathlib.Path:
    spec = importlib.util.find_spec("gensim")  # finds the wheel without the two seconds of importing it
    folders = (spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        if (dump := pathlib.Path(folder) / _DUMP).is_file():
            return dump
    found = "the installed gensim does not carry it" if folders else "gensim is not installed"
    raise UserError(f"text 'wikipedia': {found}; run: pip install gensim==4.4.0")


@functools.lru_cache(maxsize=1)
def _wikipedia_articles(dump: pathlib.Path, min_characters: int) -> list[tuple[str, str]]:
    from gensim.corpora import wikicorpus  # imports for two seconds: only where it is used

    articles_only: Any = ("0",)  # gensim declares a bool and takes namespaces
    with bz2.open(dump) as pages:
        raw = [(title, text) for title, text, _ in wikicorpus.extract_pages(pages, articles_only)]
    articles = [
        (title, _tidy(wikicorpus.filter_wiki(text)))
        for title, text in raw
        if not text.lstrip().upper().startswith("#REDIRECT")
    ]
    return [(title, text) for title, text in articles if len(text) >= min_characters]


def _tidy(text: str) -> str:
    """Removes the stripper's remains: quotes for bold and italic, heading marks, empty bullets."""
    text = re.sub(r"'{2,}", "", text)
    text = re.sub(r"^=+ *(.*?) *=+ *$", r"\1", text, flags=re.MULTILINE)
    text = re.sub(r"^[*#:; ]*$", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip()
