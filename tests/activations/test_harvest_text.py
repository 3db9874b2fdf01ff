"""Text on its way into a model, through every door: a harvest, a live source, PyTorch, the command line."""

import dataclasses
import json
import logging
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from test_harvest import TinyModel, _bytes, _config

from saejax import cli
from saejax.activations import store, text
from saejax.activations.language_model import harvest as harvesting
from saejax.activations.language_model import live
from saejax.activations.language_model.harvest import HarvestConfig, harvest
from saejax.activations.language_model.live import Live
from saejax.errors import UserError

HOOKS = {"harvest": "blocks.0.hook_resid_post", "torch": "layers.0", "live": "blocks.0.hook_resid_post"}
SIZES = {"context_length": 32, "batch_sequences": 2}


def _lines(file: pathlib.Path, *more: object, n: int = 60) -> pathlib.Path:
    documents = [{"text": f"document {i}: {'word ' * (i % 7)}"} for i in range(n)]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(d) + "\n" for d in [*documents, *more]), encoding="utf-8")
    return file


def _tokens(door: str, model: object, corpus: object, root: pathlib.Path, **changes) -> dict[str, np.ndarray]:
    """What the model is given of each split, [sequences, context_length, 2]: tokens and segments."""
    if door == "live":
        settings = {"model": str(model), "hook": HOOKS[door], "corpus": str(corpus), "heldout_share": 0.2, **SIZES}
        source = Live(**(settings | changes))
        next(source.open(n_lanes=2, block_rows=8, lanes=range(2), seed=0))  # the model ran
        assert len(next(source.heldout(8))) == 8
        loaded = live._model(source)
        rows = {"train": loaded.train, "heldout": loaded._sequences}
        return {split: np.stack([np.stack([r.tokens, r.segments], -1) for r in part]) for split, part in rows.items()}
    corpus = text.TextFiles(path=str(corpus), heldout_share=changes.pop("heldout_share", 0.2))
    name = f"torch:{model}" if door == "torch" else str(model)
    out = str(root / "out")
    config = HarvestConfig(model=name, hook=HOOKS[door], text=corpus, path=out, shard_sequences=4, **SIZES, **changes)
    found = {}
    for split, path in harvest(config).items():
        reader = store.Reader(path)
        found[split] = np.stack(reader.sequences(0, reader.n_sequences), -1)
    assert store.verify(out) == []
    return found


def _letters(model: pathlib.Path, tokens: dict[str, np.ndarray]) -> str:
    """All text that the model was given, of both splits."""
    tokenizer = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    flat = np.concatenate([part.reshape(-1, 2) for part in tokens.values()])
    return tokenizer.decode(flat[flat[:, 1] > 0, 0].tolist(), skip_special_tokens=True)


@pytest.fixture(params=["harvest", "live"])
def door(request) -> str:
    return request.param


@pytest.mark.parametrize("door", ["harvest", "live", pytest.param("torch", marks=pytest.mark.nightly)])
def test_half_a_surrogate_pair_is_read_as_the_replacement_character(door, small_model, tmp_path):
    if door == "torch":
        pytest.importorskip("transformers")
        pytest.importorskip("torch")
    file = _lines(tmp_path / "z.jsonl", {"text": "broken \ud83d emoji"}, {"text": "nul \0 here"}, {"text": "\ude00"})
    letters = _letters(small_model, _tokens(door, small_model, file, tmp_path))
    assert "broken \ufffd emoji" in letters and "nul \0 here" in letters
    assert letters.count("\ufffd") == 2
    read = "".join(json.loads(line)["text"] for line in file.read_text().splitlines())
    assert sorted(letters) == sorted(read.replace("\ud83d", "\ufffd").replace("\ude00", "\ufffd"))


def test_half_a_surrogate_pair_is_no_token_either(door, small_model, tmp_path):
    file, model = _lines(tmp_path / "z.jsonl"), tmp_path / "model"
    with pytest.raises(UserError, match=r"bos must be auto, none or a token of the model, got '\\udcff'"):
        _tokens(door, small_model, file, tmp_path, bos="\udcff")
    shutil.copytree(small_model, model)
    (model / "tokenizer_config.json").write_text(json.dumps({"bos_token": "\ud83d", "eos_token": "\ude00"}))
    found = _tokens(door, model, file, tmp_path)
    assert all((part[..., 0, 0] == 0).all() for part in found.values())  # the vocabulary's <|endoftext|>


@pytest.mark.parametrize("name", ["book.txt", "book.jsonl"])
def test_one_document_is_enough(door, small_model, tmp_path, name):
    book = "".join(f"Paragraph {i} of a book.\n\n" for i in range(120))
    content = json.dumps({"text": book}) if name.endswith("l") else book
    (tmp_path / name).write_text(content, encoding="utf-8")
    found = _tokens(door, small_model, tmp_path / name, tmp_path, heldout_share=0.05)
    sizes = {split: int((part[..., 1] > 0).sum()) for split, part in found.items()}
    assert sorted(_letters(small_model, found)) == sorted(book), "all of it is on one side"
    share = sizes["heldout"] / sum(sizes.values())
    assert 0.025 < share < 0.1  # one piece of twenty, longer or shorter by half, and its special tokens


@pytest.mark.parametrize("name", ["data[v1].jsonl", "in[ner]/a.jsonl", "linked/a.jsonl"])
def test_files_that_are_there_are_read(door, small_model, tmp_path, name):
    corpus = tmp_path / "corpus"
    if name.startswith("linked"):
        _lines(tmp_path / "elsewhere/a.jsonl")
        corpus.mkdir()
        (corpus / "linked").symlink_to("../elsewhere")
        (corpus / "loop").symlink_to("..")
        path = corpus
    else:
        path = _lines(corpus / name)
    assert _letters(small_model, _tokens(door, small_model, path, tmp_path)).count("document ") == 60


BAD = {
    "three documents": ([], {}, "none of its 3 documents is held out at KEY.heldout_share=1e-09; KEY.heldout_share="),
    "no document": ([], {"n": 0}, "no document in it, all of it is blank"),
    "one short document": ([], {"n": 1}, "one document, and too short"),
    "a bad last line": ([{"txt": "a"}], {}, r"line 4 of .*z\.jsonl must be a JSON object"),
    "a line that is null": ([None], {}, r"line 4 of .*z\.jsonl must be a JSON object"),
}


@pytest.mark.parametrize("door", ["harvest", "live", "torch"])
@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_with_the_text_is_said_before_the_model_is_loaded(door, tmp_path, case):
    """There is no model, so that an attempt to load it would be another message; and nothing is written."""
    more, sizes, message = BAD[case]
    file = _lines(tmp_path / "z.jsonl", *more, **({"n": 3} | sizes))
    key = "source" if door == "live" else "text"
    with pytest.raises(UserError, match=message.replace("KEY", key)) as found:
        _tokens(door, tmp_path / "no-model", file, tmp_path, heldout_share=1e-9)
    assert "\n" not in str(found.value) and not (tmp_path / "out").exists()
    if key == "source":
        assert "text.path" not in str(found.value) and "source.corpus" in str(found.value)


@pytest.mark.parametrize("line", [b"[1]", b'{"text": nul', b"\xff\xfe", b"{}"])
def test_the_command_line_says_one_line(small_model, tmp_path, capsys, line):
    file = _lines(tmp_path / "z.jsonl")
    file.write_bytes(file.read_bytes() + line)
    settings = ["text=files", f"text.path={file}", f"model={small_model}", f"path={tmp_path / 'out'}"]
    assert cli.main(["harvest", *settings]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith(f"saejax harvest: text.path: line 61 of {file} must be")
    assert not _bytes(tmp_path / "out")


def test_a_live_run_says_one_line(small_model, tmp_path):
    file = _lines(tmp_path / "z.jsonl", {"txt": "a"})
    settings = [f"source.corpus={file}", f"source.model={small_model}", "source.hook=blocks.0.hook_resid_post"]
    code = "import sys; from saejax import cli; sys.exit(cli.main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, "train", "source=language_model", *settings, f"hydra.run.dir={tmp_path / 'out'}"],
        capture_output=True, text=True, timeout=250, cwd=tmp_path,
    )  # fmt: skip
    said = [line for line in done.stderr.splitlines() if "z.jsonl" in line]
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert len(said) == 1 and said[0].startswith(f"saejax train: source.corpus: line 61 of {file} must be")


def test_a_split_without_text_leaves_nothing_even_where_the_model_is_loaded(tmp_path):
    file, model = _lines(tmp_path / "t.jsonl", n=3), TinyModel()
    corpus = text.TextFiles(path=str(file))
    for limits in ({}, {"n_tokens": 9, "heldout_tokens": 9}):
        with pytest.raises(UserError, match="none of its 3 documents is held out"):
            harvest(_config(tmp_path, text=corpus, **limits), model)
    assert model.batches == 0 and not (tmp_path / "out").exists()


def test_a_split_that_the_tokenizer_makes_nothing_of_is_said_before_the_model_runs(tmp_path):
    file, model = tmp_path / "t.jsonl", TinyModel()
    texts = sorted((f"document {i}." for i in range(20)), key=text._place)
    file.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    model.tokenizer.normalizer = tokenizers.normalizers.Replace(texts[0], "")
    corpus = text.TextFiles(path=str(file), heldout_share=sum(map(text._place, texts[:2])) / 2**65)
    assert corpus.count() == {"train": 19, "heldout": 1}
    with pytest.raises(UserError, match="the documents held out hold no token"):
        harvest(_config(tmp_path, text=corpus), model)
    assert model.batches == 0 and not _bytes(tmp_path / "out")


def test_a_bad_line_beyond_the_early_look_is_found_before_the_model_runs(tmp_path):
    """With limits the text is read as far as it is used; the survey of both splits comes before the model."""
    file, model = tmp_path / "t.jsonl", TinyModel()
    lines = [json.dumps({"text": f"document {i} " + "word " * 400}) for i in range(400)]  # training reads a third of it
    file.write_text("\n".join([*lines, "[]"]), encoding="utf-8")
    corpus = text.TextFiles(path=str(file), heldout_share=0.01)
    with pytest.raises(UserError, match="line 401 of"):
        harvest(_config(tmp_path, text=corpus, n_tokens=100, heldout_tokens=10**6), model)
    assert model.batches == 0 and not _bytes(tmp_path / "out")


def test_how_much_text_there_is_and_that_it_is_less_than_asked_for(door, small_model, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    file = _lines(tmp_path / "z.jsonl")
    counts = text.TextFiles(path=str(file), heldout_share=0.2).count()
    found = _tokens(door, small_model, file, tmp_path, n_tokens=10**6, heldout_tokens=10**5)
    n = {split: int((part[..., 1] > 0).sum()) for split, part in found.items()}
    train, heldout = (f"{counts[s]} documents {w} ({n[s]} tokens)" for s, w in (("train", "for training"),
                                                                                 ("heldout", "held out")))  # fmt: skip
    said = [record.getMessage() for record in caplog.records]
    assert said.count(f"text: {train}, {heldout}") == 1
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    key = "source." if door == "live" else ""
    assert [
        f"{key}n_tokens=1000000 exceeds the text: taking all of its {n['train']} tokens for training",
        f"{key}heldout_tokens=100000 exceeds the text: taking all of its {n['heldout']} tokens held out",
    ] == [line for line in warned if "tokens=" in line]


def test_both_stores_must_fit_before_one_is_begun(tmp_path, monkeypatch):
    config = _config(tmp_path, sink_factor=None)
    sizes = {split: store.info(path)["tokens"] for split, path in harvest(config, TinyModel()).items()}
    shutil.rmtree(tmp_path / "out")
    a_token = 6 * 4 + 6 * 4  # a row of six float32, six int32
    usage = shutil.disk_usage(tmp_path)._replace(free=a_token * sum(sizes.values()) - 1)  # enough for either
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    model = TinyModel()
    with pytest.raises(UserError, match="needs about .* GB and has"):
        harvest(config, model)
    assert model.batches == 0 and not _bytes(tmp_path / "out")


def test_a_live_run_begun_with_a_byte_order_mark_as_text_goes_on(small_model, tmp_path):
    folder = _lines(tmp_path / "c/a.jsonl").parent
    (folder / "b.txt").write_bytes(b"\xef\xbb\xbfa text with a byte order mark in front")
    settings = {"model": str(small_model), "hook": HOOKS["live"], "corpus": str(folder), "heldout_share": 0.2}
    source = Live(**settings, **SIZES)
    before, opening = live._Model(source), {"n_lanes": 2, "block_rows": 8, "lanes": range(2), "seed": 0}
    config = source.harvest()
    before._read(dataclasses.replace(config, text=text.FilesAsBefore(**dataclasses.asdict(config.text))), None)
    now = live._model(source)
    assert now.data != before.data
    stream = source.open(**opening)
    state = stream.get_state()
    other = state["stream"] | {"data": "another"}
    with pytest.raises(UserError):
        stream.set_state(state | {"stream": other})
    assert now.data == live._model(source).data != before.data
    stream.set_state(state | {"stream": state["stream"] | {"data": before.data}})
    assert live._model(source).data == before.data
    next(stream)


# --- stores that were begun before --------------------------------------------------------------------------------


def _begun(config: HarvestConfig) -> dict[str, bytes]:
    """A store of an earlier version that was stopped: what it would have become, and what there is."""
    assert isinstance(config.text, text.TextFiles)
    paths = harvest(
        dataclasses.replace(config, text=text.FilesAsBefore(**dataclasses.asdict(config.text))), TinyModel()
    )
    for path in paths.values():
        assert "reading" not in store.Reader(path).manifest["text"]
    whole = _bytes(config.path)
    for path in paths.values():
        for file in (path / "shard-00001.json", path / "shard-00001.rows"):
            file.unlink()
        manifest = json.loads((path / "manifest.json").read_text())
        manifest |= {"complete": False, "rows": 0, "shards": []}
        del manifest["sha256"]
        (path / "manifest.json").write_text(json.dumps(manifest))
    return whole


def _corpus_of_before(root: pathlib.Path, kind: str) -> str:
    """A corpus that is read otherwise today, and its path."""
    folder = _lines(root / "corpus/a.jsonl").parent
    if kind == "mark":
        (folder / "b.txt").write_bytes(b"\xef\xbb\xbfa text with a byte order mark in front")
    if kind == "link":
        _lines(root / "elsewhere/c.jsonl", n=10)
        (folder / "linked").symlink_to("../elsewhere")
    if kind == "pattern":
        shutil.copy(folder / "a.jsonl", folder / "[ab].jsonl")
        return str(folder / "[ab].jsonl")
    if kind == "** with links":
        (folder / "z").mkdir()
        shutil.copy(folder / "a.jsonl", folder / "z/b.jsonl")
        (folder / "y").symlink_to("z")
        return str(folder / "**/*.jsonl")
    return str(folder)


@pytest.mark.parametrize("kind", ["same", "mark", "link", "pattern", "** with links"])
def test_a_store_of_an_earlier_version_goes_on_as_it_was_begun(tmp_path, kind):
    corpus = text.TextFiles(path=_corpus_of_before(tmp_path, kind), heldout_share=0.2)
    config = _config(tmp_path, text=corpus)
    whole = _begun(config)
    harvest(config, TinyModel())
    assert _bytes(config.path) == whole
    harvest(config, None)  # complete: nothing to do
    # Begun today, it is another store, where that makes a difference.
    shutil.rmtree(config.path)
    harvest(config, TinyModel())
    train = "train/shard-00000.tokens"
    assert json.loads((pathlib.Path(config.path) / "train/manifest.json").read_text())["text"]["reading"] == 2
    if kind == "same":
        assert _bytes(config.path)[train] == whole[train]
    harvest(config, None)


def test_a_training_store_that_was_left_without_a_held_out_one_is_not_mixed_with_a_new_split(tmp_path):
    """What earlier versions left of a single document: whole, on the side of training."""
    (tmp_path / "book.txt").write_text("A book. " * 500, encoding="utf-8")
    corpus = text.FilesAsBefore(path=str(tmp_path / "book.txt"), heldout_share=0.2)
    config = _config(tmp_path, text=corpus)
    assert [len(list(corpus.documents(split))) for split in text.SPLITS] == [1, 0]
    run = harvesting.Run(config, (0, 1), TinyModel(), {"harvest": config.settings(), "text": corpus.record()})
    survey = harvesting.packing.survey(run.sequences("train"))
    run.write("train", tmp_path / "out/train", survey)
    before = _bytes(tmp_path / "out")
    new = dataclasses.replace(config, text=text.TextFiles(**dataclasses.asdict(corpus)))
    with pytest.raises(UserError, match="as the store was begun; another path may do.: one document"):
        harvest(new, TinyModel())
    assert _bytes(tmp_path / "out") == before
    harvest(dataclasses.replace(new, path=str(tmp_path / "another")), TinyModel())
