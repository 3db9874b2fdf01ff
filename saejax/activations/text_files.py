"""Text files: the files that a path means, and their documents; an unreadable one is named with its line.

`text` builds corpora from them. saejax tries a path as a file or a folder before it tries it as a pattern. It searches
folders at all depths, also through links. It enters each folder once: under its own name where it lies in the tree,
and never through a link inside itself. Links to files count as files. The order is by name.
"""

import fnmatch
import glob
import json
import os
import pathlib
from collections.abc import Iterator
from typing import NoReturn

from saejax.errors import UserError
from saejax.storage import json_yaml

SUFFIXES = (".txt", ".jsonl")
_POINTER = b"version https://git-lfs.github.com/spec/"
_MARK = "\ufeff"
_KINDS = {dict: "an object", list: "a list", str: "a string", float: "a number", bool: "a boolean", type(None): "null"}


def find(path: str, key: str) -> list[pathlib.Path]:
    """The .txt and .jsonl files that a path means, in order.

    Args:
      path: a file, a folder or a glob pattern, in which each part that is there as it is written stands for itself.
      key: that the path was given by, for the messages.

    Raises:
      UserError: there is none, it is another kind of file, or one of them is a link to nothing.
    """
    root = pathlib.Path(os.path.expanduser(path))
    if root.is_file() and root.suffix not in SUFFIXES:
        raise UserError(f"{key} must be a .txt or .jsonl file, a folder of them or a pattern, got {path}")
    if root.is_dir():
        found = (folder / name for folder, names in _folders(root) for name in names)
    else:
        found = iter([root]) if root.is_file() else _matches(pathlib.Path(root.anchor), _parts(root))
    files = sorted({file for file in found if file.suffix in SUFFIXES and _is_there(file, key)})
    if not files:
        hint = "; /** behind a pattern searches the folders that it names" if glob.has_magic(path) else ""
        raise UserError(f"{key} is {path!r}: no .txt or .jsonl file there{hint}")
    return files


def find_as_before(path: str, key: str) -> list[pathlib.Path]:
    """Earlier form of `find`, for stores that were begun with it."""
    root = pathlib.Path(path).expanduser()
    found = root.rglob("*") if root.is_dir() else map(pathlib.Path, glob.glob(str(root), recursive=True))
    files = sorted(file for file in found if file.suffix in SUFFIXES and file.is_file())
    if not files:
        raise UserError(f"{key} is {path!r}: no .txt or .jsonl file there")
    return files


def read_whole(file: pathlib.Path, key: str) -> str:
    """The text of a UTF-8 file, its line ends as `\\n`; a byte order mark stays.

    Raises:
      UserError: it is not UTF-8, or a pointer of git-lfs.
    """
    data = file.read_bytes()
    _refuse_pointer(data, file, key)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{key}: {file} must be UTF-8 text, byte {error.start} (line {line}) is not") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def without_mark(text: str) -> str:
    """A text without the byte order mark that some editors put in front."""
    return text.removeprefix(_MARK)


def read_lines(file: pathlib.Path, field: str, key: str) -> Iterator[tuple[int, str]]:
    """(line number, text) of every line of a .jsonl file that is not blank.

    Raises:
      UserError: a line is not a JSON object with a string at `field`.
    """
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if number == 1:
                _refuse_pointer(line, file, key)
                line = line.removeprefix(_MARK.encode())
            if line.strip():
                yield number, _field_of(line, field, f"line {number} of {file}", key)


def _field_of(line: bytes, field: str, where: str, key: str) -> str:
    def refuse(why: str) -> NoReturn:
        wanted = f"must be a JSON object with a string field {field!r}"
        raise UserError(f"{key}: {where} {wanted}; it {json_yaml.one_line(why)}") from None

    try:
        # No number is of use here, and Python refuses integers of more than 4300 digits.
        found = json.loads(line, parse_int=float)
    except UnicodeDecodeError as error:
        refuse(f"is not UTF-8 (byte {error.start})")
    except json.JSONDecodeError as error:
        ends = "" if line.endswith(b"\n") else "; it is the last one: is the file complete?"
        refuse(f"is no JSON ({error.msg} at character {error.pos + 1}){ends}")
    except (ValueError, RecursionError) as error:
        refuse(f"cannot be read ({error})")
    if not isinstance(found, dict):
        refuse(f"is {_KINDS[type(found)]}")
    if field not in found:
        names = ", ".join(name[:40] for name in list(found)[:8])
        refuse(f"has {f'only {names}' if names else 'no field'}")
    if not isinstance(found[field], str):
        refuse(f"has {_KINDS[type(found[field])]} there")
    return found[field]


def _refuse_pointer(data: bytes, file: pathlib.Path, key: str) -> None:
    if data.startswith(_POINTER):
        raise UserError(f"{key}: line 1 of {file} is that of a git-lfs pointer, not the text; run: git lfs pull")


def _is_there(file: pathlib.Path, key: str) -> bool:
    """Whether a name is a file. Editors lock with links to nothing, which are hidden."""
    if file.is_symlink() and not file.exists() and not file.name.startswith("."):
        raise UserError(f"{key}: {file} is a link to nothing")
    return file.is_file()


def _folders(root: pathlib.Path, hidden: bool = True) -> Iterator[tuple[pathlib.Path, list[str]]]:
    """Every folder from `root` downwards with the names of what else is in it, the folders behind links last.

    Raises:
      OSError: one may not be read.
    """
    seen: set[str] = set()
    top = os.path.realpath(root)
    starts = [root]
    while starts:
        links: list[pathlib.Path] = []
        for start in sorted(starts):
            if start != root and _inside(os.path.realpath(start), top, os.path.realpath(start.parent)):
                continue
            for folder, names, files in os.walk(start, onerror=_raise):
                real = os.path.realpath(folder)
                if real in seen:
                    names.clear()
                    continue
                seen.add(real)
                names[:] = sorted(name for name in names if hidden or not name.startswith("."))
                links += [link for name in names if (link := pathlib.Path(folder, name)).is_symlink()]
                yield pathlib.Path(folder), files
        starts = links


def _inside(folder: str, *places: str) -> bool:
    """Whether one of the places is a folder or lies in it."""
    return any(os.path.commonpath([folder, place]) == folder for place in places)


def _raise(error: OSError) -> NoReturn:
    raise error


def _parts(path: pathlib.Path) -> list[str]:
    return list(path.parts[1:] if path.anchor else path.parts)


def _matches(base: pathlib.Path, parts: list[str]) -> Iterator[pathlib.Path]:
    """Paths that a pattern's parts match below a folder; an existing name is taken literally."""
    if not parts:
        yield base
        return
    part, *rest = parts
    if os.path.lexists(base / part):
        yield from _matches(base / part, rest)
    elif part == "**":
        for folder, names in _folders(base, hidden=False) if base.is_dir() else ():
            if rest:
                yield from _matches(folder, rest)
            else:
                yield from (folder / name for name in names if not name.startswith("."))
    elif glob.has_magic(part) and base.is_dir():
        for name in fnmatch.filter(os.listdir(base), part):
            if part.startswith(".") or not name.startswith("."):
                yield from _matches(base / name, rest)
