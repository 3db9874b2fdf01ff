"""Which text the language model reads: corpora of documents in a fixed order, split into train and held-out.

First station of the harvest: documents leave here as plain strings, `packing` turns them into rows of tokens.
The split is by document and follows from the document's text alone, so that a corpus that grows keeps its
held-out documents, and two copies of one document never stand on both sides.
"""

import abc
import bz2
import dataclasses
import functools
import glob
import hashlib
import importlib.util
import json
import pathlib
import re
from collections.abc import Iterator
from typing import Any, ClassVar, Literal, NamedTuple

from saejax.errors import UserError

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")


class Document(NamedTuple):
    """One document: `number` counts through the whole corpus, both splits together."""

    number: int
    title: str
    text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextCorpus(abc.ABC):
    """A finite corpus of documents in a stable order; subclasses say where the text comes from."""

    name: ClassVar[str]

    heldout_share: float = 0.05
    """Expected share of the documents held out from training, in (0, 1); decided by a hash of the text."""

    def __post_init__(self):
        if not 0 < self.heldout_share < 1:
            raise UserError(f"text.heldout_share must be in (0, 1), got {self.heldout_share}")

    @abc.abstractmethod
    def read(self) -> Iterator[tuple[str, str]]:
        """Yields (title, text) of every document, always in the same order."""

    @abc.abstractmethod
    def origin(self) -> dict:
        """What the text is: JSON-able facts that change when the corpus on disk changes."""

    def documents(self, split: Split) -> Iterator[Document]:
        """Yields the documents of one split in the order of the corpus; documents without text are left out.

        >>> corpus = Pydoc(heldout_share=0.2)
        >>> train, heldout = ({d.title for d in corpus.documents(split)} for split in SPLITS)
        >>> bool(train & heldout), len(train) > len(heldout) > 0
        (False, True)
        """
        for number, (title, text) in enumerate(self.read()):
            if text.strip() and _is_heldout(text, self.heldout_share) == (split == "heldout"):
                yield Document(number, title, text)

    def identity(self) -> dict:
        """Name, settings and origin: what a store records of its text."""
        return {"type": self.name, **dataclasses.asdict(self), "origin": self.origin()}


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextFiles(TextCorpus):
    """Text on disk: a `.txt` file is one document, each line of a `.jsonl` file is one (its `text` field)."""

    name: ClassVar[str] = "files"

    path: str
    """A file, a directory (searched at all depths) or a glob pattern; read in the order of the file names."""

    text_field: str = "text"
    """The field of each `.jsonl` object that holds the text."""

    def read(self) -> Iterator[tuple[str, str]]:
        for file in self.files():
            if file.suffix == ".jsonl":
                yield from self._read_lines(file)
            else:
                yield str(file), _decode(file)

    def origin(self) -> dict:
        return {"files": [[str(file), file.stat().st_size] for file in self.files()]}

    def files(self) -> list[pathlib.Path]:
        """The files in the order of reading.

        Raises:
          UserError: the path holds no `.txt` or `.jsonl` file.
        """
        root = pathlib.Path(self.path).expanduser()
        found = root.rglob("*") if root.is_dir() else map(pathlib.Path, glob.glob(str(root), recursive=True))
        files = sorted(file for file in found if file.suffix in (".txt", ".jsonl") and file.is_file())
        if not files:
            raise UserError(f"text.path is {self.path!r}: no .txt or .jsonl file there")
        return files

    def _read_lines(self, file: pathlib.Path) -> Iterator[tuple[str, str]]:
        with file.open("rb") as lines:
            for count, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    text = json.loads(line)[self.text_field]
                except (ValueError, KeyError, TypeError):
                    text = None
                if not isinstance(text, str):
                    raise UserError(
                        f"text.path: line {count} of {file} must be a JSON object with a string field "
                        f"{self.text_field!r}"
                    )
                yield f"{file}:{count}", text


TEXTS: dict[str, type[TextCorpus]] = {corpus.name: corpus for corpus in (Wikipedia, Pydoc, TextFiles)}


def _is_heldout(text: str, share: float) -> bool:
    digest = hashlib.blake2b(text.encode(errors="replace"), digest_size=8).digest()
    return int.from_bytes(digest, "little") < share * 2**64


def _decode(file: pathlib.Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"text.path: {file} must be UTF-8 text, byte {error.start} is not") from None


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
    """Takes out what the stripper leaves: quotes for bold and italic, heading marks, empty bullets."""
    text = re.sub(r"'{2,}", "", text)
    text = re.sub(r"^=+ *(.*?) *=+ *$", r"\1", text, flags=re.MULTILINE)
    text = re.sub(r"^[*#:; ]*$", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip()
