"""Tokenizer of a GGUF file, rebuilt from its lists with the `tokenizers` library."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from saejax.activations.language_model.fields import Fields, shown
from saejax.errors import UserError
from saejax.storage import json_yaml

_SPACE = "\u2581"  # SentencePiece writes a space so
_CONTROL, _USER_DEFINED = 3, 4  # of `tokenizer.ggml.token_type`
# How byte-level BPE cuts text before merging, by `tokenizer.ggml.pre`; `{digits}` is a run of digits.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|{digits}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DIGITS = {"llama-bpe": r"\p{N}{1,3}", "llama3": r"\p{N}{1,3}", "qwen2": r"\p{N}"}


def build(metadata: Mapping[str, Any], name: str) -> Tokenizer | None:
    """The tokenizer of a GGUF file; it adds no begin or end tokens by itself.

    Args:
      metadata: of the file; the keys `tokenizer.ggml.*`.
      name: of the file, for messages.

    Returns:
      The tokenizer, or None if the file has none.

    Raises:
      UserError: a kind of tokenizer that is not supported, or lists that do not fit together.
    """
    fields = Fields(name, metadata, prefix="tokenizer.ggml.")
    kind = fields.choice("model", ("gpt2", "llama"), None)
    if kind is None:
        return None
    try:
        tokenizer = _byte_level(fields) if kind == "gpt2" else _sentencepiece(fields)
    except UserError:
        raise
    except Exception as error:  # of no narrower type
        raise UserError(f"{name}: its tokenizer cannot be built: {json_yaml.one_line(error)}") from None
    tokens = fields.array("tokens", (str,), "texts")
    types = fields.array("token_type", (int,), "whole numbers", [])
    special = [token for token, type_ in zip(tokens, types, strict=False) if type_ == _CONTROL]
    defined = [token for token, type_ in zip(tokens, types, strict=False) if type_ == _USER_DEFINED]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=True, special=False) for token in defined])
    return tokenizer


def _byte_level(fields: Fields) -> Tokenizer:
    """Byte-level BPE with merges listed in the file (GPT-2, SmolLM, Llama 3, Qwen)."""
    pre = fields.choice("pre", ("gpt-2", "default", "smollm", *_DIGITS), "default")
    vocab = {token: i for i, token in enumerate(fields.array("tokens", (str,), "texts"))}
    merges = [tuple(merge.split(" ", 1)) for merge in fields.array("merges", (str,), "texts")]
    wrong = next((merge for merge in merges if len(merge) < 2 or not {*merge, "".join(merge)} <= vocab.keys()), None)
    if wrong is not None:
        raise UserError(
            f"{fields.where}: tokenizer.ggml.merges holds {shown(' '.join(wrong))}, allowed: two tokens of the "
            "vocabulary that make a third"
        )
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=pre in ("llama-bpe", "llama3")))
    if pre in ("gpt-2", "default"):
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif pre == "smollm":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    else:
        words = Regex(_WORDS.replace("{digits}", _DIGITS[pre]))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        )
        tokenizer.normalizer = normalizers.NFC() if pre == "qwen2" else None
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(fields: Fields) -> Tokenizer:
    """SentencePiece BPE (Llama 2, Gemma): the order of merges follows from the scores of what they make."""
    tokens, scores = fields.array("tokens", (str,), "texts"), fields.array("scores", (float,), "numbers")
    if len(scores) != len(tokens) or any(math.isnan(score) for score in scores):
        raise fields.refuse("scores", f"one number for each of {len(tokens)} tokens")
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = []
    for token, score in zip(tokens, scores, strict=True):
        cuts = ((token[:i], token[i:]) for i in range(1, len(token)))
        pairs = [(left, right) for left, right in cuts if left in vocab and right in vocab]
        merges += [(-score, vocab[left], vocab[right], (left, right)) for left, right in pairs]
    merges.sort()
    unknown = tokens[fields.integer("unknown_token_id", 0, low=0, high=len(tokens) - 1)]
    model = models.BPE(vocab, [merge[-1] for merge in merges], unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    prefixed = fields.flag("add_space_prefix", True)
    tokenizer.normalizer = normalizers.Sequence(
        ([normalizers.Prepend(_SPACE)] if prefixed else []) + [normalizers.Replace(" ", _SPACE)]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([decoders.Strip(" ", left=1, right=0)] if prefixed else [])
    )
    return tokenizer
