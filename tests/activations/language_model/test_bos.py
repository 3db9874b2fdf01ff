"""`bos=auto`: what stands before the text, by each file that may say so, and never the end of a text by mistake."""

import json

import gguf
import pytest
from tokenizers import Tokenizer, models, processors

from saejax.activations.language_model import bos
from saejax.errors import UserError

VOCAB = ("a", "b", "<s>", "</s>", "<|endoftext|>", "<BOS>", "plain")
A, B, S, END, TEXT, OWN, PLAIN = range(len(VOCAB))
BYTE_LEVEL = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": list(VOCAB)}
PIECES = {**BYTE_LEVEL, "tokenizer.ggml.model": "llama"}


def tokenizer(*special: str, template: str | None = None) -> Tokenizer:
    """The vocabulary up to `plain`, some of it special; without `special` all names in angle brackets are."""
    made = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCAB)}, unk_token="a"))
    made.add_special_tokens(list(special) or [token for token in VOCAB if token.startswith("<")])
    if template is not None:
        tokens = [(token, i) for i, token in enumerate(VOCAB)]
        made.post_processor = processors.TemplateProcessing(single=template, special_tokens=tokens)
    return Tokenizer.from_str(made.to_str())


def without(*names: str) -> Tokenizer:
    """The vocabulary with some names replaced."""
    tree = json.loads(tokenizer().to_str())
    tree["model"]["vocab"] = {(f"x{i}" if token in names else token): i for i, token in enumerate(VOCAB)}
    tree["added_tokens"] = [token for token in tree["added_tokens"] if token["content"] not in names]
    return Tokenizer.from_str(json.dumps(tree))


@pytest.mark.parametrize(
    ("template", "found"),
    [
        ("<s> $A", S),
        ("<BOS> $A </s>", OWN),
        ("</s> $A", END),  # XGLM and OPT: what stands before is what the model has seen there
        ("<BOS> <s> $A", OWN),
        ("$A </s>", TEXT),  # appended: says nothing of the beginning, and the vocabulary has a known token
        ("$A", TEXT),
        ("</s>", TEXT),
    ],
)
def test_the_template_says_what_stands_before_the_text(template: str, found: int) -> None:
    assert bos.of_files(tokenizer(template=template)).id == found


@pytest.mark.parametrize(
    ("made", "found"),
    [
        (processors.BertProcessing(("</s>", END), ("<s>", S)), [S]),
        (processors.RobertaProcessing(("</s>", END), ("<s>", S)), [S]),
        (processors.ByteLevel(), []),
        (
            processors.Sequence(
                [processors.ByteLevel(), processors.TemplateProcessing("<BOS> $A", special_tokens=[("<BOS>", OWN)])]
            ),
            [OWN],
        ),
        (processors.Sequence([processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", END)])]), []),
    ],
)
def test_every_kind_of_template_is_read_as_the_library_applies_it(made, found: list[int]) -> None:
    with_it = tokenizer()
    with_it.post_processor = made
    assert bos.leading_ids(with_it) == found
    ids = with_it.encode("plain").ids
    assert ids[: ids.index(PLAIN)] == found


@pytest.mark.parametrize(
    ("config", "beside", "found", "reason"),
    [
        ({}, {"add_bos_token": True, "bos_token": "<BOS>"}, OWN, "add_bos_token is true"),
        ({}, {"add_bos_token": True, "bos_token": {"content": "<BOS>", "special": True}}, OWN, "add_bos_token is true"),
        ({}, {"add_bos_token": False, "bos_token": "<BOS>"}, None, "add_bos_token is false"),
        ({"bos_token_id": OWN}, {"add_bos_token": False}, None, "add_bos_token is false"),
        ({}, {"add_bos_token": True, "bos_token": None}, TEXT, "known to begin texts"),
        ({"bos_token_id": S}, {"bos_token": "<BOS>"}, OWN, "tokenizer_config.json: bos_token"),
        ({"bos_token_id": OWN}, {}, OWN, "config.json: bos_token_id is 5"),
        ({"text_config": {"bos_token_id": OWN}, "bos_token_id": None}, {}, OWN, "config.json: bos_token_id is 5"),
        ({"bos_token_id": 999}, {}, TEXT, "known to begin texts"),  # not in the vocabulary
        ({"bos_token_id": PLAIN}, {}, TEXT, "known to begin texts"),  # a word: a default that nobody has set
        ({"bos_token_id": True}, {"bos_token": 7, "eos_token": []}, TEXT, "known to begin texts"),
        # The end of a text is no beginning ...
        ({"eos_token_id": TEXT}, {}, S, "<s> is known"),
        ({"eos_token_id": [END, TEXT]}, {}, S, "<s> is known"),
        ({}, {"eos_token": "<|endoftext|>"}, S, "<s> is known"),
        ({"bos_token_id": END, "eos_token_id": END}, {}, TEXT, "<|endoftext|> is known"),
        ({"eos_token_id": END}, {"bos_token": "</s>"}, TEXT, "<|endoftext|> is known"),
        # ... unless the files name one that is known to be both, or say that it is put there.
        ({"bos_token_id": TEXT, "eos_token_id": TEXT}, {}, TEXT, "<|endoftext|> is known"),
        ({"eos_token_id": TEXT}, {"bos_token": "<|endoftext|>"}, TEXT, "<|endoftext|> is known"),
        ({"eos_token_id": END}, {"bos_token": "</s>", "add_bos_token": True}, END, "add_bos_token is true"),
    ],
)
def test_files_beside_the_tokenizer(config: dict, beside: dict, found: int | None, reason: str) -> None:
    said = bos.of_files(tokenizer(), config, beside)
    assert said.id == found and reason in said.reason
    # A template that puts something before the text has the last word, one that only appends has none.
    assert bos.of_files(tokenizer(template="<s> $A"), config, beside).id == S
    assert bos.of_files(tokenizer(template="$A </s>"), config, beside) == said


def test_a_vocabulary_without_a_known_token_has_no_bos() -> None:
    assert bos.of_files(without("<s>", "<|endoftext|>")).id is None
    assert bos.of_files(without("<s>"), {"eos_token_id": TEXT}).id is None


@pytest.mark.parametrize(
    ("metadata", "found", "reason"),
    [
        (BYTE_LEVEL | {"add": True, "id": OWN}, OWN, "add_bos_token is true, tokenizer.ggml.bos_token_id is 5, <BOS>"),
        (BYTE_LEVEL | {"add": False, "id": S}, None, "add_bos_token is false"),
        (BYTE_LEVEL | {"add": False}, None, "add_bos_token is false"),
        (BYTE_LEVEL | {"add": True, "id": END, "eos": END}, END, "bos_token_id is 3"),  # the file says so
        (BYTE_LEVEL | {"add": True}, TEXT, "<|endoftext|> is known"),
        (BYTE_LEVEL | {"add": True, "eos": TEXT}, S, "<s> is known"),
        # Nothing said: as llama.cpp does for the kind of tokenizer.
        (BYTE_LEVEL | {"id": OWN}, None, "missing, false for gpt2, default"),
        (BYTE_LEVEL | {"id": OWN, "pre": "qwen2"}, None, "missing, false for gpt2, qwen2"),
        (BYTE_LEVEL | {"id": OWN, "pre": "smollm"}, None, "missing, false for gpt2, smollm"),
        (BYTE_LEVEL | {"id": OWN, "pre": "llama-bpe"}, OWN, "missing, true for gpt2, llama-bpe"),
        (BYTE_LEVEL | {"id": OWN, "pre": "llama3"}, OWN, "missing, true for gpt2, llama3"),
        (PIECES | {"id": OWN}, OWN, "missing, true for llama"),
        (PIECES, 1, "missing, true for llama"),
        (PIECES | {"add": False, "id": OWN}, None, "add_bos_token is false"),
    ],
)
def test_gguf_files_answer_by_themselves(metadata: dict, found: int | None, reason: str) -> None:
    said = bos.of_gguf(tokenizer(), keyed(metadata), "x.gguf")
    assert said.id == found and reason in said.reason


def test_gguf_files_that_contradict_themselves_are_refused() -> None:
    for metadata, message in (
        (BYTE_LEVEL | {"add": True, "id": 7}, r"x.gguf: tokenizer.ggml.bos_token_id=7 is outside the vocabulary; .*"),
        (BYTE_LEVEL | {"add": True}, r"x.gguf: .*add_bos_token is true and .*bos_token_id missing; say which: bos=TOK"),
    ):
        with pytest.raises(UserError, match=message):
            bos.of_gguf(without("<s>", "<|endoftext|>"), keyed(metadata), "x.gguf")


def keyed(metadata: dict) -> dict:
    """The metadata under the names of the format."""
    ids = gguf.Keys.Tokenizer
    names = {"add": ids.ADD_BOS, "id": ids.BOS_ID, "eos": ids.EOS_ID, "pre": ids.PRE}
    return {names.get(key, key): value for key, value in metadata.items()}
