"""Paths: makes them absolute or refuses them on entry, and quotes them in messages."""

from __future__ import annotations

import dataclasses
import enum
import functools
import os
import re
import shlex
import typing
from pathlib import Path
from typing import Annotated, Any

from saejax.errors import UserError


class Kind(enum.Enum):
    """Kind of a config's text field, as part of its type."""

    local = "local"
    """A path of this machine: made absolute, an address is refused."""
    named = "named"
    """A path of this machine, or a name that the program knows; its class tells them apart."""


Local = Annotated[str, Kind.local]
Named = Annotated[str, Kind.named]

_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.\-]+:/", re.A)
"""`gs://bucket/x`, and `gs:/bucket/x`, which is what pathlib makes of it; C:/ is the drive of a disk."""

_PLAIN_FOR_HYDRA = re.compile(r"(?!(null|true|false|nan|inf)$)(\.{0,2}/|[a-z_])[\w/.\-+@%]*", re.A | re.I)
"""Words that Hydra reads as text (not as a number or null) and that its sweeper passes on unchanged."""


def local(path: str | os.PathLike[str], field: str) -> Path:
    """The absolute path of a file or folder of this machine.

    Args:
      path: as typed; `~` is the home directory, relative paths are of the working directory.
      field: key or argument that it was given by, for the message.

    Raises:
      UserError: an address such as gs://bucket/x, an empty path, one with a NUL, or one that is no UTF-8.

    Examples:
      >>> local("gs://bucket/store", "source.path")
      Traceback (most recent call last):
      saejax.errors.UserError: source.path must be a path of this machine, got gs://bucket/store: ...
    """
    typed = os.path.expanduser(checked(path, field))  # Path.expanduser raises for an unknown ~name
    found = Path(typed).absolute()  # `..` stays: behind a link it is not the folder before
    if "${" in checked(found, field):  # config.yaml, where it may come to stand, holds no interpolations
        raise UserError(f"{field} must be a path without ${{, got {found}")
    return found


def checked(path: str | os.PathLike[str], field: str) -> str:
    """A path as it was typed; what `local` refuses is refused."""
    text = os.fspath(path)
    if not text or "\0" in text:
        raise UserError(f"{field} must be a path, got {text!r}")
    if _SCHEME.match(text):
        raise UserError(
            f"{field} must be a path of this machine, got {text}: object storage and addresses are not supported; "
            "mount the bucket as a folder, or copy the files"
        )
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes that the locale could not read; Orbax and TensorStore take UTF-8 only
        shown = text.encode("ascii", "backslashreplace").decode()
        raise UserError(
            f"{field} must be UTF-8, got {shown}: set PYTHONUTF8=1 or LC_ALL=C.UTF-8, or take another path"
        ) from None
    return text


def settle(config: Any, prefix: str = "") -> None:
    """Makes the paths of a frozen config object absolute, so that stored paths hold in any working directory.

    Args:
      config: instance of a dataclass; its fields `Local` and `tuple[Local, ...]` are replaced, None stays.
      prefix: of the keys, for messages.

    Raises:
      UserError: see `local`.
    """
    for name in (name for name, kind in kinds(type(config)).items() if kind is Kind.local):
        value = getattr(config, name)
        if isinstance(value, str):
            object.__setattr__(config, name, str(local(value, prefix + name)))
        elif value is not None:
            object.__setattr__(config, name, tuple(str(local(part, prefix + name)) for part in value))


@functools.cache
def kinds(cls: type) -> dict[str, Kind]:
    """The fields of a config class that hold paths."""
    hints = typing.get_type_hints(cls, include_extras=True)
    found = {field.name: _kind(hints[field.name]) for field in dataclasses.fields(cls)}
    return {name: kind for name, kind in found.items() if kind is not None}


def _kind(hint: Any) -> Kind | None:
    """Also where it stands inside of `| None`, a tuple, or another annotation."""
    said = next((m for m in getattr(hint, "__metadata__", ()) if isinstance(m, Kind)), None)
    if said is not None or isinstance(hint, str):
        return said
    inner = (hint.__origin__,) if hasattr(hint, "__metadata__") else typing.get_args(hint)
    return next((kind for part in inner if (kind := _kind(part)) is not None), None)


def for_hydra(value: str) -> str:
    """A value that Hydra reads back as this very text.

    Examples:
      >>> print(for_hydra("runs/a"), for_hydra("runs/k=2,x=1"))
      runs/a 'runs/k=2,x=1'
    """
    if _PLAIN_FOR_HYDRA.fullmatch(value):
        return value
    return quoted(re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", value))


def quoted(value: str) -> str:
    """In the quotes of Hydra's grammar; `${...}` in it is an interpolation still."""
    escaped = re.sub(r"(\\*)'", lambda found: found[1] * 2 + r"\'", value)
    escaped = re.sub(r"(\\+)\Z", lambda found: found[1] * 2, escaped)
    return f"'{escaped}'"


def unplaced(value: Any) -> Any:
    """A value for other people: of a path of this machine only its last part, in nested dicts and lists too.

    Examples:
      >>> unplaced({"path": "/data/st", "k": 3, "models": ["torch:/models/llama", "gpt2"]})
      {'path': 'st', 'k': 3, 'models': ['torch:llama', 'gpt2']}
    """
    if isinstance(value, dict):
        return {key: unplaced(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [unplaced(item) for item in value]
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"(torch:)?(?:[/~]|[A-Za-z]:[/\\])(?:.*[/\\])?([^/\\]+)[/\\]*", value, flags=re.S)
    return value if found is None else (found[1] or "") + found[2]


def typed(key: str, path: str | os.PathLike[str]) -> str:
    """`key=path` as one pastes it into a shell.

    Args:
      key: of the command line; `resume` is read by saejax, every other key by Hydra.
      path: of any characters.

    Examples:
      >>> print(typed("run", "runs/a"), typed("run", "my runs/k=2"), typed("resume", "my runs/k=2"))
      run=runs/a 'run='"'"'my runs/k=2'"'"'' 'resume=my runs/k=2'
    """
    text = os.fspath(path)
    return shlex.quote(f"{key}={text if key == 'resume' else for_hydra(text)}")
