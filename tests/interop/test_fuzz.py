"""Damaged and hostile files: every reader answers with an SAE of finite numbers or with one line for the user.

The files are those of the example tables and what every writer writes; a format without any is a failure. Each is
damaged in one place, as bytes or as what the bytes mean: a value of a JSON or YAML mapping, the header of a tensor
file, a member of a zip archive. No reader opens a file outside the folder, whatever is in it.
"""

import collections
import contextlib
import io
import json
import os
import resource
import shutil
import sys
import warnings
import zipfile
from pathlib import Path

import jax
import numpy as np
import published_examples
import pytest
import transcoder_examples
import yaml

from saejax import interop
from saejax.errors import UserError

pytest.importorskip("torch")

VALUES = (
    None, True, False, -1, 0, 2, 0.5, -1.5, 10**18, 10**400, 1e308, float("nan"), float("-inf"), "", "²", "x" * 300,
    "6.0.0", "../..", "/", "a\nb", "a\0b", "topk", "jumprelu", [], [1], ["a"], [[], {}], {}, {"a": {}}, {"k": 4},
    [["a"]],
)  # fmt: skip
WORDS = (b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\0", b"\xff" * 8, b"\0\0\0\0\1\0\0\0", b"b", b"r", b"\x95")
MORE_MEMORY = 2**30
"""Bytes that the process may grow by while it reads files of a few kilobytes; compiled code takes some of them."""
REPOSITORY = Path(__file__).resolve().parents[2]
COMPILED = os.environ.get("JAX_COMPILATION_CACHE_DIR", REPOSITORY)
OWN = (sys.prefix, sys.base_prefix, REPOSITORY, COMPILED, "/proc", "/dev/null", "/dev/urandom", "/sys")
"""Where the program itself lies, and what libraries ask the system."""
PARTS = [(0, 400), *(pytest.param(seed, 25_000, marks=[pytest.mark.nightly]) for seed in range(1, 5))]
"""Seeds and counts: a few always, and 100,000 in four parts that processes can share."""

_opened: list[str] | None = None


def _note_opened(event: str, arguments: tuple) -> None:
    if _opened is not None and event == "open" and isinstance(arguments[0], str):
        _opened.append(arguments[0])


sys.addaudithook(_note_opened)


@contextlib.contextmanager
def nothing_opened_outside(folder):
    """Fails when Python opens a file that is neither in the folder nor a part of the program."""
    global _opened
    _opened = []
    try:
        yield
        paths = map(os.path.realpath, _opened)
    finally:
        _opened = None
    roots = tuple(f"{os.path.realpath(root)}/" for root in (folder, *OWN))
    outside = [path for path in paths if not f"{path}/".startswith(roots)]
    assert not outside, outside


def damaged_bytes(data, rng):
    data, at = bytearray(data), int(rng.integers(len(data) + 1))
    match rng.integers(6):
        case 0:
            data[at:] = b""
        case 1:
            data[at:at] = rng.bytes(int(rng.integers(1, 9)))
        case 2:
            del data[at : at + int(rng.integers(1, 9))]
        case 3:
            word = WORDS[rng.integers(len(WORDS))]
            data[at : at + len(word)] = word
        case _:
            for place in rng.integers(len(data), size=int(rng.integers(1, 4))) if data else ():
                data[place] ^= 1 << int(rng.integers(8))
    return bytes(data)


def damaged_tree(tree, rng):
    """One value, at any depth, removed, renamed or replaced."""
    places, waiting = [], [tree]
    while waiting:
        node = waiting.pop()
        for key in node if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            waiting += [node[key]] if isinstance(node[key], (dict, list)) else []
    if not places or rng.random() < 0.02:
        return VALUES[rng.integers(len(VALUES))]
    node, key = places[rng.integers(len(places))]
    match rng.integers(10):
        case 0:
            del node[key]
        case 1 if isinstance(node, dict):
            node[str(VALUES[rng.integers(len(VALUES))])[:20]] = node.pop(key)
        case _:
            node[key] = VALUES[rng.integers(len(VALUES))]
    return tree


def damaged_json(data, rng):
    return json.dumps(damaged_tree(json.loads(data), rng)).encode()


def damaged_yaml(data, rng):
    tree = damaged_tree(yaml.load(data, getattr(yaml, "CSafeLoader", yaml.SafeLoader)), rng)
    return str(tree).encode() if tree in (10**400,) else yaml.safe_dump(tree).encode()


def damaged_safetensors(data, rng):
    size = int.from_bytes(data[:8], "little")
    header = damaged_json(data[8 : 8 + size], rng)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def damaged_zip(data, rng):
    """One member damaged, in an archive that is whole; sometimes the header or pickle, sometimes the numbers."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    described = [name for name in members if name.endswith((".pkl", ".npy"))]
    name = described[rng.integers(len(described))] if rng.random() < 0.8 else list(members)[rng.integers(len(members))]
    head = 128 if name.endswith(".npy") else len(members[name])
    members[name] = damaged_bytes(members[name][:head], rng) + members[name][head:]
    how = zipfile.ZIP_DEFLATED if rng.random() < 0.1 else zipfile.ZIP_STORED
    with zipfile.ZipFile(out := io.BytesIO(), "w", how) as archive:
        for name, member in members.items():
            archive.writestr(name, member)
    return out.getvalue()


STRUCTURED = {
    ".json": damaged_json,
    ".yaml": damaged_yaml,
    ".safetensors": damaged_safetensors,
    ".npz": damaged_zip,
    ".pt": damaged_zip,
    ".pth": damaged_zip,
}


@pytest.fixture(scope="session")
def examples(trained, tmp_path_factory):
    """(format, what to load, folder, its files) of every example and of what every writer writes."""
    found, tables = [], (published_examples.EXAMPLES, transcoder_examples.EXAMPLES)
    for table in tables:
        for format, *_, write in table.values():
            folder = tmp_path_factory.mktemp("example")
            found.append((format, write(folder)[0], folder))
    for format, module in interop.FORMATS.items():
        for name in ("topk", "jumprelu", "batch_topk", "gated", "matryoshka") if module.export else ():
            folder = tmp_path_factory.mktemp("written")
            try:
                found.append((format, interop.export(trained(name), folder / "sae", format), folder))
            except UserError:
                continue
    assert {format for format, _, _ in found} == set(interop.FORMATS)
    return [(*example, sorted(file for file in example[2].rglob("*") if file.is_file())) for example in found]


def test_no_file_is_read_through_a_link_out_of_the_folder(examples, tmp_path):
    """Of every file of every example, whatever the system calls open; only what was typed itself may be a link."""
    refused = collections.Counter()
    for format, path, _, files in examples:
        for file in (file for file in files if file != path):
            outside = shutil.move(file, tmp_path / "outside")
            file.symlink_to(outside)
            try:
                if _read(format, path) == "refused":
                    with pytest.raises(UserError, match="leads out of its folder"):
                        interop.load(path, format)
                    refused[format] += 1
                else:
                    whole = outside.read_bytes()
                    outside.write_bytes(b"[")
                    assert _read(format, path) == "read", (format, file)  # a file that nobody reads
                    outside.write_bytes(whole)
            finally:
                file.unlink()
                shutil.move(outside, file)
    whole_files = {"openai", "goodfire"}  # a single file each
    assert set(refused) == set(interop.FORMATS) - whole_files


@pytest.mark.parametrize("below", ["", "layer_20/width_16k"])
def test_links_of_a_hubs_cache_are_followed(trained, tmp_path, below):
    folder = tmp_path / "cache" / "snapshots" / "0123abc" / below
    (tmp_path / "cache" / "blobs").mkdir(parents=True)
    interop.export(trained("topk"), folder)
    for number, file in enumerate(sorted(folder.iterdir())):
        blob = shutil.move(file, tmp_path / "cache" / "blobs" / str(number))
        file.symlink_to(os.path.relpath(blob, folder))
    assert interop.load(folder).sparsifier.name == "topk"


@pytest.mark.timeout(7200)
@pytest.mark.parametrize(("seed", "count"), PARTS)
def test_damaged_files_end_in_an_sae_or_in_one_line(examples, seed, count, tmp_path, capsys):
    before, counts = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, collections.Counter()
    for number in range(count):
        rng = np.random.default_rng((seed, number))
        format, path, folder, files = examples[number % len(examples)]
        file = files[rng.integers(len(files))]
        change = STRUCTURED.get(file.suffix, damaged_bytes) if rng.random() < 0.6 else damaged_bytes
        whole = file.read_bytes()
        file.write_bytes(change(whole, rng))
        try:
            with nothing_opened_outside(folder):
                counts[format, _read(format, path)] += 1
        except Exception as error:
            shutil.copytree(folder, tmp_path / "damaged")
            raise AssertionError(f"{format}, case {seed}-{number}, {file}: see {tmp_path}") from error
        finally:
            file.write_bytes(whole)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    with capsys.disabled():
        if count > 1000:
            print(f"\n{count} damaged files, {grown / 2**20:.0f} MiB more memory: {dict(counts)}")
    assert grown < MORE_MEMORY
    assert all(counts[format, "refused"] for format in interop.FORMATS)


def _read(format, path) -> str:
    """What became of it: read or refused."""
    for name, module in interop.FORMATS.items():
        assert module.detect(path) in (True, False), name
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            sae = interop.load(path, format)
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 2000
            end = "refused"
        else:
            assert all(np.isfinite(array).all() for array in jax.tree.leaves(sae.params))
            end = "read"
    assert not warned, str(warned[0])
    return end
