"""Files of a model that are damaged, of another kind, elsewhere, or larger in words than in bytes: one line each."""

import json
import os
import pathlib
import re
import shutil
import struct
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from model_files import CONFIG, METADATA, with_index, write_directory, write_gguf

from saejax.activations import language_model
from saejax.errors import UserError

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12\n"
DAMAGES = {
    "pointer": POINTER, "list": b"[]", "object": b"{}", "null": b"null", "text": b'"x"', "number": b"3",
    "not utf-8": b'\xff\xfe{"a": 1}', "empty": b"", "nothing but zeros": bytes(64), "a mark": b"\xef\xbb\xbf{}",
    "deep": b"[" * 100_000, "half a file": b'{"a": ', "longer than it is": struct.pack("<Q", 2**63) + b"{}",
}  # fmt: skip
FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors", "model.safetensors.index.json")


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """A directory that loads."""
    folder = write_directory(tmp_path / "m")
    language_model.load(folder)
    return folder


def line(path: pathlib.Path) -> str:
    """What loading ends in."""
    with pytest.raises(UserError) as caught:
        language_model.load(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1500
    return str(caught.value)


@pytest.mark.parametrize("damage", [*DAMAGES, "a folder", "a link to nothing", "a pipe", "cut off"])
@pytest.mark.parametrize("name", FILES)
def test_no_damaged_file_is_read(name: str, damage: str, folder: pathlib.Path) -> None:
    file = folder / name
    whole = file.read_bytes() if file.exists() else b'{"weight_map": {"a": "model.safetensors"}}'
    file.unlink(missing_ok=True)
    if damage == "a folder":
        file.mkdir()
    elif damage == "a link to nothing":
        file.symlink_to("nothing")
    elif damage == "a pipe":
        os.mkfifo(file)
    else:
        file.write_bytes(whole[: len(whole) // 2] if damage == "cut off" else DAMAGES[damage])
    if (name, damage) == ("tokenizer_config.json", "object"):
        assert language_model.load(folder).tokenizer is not None  # it need not say anything
        return
    said = line(folder)
    # `{}` is a config.json; what it says too little of is named.
    assert name in said
    assert ("git lfs pull" in said) == (damage == "pointer")


@pytest.mark.parametrize("damage", ["pointer", "list", "null", "empty", "deep", "half a file"])
@pytest.mark.parametrize("name", FILES)
def test_no_damaged_file_is_read_by_torch_models(name: str, damage: str, tmp_path: pathlib.Path) -> None:
    """transformers would raise errors of many kinds, or go on without the tokenizer."""
    pytest.importorskip("transformers")
    from saejax.activations.language_model import torch_source

    folder = write_directory(tmp_path / "m", CONFIG | {"rope_scaling": None, "partial_rotary_factor": None})
    (folder / name).write_bytes(DAMAGES[damage])
    with pytest.raises(UserError, match=re.escape(name)) as caught:
        torch_source.load(folder)
    assert "\n" not in str(caught.value) and ("git lfs pull" in str(caught.value)) == (damage == "pointer")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("add_bos_token", value) for value in ("true", 1, [True], {}, 0.5)),
        *((f"{end}_token", value) for end in ("bos", "eos") for value in (3, True, ["<s>"], {}, {"content": 3})),
    ],
)
def test_a_tokenizer_config_says_what_is_read_of_it_by_type(key: str, value, folder: pathlib.Path) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({key: value}))
    assert f"tokenizer_config.json: {key}=" in line(folder)


@pytest.mark.parametrize("weight_map", [[], "x", 3, None, {}, {"a": 3}, {"a": None}, {"a": ["model.safetensors"]}])
def test_an_index_maps_weights_to_names(weight_map, folder: pathlib.Path) -> None:
    assert "weight_map" in line(with_index(folder, weight_map))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data_offsets", [-64, 0]), ("data_offsets", [0, 2**63]), ("data_offsets", [64, 0]), ("data_offsets", "x"),
        ("data_offsets", [0]), ("shape", [-16]), ("shape", [2**40, 2**40]), ("shape", "x"), ("shape", [True]),
        ("shape", [4, 4]), ("dtype", "I32"), ("dtype", "X"), ("dtype", 3), ("dtype", None),
    ],
)  # fmt: skip
def test_no_damaged_safetensors_header_is_read(key: str, value, folder: pathlib.Path) -> None:
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    header["model.norm.weight"][key] = value
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    assert "norm.weight" in (said := line(folder)) or "model.safetensors" in said


@pytest.mark.parametrize("way", ["up", "absolute", "link", "linked folder", "circle", "NUL", "long", "surrogate"])
def test_no_index_names_a_file_outside_the_folder(way: str, folder: pathlib.Path) -> None:
    secret = folder.parent / "secret"
    secret.mkdir()
    (folder / "model.safetensors").rename(secret / "w.safetensors")
    (folder / "link.safetensors").symlink_to("../secret/w.safetensors")
    (folder / "sub").symlink_to("../secret")
    (folder / "circle").symlink_to("circle")
    name = {
        "up": "../secret/w.safetensors",
        "absolute": str(secret / "w.safetensors"),
        "link": "link.safetensors",
        "linked folder": "sub/w.safetensors",
        "circle": "circle",
        "NUL": "a\0b",
        "long": "x" * 5000,
        "surrogate": "\ud800",
    }[way]
    said = line(with_index(folder, {"model.norm.weight": name}))
    if way in ("up", "absolute", "link", "linked folder"):
        assert "leads out of its folder" in said and "secret/w.safetensors" in said


@pytest.mark.parametrize("name", FILES)
def test_no_file_of_a_model_is_a_link_out_of_its_folder(name: str, folder: pathlib.Path) -> None:
    with_index(folder, {"model.norm.weight": "model.safetensors"})
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / name).rename(folder.parent / "elsewhere")
    (folder / name).symlink_to("../elsewhere")
    assert "leads out of its folder" in line(folder)


def test_the_cache_of_a_hub_and_links_within_the_folder_are_followed(folder: pathlib.Path) -> None:
    with_index(folder, {"model.norm.weight": "parts/w.safetensors", "lm_head.weight": "parts/w.safetensors"})
    (folder / "parts").mkdir()
    (folder / "model.safetensors").rename(folder / "hidden")
    (folder / "parts" / "w.safetensors").symlink_to("../hidden")
    wanted = language_model.load(folder)
    cache = folder.parent / "models--a--b"
    snapshot, blobs = cache / "snapshots" / "abc", cache / "blobs"
    shutil.copytree(folder, snapshot)
    blobs.mkdir()
    for number, file in enumerate(path for path in sorted(snapshot.rglob("*")) if path.is_file()):
        shutil.copy(file, blobs / str(number))
        file.unlink()
        file.symlink_to(os.path.relpath(blobs / str(number), file.parent))
    tokens = np.arange(20)[None]
    one, two = (model.logits(tokens, tokens * 0 + 1) for model in (wanted, language_model.load(snapshot)))
    np.testing.assert_array_equal(one, two)


def test_no_gguf_file_that_is_cut_off_is_read(tmp_path: pathlib.Path) -> None:
    whole = write_gguf(tmp_path / "a.gguf").read_bytes()
    file = tmp_path / "cut.gguf"
    for length in np.linspace(0, len(whole) - 1, 80).astype(int):
        file.write_bytes(whole[:length])
        assert "is not a readable GGUF file" in line(file)


@pytest.mark.parametrize("damage", DAMAGES)
def test_no_damaged_gguf_file_is_read(damage: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.gguf").write_bytes(DAMAGES[damage])
    said = line(tmp_path / "a.gguf")
    assert "a.gguf" in said and ("git lfs pull" in said) == (damage == "pointer")


def test_flipped_bits_in_the_head_of_a_gguf_file_end_in_a_line_or_a_model(tmp_path: pathlib.Path) -> None:
    whole = write_gguf(tmp_path / "a.gguf").read_bytes()
    rng, file, refused = np.random.default_rng(0), tmp_path / "flipped.gguf", 0
    for _ in range(300):
        changed = bytearray(whole)
        for place in rng.integers(4, 1200, rng.integers(1, 4)):
            changed[place] ^= 1 << rng.integers(8)
        file.write_bytes(changed)
        try:
            language_model.read_config(file)
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 100  # the flips hit something


# What no tensor depends on: some of the values below are in its range.
BOUND_BY_NO_TENSOR = {
    "llama.context_length", "llama.attention.layer_norm_rms_epsilon", "tokenizer.ggml.bos_token_id",
    "tokenizer.ggml.eos_token_id", "tokenizer.ggml.token_type", "tokenizer.ggml.add_bos_token",
}  # fmt: skip


@pytest.mark.parametrize("key", [*METADATA, "tokenizer.ggml.add_bos_token"])
def test_gguf_metadata_of_a_wrong_type(key: str, tmp_path: pathlib.Path) -> None:
    wrong = ["32", "", -1, float("nan"), float("inf"), True, 32.5, [1, 2], ["a b", "c d"], [True], 10**9, 2**40]
    for value in wrong:
        file = write_gguf(tmp_path / "a.gguf", {key: value})
        try:
            language_model.load(file)
        except UserError as error:
            assert "\n" not in str(error) and "a.gguf" in str(error)
        else:
            assert key in BOUND_BY_NO_TENSOR, value
            assert (type(value) is bool) == key.endswith("add_bos_token"), value


@pytest.mark.parametrize(
    "lists",
    [
        {"tokenizer.ggml.merges": ["a z\u4e00"]},
        {"tokenizer.ggml.merges": ["ab"]},
        {"tokenizer.ggml.merges": ["a c"]},
        {"tokenizer.ggml.merges": None},
        {"tokenizer.ggml.tokens": None},
        {"tokenizer.ggml.model": "llama"},
        {"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [0.0]},
        {"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [float("nan")] * 259},
        {"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [0.0] * 259, "tokenizer.ggml.unknown_token_id": 259},
    ],
)
def test_lists_of_a_gguf_tokenizer_that_do_not_fit_together(lists: dict, tmp_path: pathlib.Path) -> None:
    said = line(write_gguf(tmp_path / "a.gguf", lists))
    assert "a.gguf: tokenizer.ggml." in said and ("allowed" in said)


HUGE = """
    import json, pathlib, resource, sys
    from saejax.activations import language_model
    from saejax.errors import UserError
    cases = [pathlib.Path(line) for line in sys.stdin.read().split()]
    language_model.load(cases.pop(0))
    now = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (now + 2**28, now + 2**28))
    for case in cases:
        for door in (language_model.read_config, language_model.load):
            try:
                door(case)
            except UserError as error:
                print("refused", str(error)[:200])
            else:
                print("loaded", case)
"""


def test_sizes_take_no_memory_before_they_are_compared_with_the_weights(tmp_path: pathlib.Path) -> None:
    """Within 256 MiB more than a small model takes; the layers alone would be 8 GB, and the matrices more."""
    cases = [write_directory(tmp_path / "m")]
    sizes = ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size", "num_attention_heads",
             "num_key_value_heads", "head_dim")  # fmt: skip
    for size in sizes:
        for value in (10**9, 2**31 - 1, 10**18):
            cases.append(write_directory(tmp_path / f"{size}-{value}", CONFIG | {size: value}))
    window = {"model_type": "mistral", "sliding_window": 4, "num_hidden_layers": 10**9}
    cases.append(write_directory(tmp_path / "window", CONFIG | window))
    cases.append(write_directory(tmp_path / "experts", CONFIG | {"num_local_experts": 10**9}))
    for key in [key for key in METADATA if key.startswith("llama.") and "epsilon" not in key and "context" not in key]:
        cases.append(write_gguf(tmp_path / f"{key}.gguf", {key: 10**9}))
    cases.append(write_gguf(tmp_path / "experts.gguf", {"llama.expert_count": 10**9}))
    endless = write_gguf(tmp_path / "array.gguf", {"general.tags": [1, 2]}).read_bytes()
    place = endless.index(b"general.tags") + len(b"general.tags") + 8
    (tmp_path / "array.gguf").write_bytes(endless[:place] + struct.pack("<Q", 2**60) + endless[place + 8 :])
    cases.append(tmp_path / "array.gguf")
    script = [sys.executable, "-c", textwrap.dedent(HUGE)]
    done = subprocess.run(script, input="\n".join(map(str, cases)), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() and all(line.startswith("refused") for line in done.stdout.splitlines())
    assert len(done.stdout.splitlines()) == 2 * (len(cases) - 1)
