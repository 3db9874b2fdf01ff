"""Activation store: writer, reader and checks under one name."""

from saejax.activations.store.check import describe, info, is_whole, stores_under, verify
from saejax.activations.store.files import FORMAT_VERSION, StoreDtype
from saejax.activations.store.manifest_schema import read_manifest
from saejax.activations.store.reader import Origin, Reader
from saejax.activations.store.writer import ShardWriter, Writer

__all__ = [
    "FORMAT_VERSION",
    "Origin",
    "Reader",
    "ShardWriter",
    "StoreDtype",
    "Writer",
    "describe",
    "info",
    "is_whole",
    "read_manifest",
    "stores_under",
    "verify",
]
