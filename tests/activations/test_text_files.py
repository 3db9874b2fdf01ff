"""Which files a path means, and what a line of them must be: brackets, links, cycles, all that is no JSON."""

import glob
import json
import os
import pathlib
import re

import pytest

from saejax.activations import text, text_files
from saejax.errors import UserError


def _tree(root: pathlib.Path, *names: str) -> pathlib.Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name, encoding="utf-8")
    return root


def _found(path: object) -> list[str]:
    return [str(file) for file in text_files.find(str(path), "text.path")]


def _under(root: pathlib.Path, *names: str) -> list[str]:
    return [str(root / name) for name in names]


@pytest.mark.parametrize("name", ["data[v1].jsonl", "what?.txt", "star*.txt", "a[b.txt", "[!x].jsonl", "**.txt"])
@pytest.mark.parametrize("folder", ["plain", "in[ner]", "*"])
def test_a_name_that_is_there_is_no_pattern(tmp_path, name, folder):
    _tree(tmp_path, f"{folder}/{name}", f"{folder}/datav.jsonl", f"{folder}/whatx.txt", f"{folder}/starx.txt")
    assert _found(tmp_path / folder / name) == _under(tmp_path, f"{folder}/{name}")


def test_brackets_in_the_folders_around_a_pattern(tmp_path):
    _tree(tmp_path, "d[v1]/a.txt", "d[v1]/b.txt", "dv/other.txt", "d[v1]/deep/c[2].txt", "x/d[v1]/e.txt")
    assert _found(tmp_path / "d[v1]/*.txt") == _under(tmp_path, "d[v1]/a.txt", "d[v1]/b.txt")
    assert _found(tmp_path / "d[v1]") == sorted(_under(tmp_path, "d[v1]/a.txt", "d[v1]/b.txt", "d[v1]/deep/c[2].txt"))
    assert _found(tmp_path / "*/c[2].txt".replace("*", "d[v1]/*")) == _under(tmp_path, "d[v1]/deep/c[2].txt")
    assert _found(tmp_path / "*/d[v1]/*.txt") == _under(tmp_path, "x/d[v1]/e.txt")
    assert _found(tmp_path / "d[uvw]/*.txt") == _under(tmp_path, "dv/other.txt")  # still a pattern where nothing is


@pytest.mark.parametrize("pattern", ["*.txt", "*/*.txt", "**/*.txt", "**", "b/**/*.txt", "[ab]/*.txt", "./b/../a/*.txt",
                                     "**/deep/*.txt", "?/*", ".h*/*.txt", "*/.*.txt"])  # fmt: skip
@pytest.mark.parametrize("absolute", [True, False])
def test_patterns_mean_what_they_mean_to_python(tmp_path, monkeypatch, pattern, absolute):
    _tree(tmp_path, "a/1.txt", "a/.2.txt", "b/deep/3.txt", "b/deep/er/4.txt", ".h/5.txt", "top.txt", "b/no.md")
    monkeypatch.chdir(tmp_path)
    full = str(tmp_path / pattern) if absolute else pattern
    wanted = {file for name in glob.glob(full, recursive=True) if (file := pathlib.Path(name)).suffix == ".txt"}
    assert wanted and _found(full) == [str(file) for file in sorted(wanted)]


def test_linked_folders_are_entered(tmp_path):
    """Their files have the names that lead there, and stand among the others in the order of names."""
    corpus = _tree(tmp_path / "lk", "s.txt", "a/1.txt")
    other = _tree(tmp_path / "l", "big/b.txt", "big/deep/c.txt", "far/f.txt")
    (corpus / "big").symlink_to("../l/big")
    (other / "big/further").symlink_to(other / "far")  # behind a link, another
    wanted = _under(corpus, "a/1.txt", "big/b.txt", "big/deep/c.txt", "big/further/f.txt", "s.txt")
    for path in (corpus, corpus / "**", corpus / "**/*.txt"):
        assert _found(path) == wanted, path
    (tmp_path / "root").symlink_to(corpus)
    assert len(_found(tmp_path / "root")) == len(wanted)
    assert _found(corpus / "b*/deep/*.txt") == _under(corpus, "big/deep/c.txt")


@pytest.mark.parametrize("target", [".", "..", "../..", "itself", "/", "deep/.."])
@pytest.mark.parametrize("where", ["loop", "deep/loop", "deep/er/loop"])
def test_a_link_to_what_it_lies_in_is_not_entered(tmp_path, target, where):
    corpus = _tree(tmp_path / "outer/corpus", "a.txt", "deep/b.txt", "deep/er/c.txt")
    _tree(tmp_path, "outer/outside.txt")
    link = corpus / where
    inner = {"itself": "loop", "deep/..": str(corpus / "deep/..")}.get(target, target)
    link.symlink_to(inner)
    assert _found(corpus) == _under(corpus, "a.txt", "deep/b.txt", "deep/er/c.txt")
    assert _found(corpus / "**") == _under(corpus, "a.txt", "deep/b.txt", "deep/er/c.txt")


def test_links_that_lead_to_each_other_end(tmp_path):
    one, two = _tree(tmp_path / "one", "a.txt"), _tree(tmp_path / "two", "b.txt")
    (one / "two").symlink_to(two)
    (two / "one").symlink_to(one)
    assert _found(one) == _under(one, "a.txt", "two/b.txt")


def test_a_folder_is_read_once_and_by_its_own_name(tmp_path):
    corpus = _tree(tmp_path / "c", "z/deep/1.txt")
    (corpus / "a").symlink_to("z")  # sorts before what it leads to
    (corpus / "b").symlink_to("z/deep")
    assert _found(corpus) == _under(corpus, "z/deep/1.txt")
    ext = _tree(tmp_path / "ext", "sub/2.txt", "3.txt")
    (corpus / "m").symlink_to(ext)
    (corpus / "n").symlink_to(ext)
    (corpus / "k").symlink_to(ext / "sub")
    assert _found(corpus) == _under(corpus, "k/2.txt", "m/3.txt", "z/deep/1.txt")
    # Links to files are files, as they always were.
    (corpus / "z/same.txt").symlink_to("deep/1.txt")
    assert len(_found(corpus)) == 4


def test_a_link_to_nothing_is_named(tmp_path):
    _tree(tmp_path, "a.txt")
    (tmp_path / ".#a.txt").symlink_to("user@host.42")  # an editor's lock
    (tmp_path / "gone").symlink_to("nowhere")
    assert _found(tmp_path) == _under(tmp_path, "a.txt")
    for target in ("annex/objects/b", "b.jsonl"):
        (tmp_path / "b.jsonl").symlink_to(target)
        with pytest.raises(UserError, match=r"text\.path: .*b\.jsonl is a link to nothing"):
            _found(tmp_path)
        (tmp_path / "b.jsonl").unlink()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "text.path must be a path, got ''"),
        ("a\0b.txt", "text.path must be a path"),
        ("gs://bucket/c.jsonl", "text.path must be a path of this machine, got gs://bucket/c.jsonl"),
        ("~nobody-of-that-name/c.txt", "no .txt or .jsonl file there"),
        ("notes.md", "text.path must be a .txt or .jsonl file, a folder of them or a pattern, got .*/notes.md"),
        ("empty", "text.path is '.*/empty': no .txt or .jsonl file there$"),
        ("nothing.jsonl", "text.path is '.*/nothing.jsonl': no .txt or .jsonl file there$"),
        ("par*", r"no .txt or .jsonl file there; /\*\* behind a pattern searches the folders"),
        ("part[1", "no .txt or .jsonl file there"),
        ("x" * 300, "File name too long"),
    ],
)
def test_paths_that_hold_nothing(tmp_path, monkeypatch, path, message):
    monkeypatch.chdir(_tree(tmp_path, "notes.md", "parts/a.txt"))
    (tmp_path / "empty").mkdir()
    with pytest.raises((UserError, OSError), match=message):
        text.TextFiles(path=path).count()


# --- what a line may be ---------------------------------------------------------------------------------------------

OBJECT = rb'{"text": "fine"}'
BAD_LINES = {
    "no JSON": (b"not json", "is no JSON .Expecting value at character 1."),
    "a broken last line": (b'{"text": "brok', "is no JSON .* it is the last one: is the file complete?"),
    "two objects": (b'{"text": "a"} {"text": "b"}', "is no JSON .Extra data"),
    "a list": (b'["text"]', "it is a list"),
    "a string": (b'"text"', "it is a string"),
    "a number": (b"3", "it is a number"),
    "not a number": (b"NaN", "it is a number"),
    "null": (b"null", "it is null"),
    "true": (b"true", "it is a boolean"),
    "no field": (b"{}", "it has no field"),
    "another field": (b'{"txt": "b", "id": 3}', "it has only txt, id"),
    "text null": (b'{"text": null}', "has null there"),
    "text number": (b'{"text": 3}', "has a number there"),
    "text a huge number": (b'{"text": ' + b"7" * 5000 + b"}", "has a number there"),
    "text list": (b'{"text": ["a"]}', "has a list there"),
    "text object": (b'{"text": {"a": 1}}', "has an object there"),
    "text boolean": (b'{"text": false}', "has a boolean there"),
    "invalid UTF-8": (b'{"text": "caf\xe9"}', "is not UTF-8 .byte 13."),
    "endless nesting": (b"[" * 200_000, "cannot be read|is no JSON"),
    "zeros where a crash left a hole": (b"\0" * 40, "is no JSON|is not UTF-8"),
    "a control character": (b'{"text": "a\x01b"}', "is no JSON .Invalid control character"),
    "NUL as it is": (b'{"text": "a\0b"}', "is no JSON .Invalid control character"),
    "UTF-16": ('{"text": "a"}\n{"text": "b"}'.encode("utf-16"), "is no JSON|is not UTF-8|cannot be read"),
    "a git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is no JSON|git-lfs"),
}  # fmt: skip


@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("case", BAD_LINES)
def test_a_line_that_cannot_be_is_named_by_file_and_number(tmp_path, case, before):
    line, message = BAD_LINES[case]
    (tmp_path / "a.jsonl").write_bytes((OBJECT + b"\r\n") * before + line)
    with pytest.raises(UserError, match=message) as found:
        text.TextFiles(path=str(tmp_path)).count()
    said = str(found.value)
    assert f"line {before + 1} of {tmp_path / 'a.jsonl'}" in said and said.startswith("text.path")
    assert "\n" not in said and len(said) < 1500


LINES = {
    "CRLF": (b'{"text": "a"}\r\n\r\n{"text": "b"}\r\n', ["a", "b"]),
    "a byte order mark": (b'\xef\xbb\xbf{"text": "a"}\n{"text": "b"}', ["a", "b"]),
    "nothing but a byte order mark": (b"\xef\xbb\xbf", []),
    "nothing": (b"", []),
    "blank lines": (b"\n \n\t\n", []),
    "NUL as it is written": (b'{"text": "a\\u0000b"}', ["a\0b"]),
    "a lone high surrogate": (b'{"text": "broken \\ud83d emoji"}', ["broken \ufffd emoji"]),
    "a lone low surrogate": (b'{"text": "\\ude00"}', ["\ufffd"]),
    "the wrong way round": (b'{"text": "\\ude00\\ud83d"}', ["\ufffd\ufffd"]),
    "a pair": (b'{"text": "\\ud83d\\ude00"}', ["\U0001f600"]),
    "a pair and half of one": (b'{"text": "\\ud83d\\ude00\\ud83d"}', ["\U0001f600\ufffd"]),
    "a surrogate as its bytes": (b'{"text": "a\xed\xa0\xbdb"}', ["a\ufffdb"]),
    "other fields of any kind": (b'{"id": ' + b"1" * 5000 + b', "x": [null, NaN, -1e999], "text": "a"}', ["a"]),
    "an empty text": (b'{"text": ""}', [""]),
    "line ends in the text": ('{"text": "a\\nb\u2028c\u0085"}'.encode(), ["a\nb\u2028c\u0085"]),
    "a huge line": (b'{"text": "' + b"word " * 2**22 + b'"}', ["word " * 2**22]),
}  # fmt: skip


@pytest.mark.parametrize("case", LINES)
def test_lines_that_are_right(tmp_path, case):
    content, wanted = LINES[case]
    (tmp_path / "a.jsonl").write_bytes(content + b"\n" + b'{"text": "last"}')
    corpus = text.TextFiles(path=str(tmp_path / "a.jsonl"), heldout_share=0.5)
    found = sorted((d for split in text.SPLITS for d in corpus.documents(split)), key=lambda d: d.number)
    whole = "".join(d.text for d in found) if not [w for w in wanted if w] else None
    assert whole == "last" or [d.text for d in found] == [*filter(None, wanted), "last"]
    for document in found:
        document.text.encode()  # what every tokeniser is given


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b"\xef\xbb\xbfa mark", "a mark"),
        (b"a\r\nb\rc\n", "a\nb\nc\n"),
        (b"a\0b", "a\0b"),
        ("\ufeff\ufeffx".encode(), "\ufeffx"),  # only one is a mark
    ],
)
def test_whole_files(tmp_path, content, wanted):
    (tmp_path / "a.txt").write_bytes(content)
    assert [t for _, t in text.TextFiles(path=str(tmp_path)).read()] == [wanted]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"first\nsecond\ncaf\xe9\n", r"a\.txt must be UTF-8 text, byte 16 \(line 3\) is not"),
        ("text".encode("utf-16"), r"a\.txt must be UTF-8 text, byte 0 \(line 1\) is not"),
        (b"half a pair: \xed\xa0\xbd", r"byte 13 \(line 1\) is not"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n",
         r"line 1 of .*a\.txt is that of a git-lfs pointer, not the text; run: git lfs pull"),
    ],
)  # fmt: skip
def test_whole_files_that_cannot_be_read(tmp_path, content, message):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        text.TextFiles(path=str(tmp_path)).count()


def test_what_is_said_of_a_field_with_an_odd_name_is_one_line(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"a\nb\ud83d" + "x" * 9999: 1}))
    with pytest.raises(UserError) as found:
        text.TextFiles(path=str(tmp_path)).count()
    assert re.search(r"has only a b x{36}$", str(found.value)) and len(str(found.value)) < 400 + len(
        os.fspath(tmp_path)
    )
