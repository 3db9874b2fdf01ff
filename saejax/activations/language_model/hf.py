"""A Hugging Face directory as a source of weights, configuration and tokenizer; safetensors only."""

from __future__ import annotations

import json
import pathlib
import re
from typing import Any

import numpy as np
import safetensors
import tokenizers

from saejax import plain
from saejax.errors import UserError

# Classes with a language-model head prefix the decoder's names; multimodal Gemma 3 nests the text model.
_PREFIX = re.compile(r"^(model\.language_model\.|language_model\.model\.|language_model\.|transformer\.|model\.)")
# In the files but no part of the text model: constants that code recomputes, and the image half of Gemma 3.
_NOT_WEIGHTS = re.compile(
    r"(^|\.)(vision_tower|multi_modal_projector)\.|rotary_emb\.inv_freq$|^h\.\d+\.attn\.(masked_)?bias$"
)


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
    file = path / "config.json"
    if not file.is_file():
        raise UserError(f"model={str(path)!r} holds no config.json; allowed: a Hugging Face directory or a .gguf file")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{file} is not valid JSON: {error}") from None


def read_tokenizer(path: pathlib.Path) -> tokenizers.Tokenizer | None:
    """The tokenizer of a directory as its file has it, or None where there is no `tokenizer.json`."""
    file = path / "tokenizer.json"
    return tokenizers.Tokenizer.from_file(str(file)) if file.is_file() else None


def read_tokenizer_config(path: pathlib.Path) -> dict[str, Any]:
    """The parsed `tokenizer_config.json` of a directory, empty where there is none."""
    file = path / "tokenizer_config.json"
    return plain.read_json(file) if file.is_file() else {}


def _opened(file: pathlib.Path) -> Any:
    try:
        return safetensors.safe_open(file, framework="numpy")
    except safetensors.SafetensorError as error:
        raise UserError(f"{file} is not a readable safetensors file: {error}") from None


def _weight_files(path: pathlib.Path) -> list[pathlib.Path]:
    index, single = path / "model.safetensors.index.json", path / "model.safetensors"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        missing = [name for name in names if not (path / name).is_file()]
        if missing:
            raise UserError(f"{index} names {missing[0]}, which is not in the directory")
        return [path / name for name in names]
    if single.is_file():
        return [single]
    raise UserError(f"model={str(path)!r} holds no model.safetensors; pickled weights (.bin, .pt) are not loaded")
