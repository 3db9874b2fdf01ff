"""Damaged and hostile files: every reader answers with an SAE of finite numbers or with one line for the user.

The files are those of the example tables and what every writer writes; a format without any is a failure. Each is
damaged in one place, as bytes or as what the bytes mean: a value of a JSON or YAML mapping, the header of a tensor
file, a member of a zip archive.
"""

import io
import json
import resource
import shutil
import warnings
import zipfile

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
    "6.0.0", "../..", "/", "a\nb", "topk", "jumprelu", [], [1], ["a"], [[], {}], {}, {"a": {}}, {"k": 4}, [["a"]],
)  # fmt: skip
WORDS = (b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\0", b"\xff" * 8, b"\0\0\0\0\1\0\0\0", b"b", b"r", b"\x95")
MORE_MEMORY = 2**30
"""Bytes that the process may grow by while it reads files of a few kilobytes; compiled code takes some of them."""


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
    tree = damaged_tree(yaml.safe_load(data), rng)
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
    """(format, what to load, folder) of every example and of what every writer writes."""
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
    return found


@pytest.mark.parametrize(
    ("seed", "count"), [(0, 400), pytest.param(1, 100_000, marks=[pytest.mark.slow, pytest.mark.timeout(7200)])]
)
def test_damaged_files_end_in_an_sae_or_in_one_line(examples, seed, count, tmp_path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(count):
        rng = np.random.default_rng((seed, number))
        format, path, folder = examples[number % len(examples)]
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        file = files[rng.integers(len(files))]
        change = STRUCTURED.get(file.suffix, damaged_bytes) if rng.random() < 0.6 else damaged_bytes
        whole = file.read_bytes()
        damaged = change(whole, rng)
        file.write_bytes(damaged)
        try:
            _read(format, path)
        except Exception as error:
            shutil.copytree(folder, tmp_path / "damaged")
            raise AssertionError(f"{format}, case {seed}-{number}, {file}: see {tmp_path}") from error
        finally:
            file.write_bytes(whole)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < MORE_MEMORY


def _read(format, path):
    for name, module in interop.FORMATS.items():
        assert module.detect(path) in (True, False), name
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            sae = interop.load(path, format)
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 2000
        else:
            assert all(np.isfinite(array).all() for array in jax.tree.leaves(sae.params))
    assert not warned, warned[0]
