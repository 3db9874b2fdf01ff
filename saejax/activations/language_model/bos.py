"""Beginning-of-text token: decides which one begins a text from a model's files, and says why.

`bos=auto` asks these in order; the first answer holds:

1. the tokenizer's template (`post_processor` of tokenizer.json): the token before the text, never one after it;
2. tokenizer_config.json: `add_bos_token` with `bos_token`, then a `bos_token` alone;
3. config.json: a `bos_token_id` that the tokenizer marks as special;
4. the vocabulary: a token known to begin texts.

A token that the files name as the end of a text does not begin one. There are two exceptions: the template or
`add_bos_token` says so, or it is known to do both and is named as both (GPT-2's `<|endoftext|>`). A GGUF file decides
alone, as in llama.cpp: `tokenizer.ggml.add_bos_token` says whether, `tokenizer.ggml.bos_token_id` which.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

from tokenizers import Tokenizer

from saejax.errors import UserError
from saejax.storage import json_yaml

KNOWN = ("<|endoftext|>", "<|begin_of_text|>", "<bos>", "<s>")
"""Tokens that models were trained to see at the beginning of texts, the commonest first."""

# What llama.cpp does where a file has no add_bos_token: SentencePiece gets a BOS, byte-level BPE none but for these.
_BYTE_LEVEL_WITH_BOS = ("llama-bpe", "llama3")
_SENTENCEPIECE_BOS = 1
_ADD, _ID = "tokenizer.ggml.add_bos_token", "tokenizer.ggml.bos_token_id"


@dataclasses.dataclass(frozen=True)
class Bos:
    """Token that begins every segment."""

    id: int | None
    """The token, None for none."""
    reason: str
    """Who says so, for the manifest."""


def of_setting(setting: str, tokenizer: Tokenizer) -> Bos:
    """Token of an explicit setting (not "auto").

    Raises:
      UserError: the vocabulary has no such token.
    """
    if setting == "none":
        return Bos(None, "bos=none")
    if (found := _id(tokenizer, setting)) is None:
        raise UserError(f"bos must be auto, none or a token of the model, got {setting!r}")
    return Bos(found, f"bos={setting}")


def of_files(
    tokenizer: Tokenizer, config: Mapping[str, Any] | None = None, tokenizer_config: Mapping[str, Any] | None = None
) -> Bos:
    """The token that begins a text, from the files of a directory.

    Args:
      tokenizer: as its file has it.
      config: contents of config.json.
      tokenizer_config: contents of tokenizer_config.json.
    """
    if leading := leading_ids(tokenizer):
        names = " ".join(_shown(tokenizer, i) for i in leading)
        rest = "; only the first is taken" if len(leading) > 1 else ""
        return Bos(leading[0], f"the tokenizer's template puts {names} before the text{rest}")
    config, beside = config or {}, tokenizer_config or {}
    nested = config.get("text_config")
    inner = nested if isinstance(nested, Mapping) else {}  # of a multimodal model
    config = {**inner, **{key: value for key, value in config.items() if value is not None}}
    named, ends = _id_of(tokenizer, beside.get("bos_token")), _ends(tokenizer, config, beside)
    if beside.get("add_bos_token") is False:
        return Bos(None, "tokenizer_config.json: add_bos_token is false")
    if beside.get("add_bos_token") is True and named is not None:
        return Bos(named, f"tokenizer_config.json: add_bos_token is true, bos_token {_shown(tokenizer, named)}")
    if named is not None and named not in ends:
        return Bos(named, f"tokenizer_config.json: bos_token is {_shown(tokenizer, named)}")
    by_id = _special(tokenizer, config.get("bos_token_id"))
    if by_id is not None and by_id not in ends:
        return Bos(by_id, f"config.json: bos_token_id is {by_id}, {_shown(tokenizer, by_id)}")
    return _known(tokenizer, ends - {named, by_id})


def of_gguf(tokenizer: Tokenizer, metadata: Mapping[str, Any], name: str) -> Bos:
    """The token that begins a text, from the metadata of a GGUF file.

    Args:
      tokenizer: rebuilt from the file.
      metadata: of the file.
      name: of the file, for messages.

    Raises:
      UserError: the file demands a BOS and does not say which, or names one outside its vocabulary.
    """
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "default")
    said, chosen = metadata.get(_ADD), metadata.get(_ID)
    if said is None:
        add = kind == "llama" or pre in _BYTE_LEVEL_WITH_BOS
        why = f"{_ADD} is missing, {str(add).lower()} for {kind if kind == 'llama' else f'{kind}, {pre}'} in llama.cpp"
    else:
        add, why = bool(said), f"{_ADD} is {str(bool(said)).lower()}"
    if not add:
        return Bos(None, why)
    if chosen is None and kind == "llama":
        chosen = _SENTENCEPIECE_BOS
    if chosen is None:
        found = _known(tokenizer, frozenset({metadata.get("tokenizer.ggml.eos_token_id")}))
        if found.id is None and said is not None:
            raise UserError(f"{name}: {_ADD} is true and {_ID} missing; say which: bos=TOKEN, or bos=none")
        return Bos(found.id, f"{why}, {_ID} is missing: {found.reason}")
    chosen = int(chosen)
    if not 0 <= chosen < len(metadata["tokenizer.ggml.tokens"]):
        raise UserError(f"{name}: {_ID}={chosen} is outside the vocabulary; say which: bos=TOKEN, or bos=none")
    return Bos(chosen, f"{why}, {_ID} is {chosen}, {_shown(tokenizer, chosen)}")


def earlier(tokenizer: Tokenizer) -> int | None:
    """`bos=auto` of the first versions: anything that the template adds, else the first known token."""
    added = tokenizer.encode("", add_special_tokens=True).ids
    return added[0] if added else next((i for token in KNOWN if (i := tokenizer.token_to_id(token)) is not None), None)


def leading_ids(tokenizer: Tokenizer) -> list[int]:
    """Token ids that the template of a tokenizer puts before a text."""
    for part in templates(tokenizer):
        if part["type"] == "TemplateProcessing":
            found: list[int] = []
            for piece in part["single"]:
                if "SpecialToken" not in piece:
                    break
                found += part["special_tokens"][piece["SpecialToken"]["id"]]["ids"]
            else:
                continue  # no text at all: nothing stands before it
        else:
            found = [part["cls"][1]] if "cls" in part else []
        if found:
            return found
    return []


def templates(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """The parts of a tokenizer's post-processor, as tokenizer.json has them."""
    if tokenizer.post_processor is None:
        return []
    return list(_parts(json.loads(tokenizer.post_processor.__getstate__())))


def _parts(tree: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if tree["type"] == "Sequence":
        for part in tree["processors"]:
            yield from _parts(part)
    else:
        yield tree


def _known(tokenizer: Tokenizer, ends: frozenset) -> Bos:
    """A token of the vocabulary that is known to begin texts, and that no file names as their end alone."""
    for token in KNOWN:
        if (found := _id(tokenizer, token)) is not None and found not in ends:
            return Bos(found, f"no file names it; {token} is known to begin texts")
    return Bos(None, "no file names one, and the vocabulary has none that is known")


def _ends(tokenizer: Tokenizer, config: Mapping[str, Any], beside: Mapping[str, Any]) -> frozenset:
    """The ids that files name as the end of a text."""
    said = config.get("eos_token_id")
    ids = said if isinstance(said, list) else [said]
    return frozenset({*filter(_is_id, ids), _id_of(tokenizer, beside.get("eos_token"))} - {None})


def _id_of(tokenizer: Tokenizer, token: Any) -> int | None:
    """The id of a token as tokenizer_config.json writes it: a string, or a mapping with its content."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return _id(tokenizer, text) if isinstance(text, str) else None


def _special(tokenizer: Tokenizer, given: Any) -> int | None:
    """The id if the tokenizer marks it as special: in a config.json it may be a default of the library."""
    token = tokenizer.get_added_tokens_decoder().get(given) if _is_id(given) else None
    return given if token is not None and token.special else None


def _is_id(given: Any) -> bool:
    return isinstance(given, int) and not isinstance(given, bool)


def _shown(tokenizer: Tokenizer, token_id: int) -> str:
    return json_yaml.one_line(tokenizer.id_to_token(token_id))


def _id(tokenizer: Tokenizer, token: str) -> int | None:
    """The id of a token, None for none of the vocabulary, as is half of a surrogate pair, which JSON can hold."""
    return None if any("\ud800" <= c <= "\udfff" for c in token) else tokenizer.token_to_id(token)
