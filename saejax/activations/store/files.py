"""On-disk format of an activation store, version 1: names, shapes, and how a file is published.

A store is a directory of shards and `manifest.json`; `docs/formats.md` describes it to other programs.
Shard 3 is

    shard-00003.rows     [rows, d_in]                  raw row-major activations in the manifest's dtype
    shard-00003.index    [rows, 4] int32               token id, position in its segment, document, sequence
    shard-00003.tokens   [sequences, context, 2] int32 token id, segment (0 = padding)
    shard-00003.json     the shard's record: counts, checksums, the documents of each sequence's segments

and exists if and only if its json exists: the json is the last file to appear, and it appears at once.
Integers are little-endian. Everything here is shared by the writer, the reader and the checks.
"""

import contextlib
import enum
import errno
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator

import ml_dtypes
import numpy as np

from saejax.errors import UserError
from saejax.storage import atomic

FORMAT = "saejax-activations"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
DATA_SUFFIXES = (".rows", ".index", ".tokens")
PROGRESS_FIELDS = ("complete", "rows", "shards", "fingerprint", "sha256")
INDEX_COLUMNS = ("token", "position", "document", "sequence")
INT = np.dtype("<i4")


class StoreDtype(enum.Enum):
    """Number format of the stored rows."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


def numpy_dtype(name: str) -> np.dtype:
    """The little-endian dtype of the rows; bfloat16 comes from ml_dtypes."""
    dtypes = {
        "bfloat16": np.dtype(ml_dtypes.bfloat16),
        "float16": np.dtype("<f2"),
        "float32": np.dtype("<f4"),
    }
    if name not in dtypes:
        raise UserError(f"store dtype must be one of {', '.join(dtypes)}, got {name!r}")
    return dtypes[name]


SHARD_PREFIX = "shard-"
"""How the name of every file of a shard begins."""


def shard_name(number: int) -> str:
    """Name of a shard's files, without their suffix."""
    return f"{SHARD_PREFIX}{number:05d}"


def sites(manifest: dict) -> list[dict]:
    """The parts of a row in order, [{"hook": name, "d_in": width}, ...]; the field is there if there are several."""
    return manifest.get("sites") or [{"hook": manifest["hook"], "d_in": manifest["d_in"]}]


def shard_shapes(record: dict, manifest: dict) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """dtype and shape of each data file of a shard, by suffix."""
    rows, sequences = record["rows"], record["sequences"]
    return {
        ".rows": (numpy_dtype(manifest["dtype"]), (rows, manifest["d_in"])),
        ".index": (INT, (rows, len(INDEX_COLUMNS))),
        ".tokens": (INT, (sequences, manifest["context_length"], 2)),
    }


def published(path: pathlib.Path) -> list[int]:
    """Numbers of the shards that exist, ascending."""
    names = (record.stem.removeprefix(SHARD_PREFIX) for record in path.glob(f"{SHARD_PREFIX}*.json"))
    return sorted(int(name) for name in names if name.isascii() and name.isdigit() and len(name) < 10)


def fingerprint(manifest: dict) -> str:
    """Hash of the store's settings: the manifest without the progress and the measured median."""
    facts = {key: value for key, value in manifest.items() if key not in PROGRESS_FIELDS}
    facts["sink"] = {key: value for key, value in (facts.get("sink") or {}).items() if key != "median_norm"}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def checksum(manifest: dict) -> str:
    """The `sha256` of a complete manifest: of everything else in it."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def check_range(peak: float, dtype: str, hook: str) -> None:
    """Refuses to store values that the dtype cannot hold.

    Args:
      peak: largest absolute value among the activations, NaN if one of them is.
      dtype: name of the store's dtype.
      hook: where the activations come from, for the message.

    Raises:
      UserError: the value is not finite, or would become infinite.

    >>> check_range(65504.0, "float16", "blocks.3.hook_resid_post")
    >>> check_range(7e4, "float16", "blocks.3.hook_resid_post")
    Traceback (most recent call last):
    saejax.errors.UserError: dtype is float16, but |x| reaches 70000 at blocks.3.hook_resid_post ...
    """
    if not np.isfinite(peak):
        raise UserError(f"activations at {hook} are not finite (|x| reaches {peak}): the model overflowed")
    with np.errstate(over="ignore"):
        stored = np.float32(peak).astype(numpy_dtype(dtype))
    if not np.isfinite(np.float32(stored)):
        raise UserError(
            f"dtype is {dtype}, but |x| reaches {peak:.6g} at {hook} and {dtype} ends at "
            f"{float(ml_dtypes.finfo(numpy_dtype(dtype)).max):.6g}; use bfloat16 or float32"
        )


def read_json(file: pathlib.Path) -> dict:
    """A JSON object; a UserError where the file holds something else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{file} is damaged: not a JSON object")
    return content


def write_json(file: pathlib.Path, content: dict, *, keep_existing: bool = False) -> None:
    """Publishes a JSON file at once: readers see the old content or the new, never a part.

    With `keep_existing` the first of several processes wins, and the others leave its file alone.
    """
    with disk_errors(file.parent):
        atomic.write(file, json.dumps(content, indent=1) + "\n", keep_existing=keep_existing)


@contextlib.contextmanager
def disk_errors(path: pathlib.Path) -> Iterator[None]:
    """Turns a full or read-only disk into a UserError that says how to continue."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS):
            raise
        raise UserError(
            f"cannot write to {path}: {os.strerror(error.errno)}; the published shards are safe, "
            "make room and run the same command again to continue"
        ) from error
