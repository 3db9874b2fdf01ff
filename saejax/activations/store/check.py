"""Inspection of a whole store: its content (`info`, `describe`) and its integrity (`verify`)."""

import hashlib
import math
import os
import pathlib
from collections import Counter

from saejax.activations.store import files as store_format
from saejax.activations.store import manifest_schema as store_schema
from saejax.errors import UserError
from saejax.fields import paths
from saejax.storage import json_yaml


def stores_under(path: str | os.PathLike) -> list[pathlib.Path]:
    """The store at `path`, or the stores in its subdirectories (`train`, `heldout` of a harvest).

    Raises:
      UserError: there is none.
    """
    root = paths.local(path, "path")
    if (root / store_format.MANIFEST).is_file():
        return [root]
    found = sorted(manifest.parent for manifest in root.glob(f"*/{store_format.MANIFEST}"))
    if not found:
        raise UserError(f"{path} is not an activation store and holds none: no {store_format.MANIFEST}")
    return found


def info(path: str | os.PathLike) -> dict:
    """Facts about one store: the manifest's, and counts over the published shards."""
    path = paths.local(path, "path")
    manifest = store_schema.read_manifest(path)
    records = manifest["shards"]
    if not manifest["complete"]:
        records = [store_schema.read_record(path, n) for n in store_format.published(path)]
    masked = sum((Counter(record["masked"]) for record in records), Counter())
    facts = {key: value for key, value in manifest.items() if key != "shards"}
    return facts | {
        "path": str(path),
        "rows": sum(record["rows"] for record in records),
        "tokens": sum(record["tokens"] for record in records),
        "sequences": sum(record["sequences"] for record in records),
        "masked": dict(masked),
        "shards": len(records),
        "bytes": sum(_sizes(record, manifest) for record in records),
    }


def describe(path: str | os.PathLike) -> str:
    """Summary of the store, or stores, at `path`: a few aligned lines each."""
    return "\n\n".join(_describe(info(store)) for store in stores_under(path))


def verify(path: str | os.PathLike) -> list[str]:
    """Everything that is wrong with the store, or stores, at `path`; an empty list if all is sound.

    Checks that every shard's record is there and agrees with the manifest, and the size and the checksum of
    every data file. Reads all bytes.
    """
    return [problem for store in stores_under(path) for problem in _verify(store)]


def is_whole(path: pathlib.Path, number: int, manifest: dict) -> bool:
    """Whether a published shard has all of its files, in their full sizes; nothing of them is read."""
    try:
        record = store_schema.read_record(path, number)
        shapes = store_format.shard_shapes(record, manifest)
        return all(
            (path / (_name(number) + suffix)).stat().st_size == dtype.itemsize * math.prod(shape)
            for suffix, (dtype, shape) in shapes.items()
        )
    except (UserError, KeyError, TypeError, OSError):
        return False


def _verify(path: pathlib.Path) -> list[str]:
    try:
        manifest = store_schema.read_manifest(path)
    except UserError as error:
        return [str(error)]
    problems = []
    there = store_format.published(path)
    if manifest["complete"]:
        table = {record["name"]: record for record in manifest["shards"]}
        numbers = list(range(manifest["n_shards"]))
    else:
        table, numbers = {}, there
        problems.append(f"{path} is not complete: {len(there)} of {manifest['n_shards']} shards; run the harvest again")
    rows = 0
    for number in numbers:
        record, found = _verify_shard(path, number, manifest, table.get(_name(number)))
        problems += found
        rows += record["rows"] if record else 0
    if manifest["complete"] and rows != manifest["rows"]:
        problems.append(f"{path}: the shards hold {rows} rows, the manifest says {manifest['rows']}")
    extra = sorted(set(there) - set(numbers))
    return problems + [f"{path / _name(n)}.json is not in the manifest" for n in extra]


def _verify_shard(
    path: pathlib.Path, number: int, manifest: dict, listed: dict | None
) -> tuple[dict | None, list[str]]:
    name = _name(number)
    file = path / f"{name}.json"
    if manifest["complete"] and listed is None:
        return None, [f"{path / store_format.MANIFEST} does not list {name}"]
    if not file.is_file():
        return listed, [f"{file} is missing"]
    try:
        record = store_schema.read_record(path, number)
        problems = []
        for key, value in (listed or {}).items():
            if key != "json_sha256" and record[key] != value:
                problems.append(f"{file}: {key} is {record[key]}, the manifest says {value}")
        if listed and "json_sha256" in listed and not problems:
            problems += _verify_file(file, file.stat().st_size, listed["json_sha256"])
        for suffix, (dtype, shape) in store_format.shard_shapes(record, manifest).items():
            expected = dtype.itemsize * math.prod(shape)
            problems += _verify_file(path / (name + suffix), expected, record["sha256"][name + suffix])
    except (UserError, KeyError) as error:
        return listed, [str(error) if isinstance(error, UserError) else f"{file} lacks {error}"]
    return record, problems


def _verify_file(file: pathlib.Path, size: int, sha256: str) -> list[str]:
    if not file.is_file():
        return [f"{file} is missing"]
    if file.stat().st_size != size:
        return [f"{file} has {file.stat().st_size} bytes, expected {size}"]
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    return [] if digest == sha256 else [f"{file}: sha256 is {digest[:12]}..., the record says {sha256[:12]}..."]


def _describe(facts: dict) -> str:
    state = "complete" if facts["complete"] else f"growing: {facts['shards']} of {facts['n_shards']} shards"
    masked = ", ".join(f"{count:,} by {reason}" for reason, count in facts["masked"].items() if count)
    sink = facts.get("sink") or {}
    lines = {
        "store": f"{facts['path']} ({state})",
        "hook": f"{facts['hook']} of {(facts.get('harvest') or {}).get('model', '?')}",
        "text": f"{(facts.get('text') or {}).get('type', '?')}, {facts.get('split', '?')} documents",
        "rows": f"{facts['rows']:,} x {facts['d_in']} {facts['dtype']} ({facts['bytes'] / 2**20:,.1f} MiB)",
        "tokens": f"{facts['tokens']:,} in {facts['sequences']:,} sequences of {facts['context_length']}",
        "masked": masked or "none",
        "sinks": f"norm above {sink['factor']} x {_medians(sink['median_norm'])}" if sink.get("factor") else "kept",
        "fingerprint": facts["fingerprint"][:16],
    }
    return "\n".join(f"{key:<12} {json_yaml.one_line(value)}" for key, value in lines.items())


def _medians(median: float | list[float]) -> str:
    medians = median if isinstance(median, list) else [median]
    return ", ".join(f"{value:.4g}" for value in medians)


def _sizes(record: dict, manifest: dict) -> int:
    shapes = store_format.shard_shapes(record, manifest).values()
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in shapes)


def _name(number: int) -> str:
    return store_format.shard_name(number)
