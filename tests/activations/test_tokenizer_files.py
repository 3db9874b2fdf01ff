"""What a tokenizer's file carries for other uses changes no data, through any door; begun work goes on as it began."""

import dataclasses
import hashlib
import json
import logging
import pathlib
import shutil

import gguf
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from saejax.activations import language_model, packing, store, text
from saejax.activations.language_model import live as live_module
from saejax.activations.language_model.harvest import HarvestConfig, Run, harvest, load
from saejax.activations.language_model.live import Live
from saejax.activations.loader import digest
from saejax.activations.store import files as store_format
from saejax.activations.store import manifest_schema as store_schema
from saejax.errors import UserError

HOOK = "blocks.0.hook_resid_post"
TEXT, END, OWN = 0, 1, 2  # the special tokens below
WORD = "thehexthe"  # with merges, so that a dropout shows


def made(**template: str) -> Tokenizer:
    """A byte-level tokenizer with three special tokens and some merges, in the 257 tokens of `small_model`."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[: 257 - 5]
    vocab = {token: i for i, token in enumerate(("<|endoftext|>", "</s>", "<own>", *letters, "th", "he"))}
    tokenizer = Tokenizer(models.BPE(vocab, [("t", "h"), ("h", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<|endoftext|>", "</s>", "<own>"])
    if template:
        ids = [(token, i) for token, i in vocab.items() if i < 3]
        tokenizer.post_processor = processors.TemplateProcessing(**template, special_tokens=ids)
    return tokenizer


@pytest.fixture
def model(small_model, tmp_path) -> pathlib.Path:
    """A copy of the small model with the tokenizer above."""
    path = pathlib.Path(shutil.copytree(small_model, tmp_path / "model"))
    # Says that tokenizer.json is to be taken as it is; without it transformers rebuilds Llama's own tokenizer.
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    made().save(str(path / "tokenizer.json"))
    return path


@pytest.fixture
def corpus(tmp_path) -> pathlib.Path:
    """Forty documents of very different length."""
    lines = [json.dumps({"text": f"{WORD} {i} " * (1 + i % 7)}) for i in range(40)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    return tmp_path / "text.jsonl"


def config(model: object, corpus: pathlib.Path, **changes: object) -> HarvestConfig:
    chosen = {"hook": HOOK, "context_length": 32, "batch_sequences": 2, "shard_sequences": 2, **changes}
    return HarvestConfig(model=str(model), text=text.TextFiles(path=str(corpus), heldout_share=0.3), **chosen)


def by_directory(model: pathlib.Path, corpus: pathlib.Path) -> Run:
    return Run(config(model, corpus), (0, 1), language_model.load(model), {})


def by_torch(model: pathlib.Path, corpus: pathlib.Path) -> Run:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    wanted = config(f"torch:{model}", corpus, hook="layers.0")
    return Run(wanted, (0, 1), load(wanted), {})


def by_live(model: pathlib.Path, corpus: pathlib.Path) -> Run:
    return live_module._model(live(model, corpus)).run


def by_backend(model: pathlib.Path, corpus: pathlib.Path) -> Run:
    """A model that a program brings along, its tokenizer loaded by whoever wrote that."""
    backend = language_model.load(model)
    backend.tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    return Run(config(model, corpus), (0, 1), backend, {})


def live(model: pathlib.Path, corpus: pathlib.Path, **changes: object) -> Live:
    same = {"hook": HOOK, "context_length": 32, "batch_sequences": 2, "heldout_share": 0.3}
    live_module._model.cache_clear()  # the files at that path have changed
    live_module._config.cache_clear()
    return Live(model=str(model), corpus=str(corpus), **same, **changes)


DOORS = [by_directory, by_torch, by_live, by_backend]


def tokens(run: Run) -> list[bytes]:
    return [row.tokens.tobytes() + row.segments.tobytes() for split in text.SPLITS for row in run.sequences(split)]


def _dropout(tokenizer: Tokenizer) -> None:
    tokenizer.model.dropout = 0.5


def _repeat(tokenizer: Tokenizer) -> None:
    tokenizer.post_processor = processors.TemplateProcessing("$A $A", special_tokens=[])


CARRIED = {
    "truncation to 8 tokens": lambda t: t.enable_truncation(8),
    "truncation to 9 tokens": lambda t: t.enable_truncation(9, stride=2, direction="left"),
    "padding to 70 tokens": lambda t: t.enable_padding(pad_id=END, pad_token="</s>", length=70),
    "padding to the longest": lambda t: t.enable_padding(pad_id=END, pad_token="</s>"),
    "dropout 0.5": _dropout,
    "a template that repeats or drops the text": _repeat,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("carried", CARRIED)
@pytest.mark.parametrize("door", DOORS)
def test_what_a_file_carries_changes_no_token(door, carried, model, corpus, caplog) -> None:
    expected = tokens(by_directory(model, corpus))
    tokenizer = made()
    CARRIED[carried](tokenizer)
    tokenizer.save(str(model / "tokenizer.json"))
    as_it_is = Tokenizer.from_file(str(model / "tokenizer.json"))
    ids, whole = [[e.ids for e in t.encode_batch([WORD, WORD * 8, WORD])] for t in (as_it_is, made())]
    assert ids != whole or carried == "dropout 0.5"  # the file does it, so leaving it out is seen
    run = door(model, corpus)
    assert tokens(run) == expected
    assert run.packer.bos_id == TEXT
    assert run.common["special_token_policy"]["left_out"] == [carried]
    assert f"ignoring {carried} of the tokenizer's file" in caplog.text
    if door is not by_backend:  # what programs take from a loaded model
        read = run.backend.tokenizer
        assert [e.ids for e in read.encode_batch([WORD, WORD * 8, WORD])] == whole
    else:  # what a program brings stays as it brought it
        assert run.backend.tokenizer.to_str() == as_it_is.to_str()


def test_a_store_is_the_same_with_and_without_truncation(model, corpus, tmp_path) -> None:
    plain = harvest(config(model, corpus, path=str(tmp_path / "a")))
    tokenizer = made()
    tokenizer.enable_truncation(8)
    tokenizer.save(str(model / "tokenizer.json"))
    truncated = harvest(config(model, corpus, path=str(tmp_path / "b")))
    for split in text.SPLITS:
        a, b = store.Reader(plain[split]), store.Reader(truncated[split])
        assert a.n_rows == b.n_rows and a.manifest["tokens_sha256"] == b.manifest["tokens_sha256"]
        np.testing.assert_array_equal(a.rows(0, a.n_rows), b.rows(0, b.n_rows))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("door", DOORS[:3])
@pytest.mark.parametrize(
    ("template", "beside", "fields", "found"),
    [
        ("$A </s>", {}, {}, TEXT),
        ("$A </s>", {"add_bos_token": True, "bos_token": "<own>"}, {}, OWN),
        ("<own> $A </s>", {}, {"bos_token_id": TEXT}, OWN),
        (None, {"add_bos_token": False, "bos_token": "<own>"}, {}, None),
        (None, {"bos_token": "<own>", "eos_token": "</s>"}, {}, OWN),
        (None, {}, {"bos_token_id": OWN, "eos_token_id": END}, OWN),
        (None, {}, {"eos_token_id": TEXT}, None),
    ],
)
def test_every_door_finds_the_same_bos(door, template, beside, fields, found, model, corpus) -> None:
    made(**({"single": template} if template else {})).save(str(model / "tokenizer.json"))
    for name, changes in (("tokenizer_config.json", beside), ("config.json", fields)):
        (model / name).write_text(json.dumps(json.loads((model / name).read_text()) | changes))
    run = door(model, corpus)
    assert run.packer.bos_id == found
    assert run.common["special_token_policy"]["bos_id"] == found and run.common["special_token_policy"]["reason"]
    first = next(run.sequences("train")).tokens[0]
    assert (first == found) if found is not None else (first > OWN)


@pytest.mark.parametrize("add", [True, False, None])
@pytest.mark.parametrize(("pre", "default"), [("llama-bpe", True), ("gpt-2", False)])
def test_a_gguf_file_is_obeyed_in_both_directions(add, pre, default, small_model, corpus, tmp_path) -> None:
    file = tmp_path / "model.gguf"
    _write_gguf(file, made(), pre, add)
    paths = harvest(config(file, corpus, path=str(tmp_path / "out")))
    policy = store.Reader(paths["train"]).manifest["special_token_policy"]
    wanted = default if add is None else add
    assert policy["bos_id"] == (OWN if wanted else None)
    said = "missing" if add is None else str(add).lower()
    assert policy["reason"].startswith(f"tokenizer.ggml.add_bos_token is {said}")
    reader = store.Reader(paths["train"])
    rows, segments = reader.sequences(0, reader.n_sequences)
    begins = np.diff(segments, axis=1, prepend=0) > 0
    assert ((rows[begins] == OWN) == wanted).all()


def _write_gguf(file: pathlib.Path, tokenizer: Tokenizer, pre: str, add: bool | None) -> None:
    writer, d, rng = gguf.GGUFWriter(file, "llama"), 8, np.random.default_rng(0)
    vocab = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    for method, value in {
        "context_length": 64, "embedding_length": d, "block_count": 1, "feed_forward_length": 16, "head_count": 2,
        "head_count_kv": 2, "layer_norm_rms_eps": 1e-5, "tokenizer_model": "gpt2", "tokenizer_pre": pre,
        "token_list": vocab, "token_types": [3] * 3 + [1] * (len(vocab) - 3), "token_merges": ["t h", "h e"],
        "bos_token_id": OWN, "eos_token_id": END,
    }.items():  # fmt: skip
        getattr(writer, f"add_{method}")(value)
    if add is not None:
        writer.add_add_bos_token(add)
    shapes = {"token_embd": (len(vocab), d), "output_norm": (d,), "output": (len(vocab), d)}
    shapes |= {f"blk.0.{name}": (d,) for name in ("attn_norm", "ffn_norm")}
    shapes |= {f"blk.0.attn_{name}": (d, d) for name in ("q", "k", "v", "output")}
    shapes |= {"blk.0.ffn_gate": (16, d), "blk.0.ffn_up": (16, d), "blk.0.ffn_down": (d, 16)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def begun(path: pathlib.Path, model: pathlib.Path, **changes: object) -> bytes:
    """Makes a finished store one that version 0.1 had begun: its last shard is gone, its manifest as written then.

    Returns:
      The bytes of the lost rows.
    """
    manifest = store_schema.read_manifest(path)
    last = path / store_format.shard_name(manifest["n_shards"] - 1)
    lost = last.with_suffix(".rows").read_bytes()
    for file in path.glob(f"{last.name}.*"):
        file.unlink()
    for key in ("sha256", "fingerprint"):
        del manifest[key]
    manifest["special_token_policy"] = {
        key: manifest["special_token_policy"][key] for key in ("bos_id", "bos_at", "open_rows")
    }
    whole = Tokenizer.from_file(str(model / "tokenizer.json"))
    manifest["tokenizer"] = {
        "sha256": hashlib.sha256(whole.to_str().encode()).hexdigest(),
        "vocab_size": whole.get_vocab_size(),
    }
    manifest["harvest"]["bos"] = "auto"
    manifest |= {"complete": False, "rows": 0, "shards": [], **changes}
    manifest["fingerprint"] = store_format.fingerprint(manifest)
    store_format.write_json(path / store_format.MANIFEST, manifest)
    return lost


@pytest.mark.parametrize("limit", [None, 4096])
def test_a_store_begun_before_goes_on_where_the_tokens_are_the_same(limit, model, corpus, tmp_path) -> None:
    if limit is not None:  # a truncation that no text reached
        tokenizer = made()
        tokenizer.enable_truncation(limit)
        tokenizer.save(str(model / "tokenizer.json"))
    wanted = config(model, corpus, path=str(tmp_path / "out"))
    paths = harvest(wanted)
    lost = {split: begun(path, model) for split, path in paths.items()}
    before = {split: store_schema.read_manifest(path) for split, path in paths.items()}
    harvest(wanted)
    assert store.verify(wanted.path) == []
    for split, path in paths.items():
        after = store_schema.read_manifest(path)
        assert after["complete"] and after["fingerprint"] == before[split]["fingerprint"]
        last = path / f"{store_format.shard_name(after['n_shards'] - 1)}.rows"
        assert last.read_bytes() == lost[split]


def test_a_store_begun_with_another_bos_keeps_it_in_both_splits(model, corpus, tmp_path, caplog) -> None:
    """Version 0.1 took the end that the template appends; begun so, a store ends so, and says what it is."""
    made(single="$A </s>").save(str(model / "tokenizer.json"))
    paths = harvest(config(model, corpus, path=str(tmp_path / "out"), bos="</s>"))
    lost = begun(paths["train"], model)
    shutil.rmtree(paths["heldout"])
    wanted = config(model, corpus, path=str(tmp_path / "out"))
    with caplog.at_level(logging.WARNING):
        harvest(wanted)
    assert f"continuing with bos_id {END}, as begun; bos=auto now gives {TEXT}" in caplog.text
    assert store.verify(wanted.path) == []
    assert [store.Reader(path).manifest["special_token_policy"]["bos_id"] for path in paths.values()] == [END, END]
    last = store_format.shard_name(store.Reader(paths["train"]).manifest["n_shards"] - 1)
    assert (paths["train"] / f"{last}.rows").read_bytes() == lost
    fresh = harvest(config(model, corpus, path=str(tmp_path / "fresh")))
    assert store.Reader(fresh["train"]).manifest["special_token_policy"]["bos_id"] == TEXT


def test_a_store_of_truncated_text_is_refused_in_a_line_that_says_why(model, corpus, tmp_path) -> None:
    tokenizer = made()
    tokenizer.enable_truncation(8)
    tokenizer.save(str(model / "tokenizer.json"))
    wanted = config(model, corpus, path=str(tmp_path / "out"))
    paths = harvest(wanted)
    begun(paths["train"], model, tokens_sha256="0" * 64)  # of the tokens that were left of the text
    shards = store_format.published(paths["train"])
    with pytest.raises(UserError, match="begun with other tokens: .* truncation to 8 tokens, .* choose another path"):
        harvest(wanted)
    assert store_format.published(paths["train"]) == shards


@pytest.mark.parametrize("policy", [{}, [], {"bos_id": True}, {"bos_id": -1}, {"bos_id": 10**6}, {"bos_id": "a"}])
def test_a_manifest_whose_bos_cannot_be_is_not_believed(policy, model, corpus, tmp_path) -> None:
    wanted = config(model, corpus, path=str(tmp_path / "out"))
    begun(harvest(wanted)["train"], model, special_token_policy=policy)
    with pytest.raises(UserError, match="special_token_policy"):
        harvest(wanted)


def take(stream, n: int) -> np.ndarray:
    return np.stack([next(stream) for _ in range(n)])


def test_positions_of_live_runs_are_those_of_version_0_1(model, corpus) -> None:
    """The identity that their checkpoints hold, by the formula of then."""
    found = live_module._model(live(model, corpus))
    whole = Tokenizer.from_file(str(model / "tokenizer.json"))
    facts = {
        "hook": HOOK,
        "tokenizer": {
            "sha256": hashlib.sha256(whole.to_str().encode()).hexdigest(), "vocab_size": whole.get_vocab_size(),
        },
        "special_token_policy": {"bos_id": TEXT, "bos_at": "start of every segment", "open_rows": 32},
        "dtype": "bfloat16",
        "d_in": 24,
        "context_length": 32,
    }  # fmt: skip
    weights = {key: value for key, value in found.run.backend.provenance.items() if key != "name"}
    tokens_ = packing.survey(found.train).sha256
    assert found.data == digest([facts, weights, tokens_, found.run.sink.to_json(), 2])


def test_a_live_run_begun_with_another_bos_goes_on_with_it(model, corpus) -> None:
    beside = model / "tokenizer_config.json"
    beside.write_text(json.dumps({"add_bos_token": False}))
    lanes = {"n_lanes": 2, "block_rows": 8, "lanes": range(2), "seed": 0}
    then = live(model, corpus, bos="<|endoftext|>")  # what bos=auto was
    stream = then.open(**lanes)
    take(stream, 3)
    state, expected = stream.get_state(), take(stream, 5)
    heldout = np.concatenate(list(then.heldout(16)))

    now = live(model, corpus)
    stream = now.open(**lanes)
    assert live_module._model(now).run.packer.bos_id is None
    assert take(stream, 1).shape == expected[:1].shape
    stream.set_state(state)
    np.testing.assert_array_equal(take(stream, 5), expected)
    np.testing.assert_array_equal(np.concatenate(list(now.heldout(16))), heldout)
    stream.set_state(stream.get_state())

    other = dataclasses.replace(now, context_length=24)
    with pytest.raises(UserError, match="data was"):
        other.open(**lanes).set_state(state)
    assert live_module._model(other).run.packer.bos_id is None
