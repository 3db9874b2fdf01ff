"""Rebuilds the tokenizer that a GGUF file carries as lists, with the `tokenizers` library."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from saejax.errors import UserError

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
      UserError: a kind of tokenizer that is not supported.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind is None:
        return None
    if kind == "gpt2":
        tokenizer = _byte_level(metadata, name)
    elif kind == "llama":
        tokenizer = _sentencepiece(metadata)
    else:
        raise UserError(f"{name}: tokenizer.ggml.model={kind!r} is not supported, allowed: gpt2, llama")
    types = metadata.get("tokenizer.ggml.token_type", ())
    tokens = metadata["tokenizer.ggml.tokens"]
    special = [token for token, type_ in zip(tokens, types, strict=False) if type_ == _CONTROL]
    defined = [token for token, type_ in zip(tokens, types, strict=False) if type_ == _USER_DEFINED]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=True, special=False) for token in defined])
    return tokenizer


def _byte_level(metadata: Mapping[str, Any], name: str) -> Tokenizer:
    """Byte-level BPE with merges listed in the file (GPT-2, SmolLM, Llama 3, Qwen)."""
    pre = metadata.get("tokenizer.ggml.pre", "default")
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    vocab = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=pre in ("llama-bpe", "llama3")))
    if pre in ("gpt-2", "default"):
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif pre == "smollm":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif pre in _DIGITS:
        words = Regex(_WORDS.replace("{digits}", _DIGITS[pre]))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        )
        tokenizer.normalizer = normalizers.NFC() if pre == "qwen2" else None
    else:
        allowed = ", ".join(("gpt-2", "default", "smollm", *_DIGITS))
        raise UserError(f"{name}: tokenizer.ggml.pre={pre!r} is not supported, allowed: {allowed}")
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(metadata: Mapping[str, Any]) -> Tokenizer:
    """SentencePiece BPE (Llama 2, Gemma): the order of merges follows from the scores of what they make."""
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = []
    for token, score in zip(tokens, scores, strict=True):
        cuts = ((token[:i], token[i:]) for i in range(1, len(token)))
        pairs = [(left, right) for left, right in cuts if left in vocab and right in vocab]
        merges += [(-score, vocab[left], vocab[right], (left, right)) for left, right in pairs]
    merges.sort()
    unknown = tokens[metadata.get("tokenizer.ggml.unknown_token_id", 0)]
    model = models.BPE(vocab, [merge[-1] for merge in merges], unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    prefixed = metadata.get("tokenizer.ggml.add_space_prefix", True)
    tokenizer.normalizer = normalizers.Sequence(
        ([normalizers.Prepend(_SPACE)] if prefixed else []) + [normalizers.Replace(" ", _SPACE)]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([decoders.Strip(" ", left=1, right=0)] if prefixed else [])
    )
    return tokenizer
