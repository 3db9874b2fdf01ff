"""Corpora: stable order, a split by document without leaks, clear words when text is missing."""

import json

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


def test_wikipedia_is_prose():
    pytest.importorskip("gensim", reason="carries the Wikipedia sample")
    documents = [d for split in text.SPLITS for d in text.Wikipedia().documents(split)]
    assert 90 < len(documents) < 206
    assert sum(len(d.text) for d in documents) > 2_500_000
    joined = "\n".join(d.text for d in documents)
    assert "#REDIRECT" not in joined and "'''" not in joined and "[[" not in joined
    assert "\n\n\n" not in joined
