"""Schema of a store's manifest and of its shards' records: fields, types, ranges.

The files may come from elsewhere, so every value is checked before use, and no name in them becomes a path: a shard's
number names its files.
"""

import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from saejax.activations.sinks import Sink
from saejax.activations.store import files as store_format
from saejax.errors import UserError
from saejax.fields import paths
from saejax.storage import json_yaml

Check = Callable[[Any], bool]


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def _size(value: Any) -> bool:
    return _count(value) and 0 < value < 2**31


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _mapping(value: Any) -> bool:
    return value is None or isinstance(value, dict)


def _counts(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_count, value.values()))


def _texts(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_text, value.values()))


def _checksum(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


def _documents(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(row, list) and all(map(_count, row)) for row in value)


def _sites(value: Any) -> bool:
    known = isinstance(value, list) and all(isinstance(site, dict) for site in value)
    return known and all(_text(site.get("hook")) and _size(site.get("d_in")) for site in value)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def _sink(value: Any) -> bool:
    try:
        sink = value and Sink(**value)
    except (TypeError, UserError):
        return False
    if not sink:
        return value in (None, {})
    medians = sink.median_norm if isinstance(sink.median_norm, tuple) else (sink.median_norm,)
    known = all(median is None or _number(median) for median in medians) and _count(sink.calibration_tokens)
    return known and (sink.factor is None or _number(sink.factor) and None not in medians)


_MANIFEST: dict[str, Check] = {
    "hook": _text,
    "dtype": lambda value: value in [dtype.name for dtype in store_format.StoreDtype],
    "d_in": _size,
    "context_length": _size,
    "shard_sequences": _size,
    "n_shards": _count,
    "complete": lambda value: isinstance(value, bool),
    "rows": _count,
    "shards": lambda value: isinstance(value, list) and all(isinstance(record, dict) for record in value),
    "fingerprint": _text,
}
_MANIFEST_MAY: dict[str, Check] = {
    "sites": lambda value: value is None or _sites(value),
    "sink": _sink,
    "harvest": _mapping,
    "text": _mapping,
    "model": _mapping,
    "tokenizer": _mapping,
    "n_sequences": _count,
    "n_tokens": _count,
    "sealed": lambda value: value is True,
    "sha256": _checksum,
}
_RECORD: dict[str, Check] = {
    "name": _text,
    "rows": _count,
    "sequences": _count,
    "tokens": _count,
    "masked": _counts,
    "sha256": _texts,
}
_RECORD_MAY: dict[str, Check] = {"segment_documents": _documents, "json_sha256": _checksum}


def read_manifest(path: str | os.PathLike) -> dict:
    """The manifest of the store at `path`.

    Raises:
      UserError: there is no store, or one of another format.
    """
    file = json_yaml.inside(paths.local(path, "path"), store_format.MANIFEST)
    if not file.is_file():
        raise UserError(f"{path} is not an activation store: it has no {store_format.MANIFEST}")
    manifest = store_format.read_json(file)
    if manifest.get("format") != store_format.FORMAT:
        raise UserError(f"{file}: format must be {store_format.FORMAT!r}, got {manifest.get('format')!r}")
    if (version := manifest.get("format_version")) != store_format.FORMAT_VERSION:
        newer = isinstance(version, int) and version > store_format.FORMAT_VERSION
        written = (
            f"was written by a newer saejax: this one reads up to {store_format.FORMAT_VERSION}, install a newer one; "
        )
        raise UserError(
            f"{file} {written if newer else ''}format_version must be {store_format.FORMAT_VERSION}, got {version!r}"
        )
    check_manifest(file, manifest)
    return manifest


def check_manifest(file: pathlib.Path, manifest: Mapping[str, Any]) -> None:
    """Refuses a manifest that lacks a field, holds an impossible value, or was changed since it was written.

    The `fingerprint` covers the store's settings from the start; the `sha256` of a complete manifest also covers the
    table of shards. Complete manifests of the first stores have none, and no checksum of the
    shards' records either: those are then read and compared.

    Raises:
      UserError: naming the file and the field.
    """
    if manifest.get("sha256", store_format.checksum(dict(manifest))) != store_format.checksum(dict(manifest)):
        raise UserError(f"{file} is damaged: its checksum is not that of the harvest")
    _check(file, manifest, _MANIFEST, _MANIFEST_MAY)
    widths = [site["d_in"] for site in store_format.sites(dict(manifest))]
    if sum(widths) != manifest["d_in"]:
        raise UserError(f"{file}: d_in must be the sum of its sites {widths}, got {manifest['d_in']}")
    if manifest["complete"]:
        for number, record in enumerate(manifest["shards"]):
            check_record(file, record, number)
        if len(manifest["shards"]) != manifest["n_shards"]:
            raise UserError(f"{file}: n_shards must be {len(manifest['shards'])}, got {manifest['n_shards']}")
    if manifest["fingerprint"] != store_format.fingerprint(dict(manifest)):
        raise UserError(f"{file} is damaged: its fingerprint is not that of what it says, such as hook, dtype and d_in")
    if manifest["complete"] and "sha256" not in manifest:
        _check_unsealed(file, manifest)


def _check_unsealed(file: pathlib.Path, manifest: Mapping[str, Any]) -> None:
    """Refuses a complete manifest without a checksum of its own where the format says that it has one."""
    later = any("json_sha256" in record for record in manifest["shards"])
    if manifest.get("sealed") or later:
        raise UserError(f"{file} is damaged: it lacks sha256, so that nothing tells whether it is as it was written")
    for number, listed in enumerate(manifest["shards"]):
        record = read_record(file.parent, number)
        differing = [key for key in listed if listed[key] != record.get(key)]
        if differing:
            key = differing[0]
            raise UserError(f"{file} is damaged: {key} of {listed['name']} is not that of its own record")


def check_record(file: pathlib.Path, record: Mapping[str, Any], number: int) -> None:
    """Refuses the record of shard `number` if it lacks a field or holds an impossible value.

    Raises:
      UserError: naming the file and the field.
    """
    name = store_format.shard_name(number)
    _check(file, record, _RECORD, _RECORD_MAY, f"{name} ")
    if record["name"] != name:
        raise UserError(f"{file}: name must be {name}, got {json_yaml.one_line(record['name'])}")
    for suffix in store_format.DATA_SUFFIXES:
        if not _checksum(record["sha256"].get(name + suffix)):
            raise UserError(f"{file} is damaged: it lacks the sha256 of {name}{suffix}")


def read_record(path: pathlib.Path, number: int) -> dict[str, Any]:
    """The record of a published shard.

    Raises:
      UserError: it is not there, or not one.
    """
    file = json_yaml.inside(path, f"{store_format.shard_name(number)}.json")
    record = store_format.read_json(file)
    check_record(file, record, number)
    return record


def _check(
    file: pathlib.Path,
    found: Mapping[str, Any],
    wanted: Mapping[str, Check],
    optional: Mapping[str, Check],
    whose: str = "",
) -> None:
    for key, check in (dict(wanted) | dict(optional)).items():
        if key not in found and key in wanted:
            raise UserError(f"{file} is damaged: {whose}lacks {key}")
        if key in found and not check(found[key]):
            raise UserError(f"{file} is damaged: {whose}{key} cannot be {json_yaml.one_line(repr(found[key]))[:100]}")
