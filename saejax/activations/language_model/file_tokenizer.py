"""Tokenizer of a model's files, without the settings that would change the text.

tokenizer.json may hold truncation and padding, which its last user switched on. It may also hold a dropout that draws
merges anew at every call, or a template that repeats or drops the text. All of that would silently change the data and
is no part of the language model. Without it, the tokens of a text depend on the text alone.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer

from saejax.activations.language_model import bos as bos_rules
from saejax.activations.language_model.bos import Bos, templates


@dataclasses.dataclass(frozen=True, eq=False)
class FileTokenizer:
    """A tokenizer, and what its files say. Made by `of`."""

    tokenizer: Tokenizer
    """Reads all of a text, adds no padding, draws nothing."""
    sha256: str
    """Hash of the tokenizer as in its file, left-out settings included; manifests hold it."""
    left_out: tuple[str, ...]
    """Settings of the file that have no effect, for people; mostly none."""
    auto_bos: Callable[[], Bos]
    """The token that begins a text, by the files."""

    @classmethod
    def of(cls, tokenizer: Tokenizer, auto_bos: Callable[[Tokenizer], Bos] = bos_rules.of_files) -> FileTokenizer:
        """Removes settings that are not the model's; the given tokenizer stays unchanged.

        Args:
          tokenizer: as a file or a library gave it.
          auto_bos: what its files say of the token that begins a text.
        """
        whole = tokenizer.to_str()
        left_out = tuple(_carried(tokenizer))
        taken = _without(Tokenizer.from_str(whole), tokenizer) if left_out else tokenizer
        digest = hashlib.sha256(whole.encode()).hexdigest()
        return cls(taken, digest, left_out, functools.partial(auto_bos, tokenizer))

    def identity(self) -> dict[str, Any]:
        """Record of the tokenizer for a manifest."""
        return {"sha256": self.sha256, "vocab_size": self.tokenizer.get_vocab_size()}

    def bos(self, setting: str) -> Bos:
        """The token that begins a segment.

        Args:
          setting: "auto", "none" or a token.

        Raises:
          UserError: no such token, or a file that contradicts itself.
        """
        return self.auto_bos() if setting == "auto" else bos_rules.of_setting(setting, self.tokenizer)

    def earlier_bos(self) -> int | None:
        """Token of `bos=auto` up to saejax 0.1, for stores begun then."""
        return bos_rules.earlier(self.tokenizer)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """The tokens of each text, without special tokens around them."""
        return [encoding.ids for encoding in self.tokenizer.encode_batch(texts, add_special_tokens=False)]


def tokenizer_of(backend: Any) -> FileTokenizer:
    """The tokenizer of a language model, however it came to it."""
    known = getattr(backend, "file_tokenizer", None)
    if known is not None and known.tokenizer is backend.tokenizer:
        return known
    return FileTokenizer.of(backend.tokenizer)


def _carried(tokenizer: Tokenizer) -> list[str]:
    found = []
    if tokenizer.truncation is not None:
        found.append(f"truncation to {tokenizer.truncation['max_length']} tokens")
    if tokenizer.padding is not None:
        length = tokenizer.padding["length"]
        found.append(f"padding to {'the longest' if length is None else f'{length} tokens'}")
    found += [f"{name} {value:.3g}" for name, value in _draws(tokenizer)]
    if any(_mangles(part) for part in templates(tokenizer)):
        found.append("a template that repeats or drops the text")
    return found


def _without(copy: Tokenizer, tokenizer: Tokenizer) -> Tokenizer:
    """The copy, without all that `_carried` finds."""
    copy.no_truncation()
    copy.no_padding()
    copy.encode_special_tokens = tokenizer.encode_special_tokens  # no file holds it
    for name, _ in _draws(copy):
        setattr(copy.model, name, None)
    if any(_mangles(part) for part in templates(tokenizer)):
        copy.post_processor = None
    return copy


def _draws(tokenizer: Tokenizer) -> list[tuple[str, float]]:
    """Random settings of a token model, with their values; versions of the library know different ones."""
    values = {name: getattr(tokenizer.model, name, None) for name in ("dropout", "alpha", "nbest_size")}
    return [(name, value) for name, value in values.items() if value]


def _mangles(part: dict[str, Any]) -> bool:
    """Whether a template is anything but one text with tokens around it."""
    return part["type"] == "TemplateProcessing" and [
        piece["Sequence"]["id"] for piece in part["single"] if "Sequence" in piece
    ] != ["A"]
