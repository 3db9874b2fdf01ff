"""Paths as they come in and go out: made absolute or refused at the door, quoted where they are printed."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

from saejax.errors import UserError

_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.\-]*:/")
"""`gs://bucket/x`, and `gs:/bucket/x`, which is what pathlib makes of it."""

_PLAIN_FOR_HYDRA = re.compile(r"(?!(null|true|false|nan|inf)$)(\.{0,2}/|[a-z_])[\w/.\-+@%~:]*", re.A | re.I)
"""What Hydra's grammar reads as a word and nothing else: no number, no null."""


def local(path: str | os.PathLike[str], field: str) -> Path:
    """The absolute path of a file or folder of this machine.

    Args:
      path: as typed; `~` is the home directory, relative paths are of the working directory.
      field: key or argument that it was given by, for the message.

    Raises:
      UserError: an address such as gs://bucket/x, an empty path, or one with a NUL.

    Example:
      >>> local("gs://bucket/store", "source.path")
      Traceback (most recent call last):
      saejax.errors.UserError: source.path must be a path of this machine, got gs://bucket/store: ...
    """
    text = os.fspath(path)
    if not text or "\0" in text:
        raise UserError(f"{field} must be a path, got {text!r}")
    if _SCHEME.match(text):
        raise UserError(
            f"{field} must be a path of this machine, got {text}: object storage is not supported yet; mount the "
            "bucket as a folder"
        )
    return Path(os.path.abspath(os.path.expanduser(text)))  # Path.expanduser raises for an unknown ~name


def for_hydra(value: str) -> str:
    """A value that Hydra reads back as this very text.

    Example:
      >>> print(for_hydra("runs/a"), for_hydra("runs/k=2,x=1"))
      runs/a 'runs/k=2,x=1'
    """
    if _PLAIN_FOR_HYDRA.fullmatch(value):
        return value
    escaped = re.sub(r"(\\*)'", lambda found: found[1] * 2 + r"\'", value)
    escaped = re.sub(r"(\\+)$", lambda found: found[1] * 2, escaped)
    return f"'{escaped}'".replace("${", r"\${")


def typed(key: str, path: str | os.PathLike[str]) -> str:
    """`key=path` as one pastes it into a shell.

    Args:
      key: of the command line; `resume` is read by saejax, every other key by Hydra.
      path: of any characters.

    Example:
      >>> print(typed("run", "runs/a"), typed("run", "my runs/k=2"), typed("resume", "my runs/k=2"))
      run=runs/a 'run='"'"'my runs/k=2'"'"'' 'resume=my runs/k=2'
    """
    text = os.fspath(path)
    return shlex.quote(f"{key}={text if key == 'resume' else for_hydra(text)}")
