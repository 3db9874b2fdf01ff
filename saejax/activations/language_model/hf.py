"""Hugging Face directory reader: weights (safetensors only), configuration and tokenizer."""

from __future__ import annotations

import os
import pathlib
import re
from typing import Any

import numpy as np
import safetensors
import tokenizers

from saejax.activations.language_model.fields import Fields, shown
from saejax.errors import UserError
from saejax.storage import json_yaml

# Classes with a language-model head prefix the decoder's names; multimodal Gemma 3 nests the text model.
_PREFIX = re.compile(r"^(model\.language_model\.|language_model\.model\.|language_model\.|transformer\.|model\.)")
# In the files but no part of the text model: constants that code recomputes, and the image half of Gemma 3.
_NOT_WEIGHTS = re.compile(
    r"(^|\.)(vision_tower|multi_modal_projector)\.|rotary_emb\.inv_freq$|^h\.\d+\.attn\.(masked_)?bias$"
)


_FLOATS = ("F64", "F32", "F16", "BF16")


class SafetensorsDirectory:
    """The tensors of `model.safetensors`, or of all files named by `model.safetensors.index.json`."""

    def __init__(self, path: pathlib.Path) -> None:
        self.name = path.name
        self.files = _weight_files(path)
        self._open, self._place = {}, {}
        for file in self.files:
            handle = self._open[file] = _opened(file)
            for key in handle.keys():
                name = _PREFIX.sub("", key)
                if _NOT_WEIGHTS.search(name):
                    continue
                if name in self._place:
                    raise UserError(f"{path.name}: weight {name!r} stands twice in the safetensors files")
                self._place[name] = (file, key)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every weight with its shape."""
        slices = {name: self._open[file].get_slice(key) for name, (file, key) in self._place.items()}
        for name, part in slices.items():
            if part.get_dtype() not in _FLOATS:
                allowed = ", ".join(_FLOATS)
                raise UserError(f"{self.name}: weight {name!r} is stored as {part.get_dtype()}, allowed: {allowed}")
        return {name: tuple(part.get_shape()) for name, part in slices.items()}

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Part of a weight; only its bytes are read."""
        file, key = self._place[name]
        return np.asarray(self._open[file].get_slice(key)[index])


def read_config(path: pathlib.Path) -> dict[str, Any]:
    """The parsed `config.json` of a directory.

    Args:
      path: the directory.

    Returns:
      Its contents.

    Raises:
      UserError: there is none, or it is no JSON.
    """
    file = _file(path, "config.json")
    if file is None:
        raise UserError(f"model={str(path)!r} holds no config.json; allowed: a Hugging Face directory or a .gguf file")
    return json_yaml.read_json(file)


def read_tokenizer(path: pathlib.Path) -> tokenizers.Tokenizer | None:
    """The tokenizer of a directory as its file has it, or None where there is no `tokenizer.json`.

    Args:
      path: the directory.

    Raises:
      UserError: the file is there and cannot be read.
    """
    file = _file(path, "tokenizer.json")
    if file is None:
        return None
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # of no narrower type
        hint = json_yaml.pointer_hint(file)
        raise UserError(f"{file} is not a readable tokenizer.json: {json_yaml.one_line(error)}{hint}") from None


def read_tokenizer_config(path: pathlib.Path) -> dict[str, Any]:
    """The parsed `tokenizer_config.json` of a directory, empty where there is none.

    Args:
      path: the directory.

    Raises:
      UserError: the file cannot be read, or what is read of it has another type than it must have.
    """
    file = _file(path, "tokenizer_config.json")
    if file is None:
        return {}
    fields = Fields(str(file), json_yaml.read_json(file))
    fields.flag("add_bos_token", None)
    for key in ("bos_token", "eos_token"):
        token = fields.get(key)
        inner = token.get("content") if isinstance(token, dict) else token
        if token is not None and not isinstance(inner, str):
            raise fields.refuse(key, "a token's text, or a mapping with its content")
    return dict(fields.raw)


def check_files(path: pathlib.Path) -> None:
    """Opens every file that defines a model, for libraries that fail obscurely on a damaged one.

    Args:
      path: the directory; files that are not there are not missed.

    Raises:
      UserError: a file that is there cannot be read.
    """
    if _file(path, "config.json") is not None:
        read_config(path)
    read_tokenizer(path)
    read_tokenizer_config(path)
    if any(_file(path, name) is not None for name in ("model.safetensors", "model.safetensors.index.json")):
        for file in _weight_files(path):
            _opened(file)


def _file(folder: pathlib.Path, name: str) -> pathlib.Path | None:
    """The file of that name, None where there is none; it must be one, and lie in the folder."""
    path = folder / name
    if not os.path.lexists(path):
        return None
    json_yaml.inside(folder, name)
    if not path.is_file():
        raise UserError(f"{path}: must be a file, and is a folder, a link to nothing or something else")
    return path


def _opened(file: pathlib.Path) -> Any:
    try:
        return safetensors.safe_open(file, framework="numpy")
    except (safetensors.SafetensorError, OSError) as error:
        reason = f"{json_yaml.one_line(error)}{json_yaml.pointer_hint(file)}"
        raise UserError(f"{file} is not a readable safetensors file: {reason}") from None


def _weight_files(path: pathlib.Path) -> list[pathlib.Path]:
    """The files with weights: one, or those that an index names."""
    index = _file(path, "model.safetensors.index.json")
    if index is None:
        single = _file(path, "model.safetensors")
        if single is None:
            raise UserError(
                f"model={str(path)!r} holds no model.safetensors; pickled weights (.bin, .pt) are not loaded"
            )
        return [single]
    named = json_yaml.read_json(index).get("weight_map")
    if not isinstance(named, dict) or not named:
        raise UserError(f"{index}: weight_map={shown(named)}, allowed: a mapping from each weight to its file")
    wrong = [name for name in named.values() if not isinstance(name, str)]
    if wrong:
        raise UserError(f"{index}: weight_map names {shown(wrong[0])}, allowed: names of files")
    files = {name: _file(path, name) for name in sorted(set(named.values()))}
    missing = [name for name, file in files.items() if file is None]
    if missing:
        raise UserError(f"{index} names {shown(missing[0])}, which is not in the directory")
    return [file for file in files.values() if file is not None]
