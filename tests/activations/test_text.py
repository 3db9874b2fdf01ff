"""Corpora: stable order, a split by document without leaks, clear words when text is missing."""

import json
import re

import pytest

from saejax.activations import text
from saejax.errors import UserError


def _write(folder, n):
    for i in range(n):
        (folder / f"{i:04d}.txt").write_text(f"document {i}", encoding="utf-8")


def test_split_covers_the_corpus_once():
    corpus = text.Pydoc(heldout_share=0.3)
    train, heldout = (list(corpus.documents(split)) for split in text.SPLITS)
    assert train and heldout
    numbers = sorted(document.number for document in train + heldout)
    assert numbers == list(range(len(list(corpus.read()))))
    assert train == list(text.Pydoc(heldout_share=0.3).documents("train"))


def test_split_has_the_stated_share_and_copies_stay_on_one_side(tmp_path):
    n = 2000
    _write(tmp_path, n)
    for i in range(0, n, 10):
        (tmp_path / f"copy-{i:04d}.txt").write_text(f"document {i}", encoding="utf-8")
    corpus = text.TextFiles(path=str(tmp_path), heldout_share=0.1)
    train, heldout = ({d.text for d in corpus.documents(split)} for split in text.SPLITS)
    assert not train & heldout
    deviation = (0.1 * 0.9 / n) ** 0.5  # of the binomial share
    assert abs(len(heldout) / n - 0.1) < 4 * deviation


def test_a_growing_corpus_keeps_its_split(tmp_path):
    _write(tmp_path, 100)
    corpus = text.TextFiles(path=str(tmp_path), heldout_share=0.2)
    before = {d.text for d in corpus.documents("heldout")}
    (tmp_path / "0000-first.txt").write_text("a new document that moves all numbers", encoding="utf-8")
    assert before <= {d.text for d in corpus.documents("heldout")}


def test_files_jsonl_and_glob(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "b.txt").write_text("beta", encoding="utf-8")
    lines = [json.dumps({"text": "alpha"}), "", json.dumps({"text": "  "}), json.dumps({"text": "gamma"})]
    (tmp_path / "deep" / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    everything = text.TextFiles(path=str(tmp_path), heldout_share=1e-9)
    assert [(d.number, d.text) for d in everything.documents("train")] == [
        (0, "beta"), (1, "alpha"), (3, "gamma")
    ]  # fmt: skip
    only = text.TextFiles(path=str(tmp_path / "*.txt"), heldout_share=1e-9)
    assert [d.text for d in only.documents("train")] == ["beta"]
    assert everything.identity()["origin"] != only.identity()["origin"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"txt": "b"}', "line 2 of .* 'text'"),
        ("not json", "line 1"),
        ('{"text": 3}', "line 1"),
    ],
)
def test_bad_jsonl_names_its_line(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        list(text.TextFiles(path=str(tmp_path)).documents("train"))


def test_missing_text_is_said_in_one_line(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no .txt or .jsonl"):
        list(text.TextFiles(path=str(tmp_path / "nothing")).documents("train"))
    with pytest.raises(UserError, match="heldout_share must be in"):
        text.Pydoc(heldout_share=1.0)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match="must be UTF-8"):
        list(text.TextFiles(path=str(tmp_path)).documents("train"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install gensim==4\.4\.0"):
        list(text.Wikipedia().documents("train"))


def test_the_split_is_that_of_earlier_versions(tmp_path):
    """By commit a2c19e2: what its `documents` gave for this corpus."""
    lines = "".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(120))
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "b.txt").write_bytes(b"a\r\nb")
    (tmp_path / ".c.txt").write_text("hidden", encoding="utf-8")
    (tmp_path / "\u00e9.txt").write_text("\u00e9t\u00e9 \ufffd \u00fc", encoding="utf-8")
    wanted = [1, 4, 7, 17, 18, 19, 21, 25, 27, 35, 41, 44, 45, 47, 55, 66, 85, 91, 93, 95, 99, 117, 120]
    for kind in (text.TextFiles, text.FilesAsBefore):
        corpus = kind(path=str(tmp_path), heldout_share=0.2)
        assert [d.number for d in corpus.documents("heldout")] == wanted
        numbers = sorted(d.number for split in text.SPLITS for d in corpus.documents(split))
        assert numbers == list(range(123)) and corpus.count() == {"train": 100, "heldout": 23}
        assert set(corpus.identity()) == {"type", "heldout_share", "path", "text_field", "origin"}


def _book(n: int = 900) -> str:
    return "".join(f"Paragraph {i} of a book, in which something is said.\n\n" for i in range(n))


def _one(tmp_path, content: str, suffix: str, share: float = 0.05, kind=text.TextFiles) -> text.TextCorpus:
    file = tmp_path / f"book{suffix}"
    if suffix == ".jsonl":
        content = "\n" + json.dumps({"text": content}) + "\n\n"
    file.write_text(content, encoding="utf-8")
    (tmp_path / "blank.txt").write_text(" \n", encoding="utf-8")
    return kind(path=str(tmp_path), heldout_share=share)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
@pytest.mark.parametrize("share", [0.01, 0.05, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("content", [_book(), _book(40), "word " * 999, "x" * 4000, "\u8a9e" * 500, "a\ud83d" * 200])
def test_one_document_is_split_by_stretches(tmp_path, suffix, share, content):
    if suffix == ".txt":
        content = content.replace("\ud83d", "\U0001f600")
    corpus = _one(tmp_path, content, suffix, share)
    documents = [(d, split) for split in text.SPLITS for d in corpus.documents(split)]
    assert [list(corpus.documents(split)) for split in text.SPLITS] == [
        [d for d, split in documents if split == s] for s in text.SPLITS
    ]
    counts = corpus.count()
    assert min(counts.values()) > 0 and sum(counts.values()) == len(documents)
    documents.sort(key=lambda found: found[0].number)
    assert len({d.number for d, _ in documents}) == len(documents)
    assert "".join(d.text for d, _ in documents) == content.replace("\ud83d", "\ufffd")  # nothing lost or twice
    assert all(a != b for (_, a), (_, b) in zip(documents, documents[1:], strict=False)), "context is cut at edges only"
    heldout = sum(len(d.text) for d, split in documents if split == "heldout") / len(content)
    # Pieces are as long as one another to half a piece, and whole ones are held out, at least one.
    n = min(max(1 / share, 1 / (1 - share), 2, len(content) / 2**13), len(content) / 64)
    assert abs(heldout - share) < 1 / int(n) + share / 2


def test_stretches_end_where_paragraphs_do_and_lie_anywhere(tmp_path):
    texts = {split: [d.text for d in _one(tmp_path, _book(9000), ".txt").documents(split)] for split in text.SPLITS}
    assert len(texts["heldout"]) > 1, "not only the end of a book, which may be a licence"
    assert all(t.startswith("Paragraph") and t.endswith("said.\n\n") for part in texts.values() for t in part)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_a_document_too_short_to_be_split_is_said(tmp_path, suffix):
    corpus = _one(tmp_path, "beta", suffix)
    assert [d.text for split in text.SPLITS for d in corpus.documents(split)] == ["beta"]
    with pytest.raises(UserError, match="one document, and too short to be split"):
        corpus.count()


def test_a_second_document_makes_it_a_split_by_documents(tmp_path):
    corpus = _one(tmp_path, _book(), ".txt", share=0.5)
    (tmp_path / "second.txt").write_text("another", encoding="utf-8")
    assert [d.text for split in text.SPLITS for d in corpus.documents(split)].count(_book()) == 1


@pytest.mark.parametrize("share", [1e-6, 0.05, 1 - 1e-6])
@pytest.mark.parametrize("n", [2, 3, 20])
def test_a_split_without_a_document_says_which_share_would_do(tmp_path, share, n):
    _write(tmp_path, n)
    corpus = text.TextFiles(path=str(tmp_path), heldout_share=share)
    try:
        counts = corpus.count()
    except UserError as error:
        side, key = "for training" if share > 0.5 else "held out", "text.heldout_share"
        found = re.search(rf"none of its {n} documents is {side} at {key}={share}; {key}=(\S+) gives both", str(error))
        assert found, error
        assert min(text.TextFiles(path=str(tmp_path), heldout_share=float(found[1])).count().values()) > 0
    else:
        assert share == 0.05 and min(counts.values()) > 0


def test_texts_that_no_share_can_split(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("the same", encoding="utf-8")
    with pytest.raises(UserError, match="none of its 2 documents is .* for they are copies of one text"):
        text.TextFiles(path=str(tmp_path)).count()
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(" ", encoding="utf-8")
    with pytest.raises(UserError, match="no document in it, all of it is blank"):
        text.TextFiles(path=str(tmp_path)).count()


def test_counting_ends_early_where_it_may(tmp_path):
    _write(tmp_path, 100)
    (tmp_path / "9999.txt").write_bytes(b"caf\xe9")
    corpus = text.TextFiles(path=str(tmp_path), heldout_share=0.2)
    assert min(corpus.count(whole=False).values()) == 1
    with pytest.raises(UserError, match="must be UTF-8"):
        corpus.count()


def test_wikipedia_is_prose():
    pytest.importorskip("gensim", reason="carries the Wikipedia sample")
    documents = [d for split in text.SPLITS for d in text.Wikipedia().documents(split)]
    assert 90 < len(documents) < 206
    assert sum(len(d.text) for d in documents) > 2_500_000
    joined = "\n".join(d.text for d in documents)
    assert "#REDIRECT" not in joined and "'''" not in joined and "[[" not in joined
    assert "\n\n\n" not in joined
