"""What a run begins with is looked at before anything is compiled, and the line says what it is: no opposite reason."""

import dataclasses

import numpy as np
import pytest
import small_runs as runs

from saejax import config
from saejax.activations import normalize, store
from saejax.activations.normalize import NormMode
from saejax.activations.store.joined_source import Joined
from saejax.errors import UserError
from saejax.runs import ensembles
from saejax.training import memory

N, D, CONTEXT = 2048, 16, 32
RNG = np.random.default_rng(0)
NORMAL = RNG.standard_normal((N, D)).astype(np.float32)

DATA = {
    "zero": (NORMAL * 0, "are all zero"),
    "negative zero": (NORMAL * np.float32(-0.0) * 0, "are all zero"),
    "constant": (NORMAL * 0 + 3, "are all equal"),
    "constant row": (np.repeat(NORMAL[:1], N, axis=0), "are all equal"),
    "a third": (NORMAL * 0 + np.float32(1 / 3), "are all equal"),
    "1e-30": (NORMAL * np.float32(1e-30), r"too small to be squared in float32 \(they vary by 1e-30"),
    "1e-20": (NORMAL * np.float32(1e-20), r"too small to be squared in float32 \(they vary by 1e-20"),
    "tiny about one": (NORMAL * np.float32(1e-30) + 1, "are all equal"),  # as float32 has it
    "1e18": (NORMAL * np.float32(1e18), r"too large to be squared and added in float32 \(they reach \d.\de\+18"),
    "1e25": (NORMAL * np.float32(1e25), r"too large to be squared and added in float32 \(they reach \d.\de\+25"),
    "largest": (np.sign(NORMAL) * np.finfo(np.float32).max, "too large to be squared"),
}
"""Rows of which no scale can be found, and what is said of them."""


def write_store(folder, rows: np.ndarray) -> str:
    """A finished store of some rows, one sequence for each 32 of them."""
    n_sequences = len(rows) // CONTEXT
    facts = {"hook": "a", "dtype": "float32", "d_in": D, "context_length": CONTEXT, "shard_sequences": 8}
    for split in ("train", "heldout"):
        with store.Writer(folder / split, {**facts, "n_shards": n_sequences // 8}) as writer:
            for number in range(n_sequences // 8):
                with writer.shard(number) as shard:
                    size = 8 * CONTEXT
                    index = np.zeros((size, 4), np.int32)
                    tokens = np.ones((8, CONTEXT, 2), np.int32)
                    part = rows[number * size :][:size]
                    shard.append(part, index, tokens, segment_documents=[[0]] * 8, masked={})
            writer.finish()
    return str(folder)


def compose(tmp_path, kind: str, rows: np.ndarray, *more: str, n_steps: int = 2) -> config.Config:
    """A run on some rows from one of the sources that read files."""
    if kind == "arrays":
        np.save(tmp_path / "rows.npy", rows)
        data = ["source=arrays", f"source.path={tmp_path}/rows.npy"]
    elif kind == "store":
        data = ["source=store", f"source.path={write_store(tmp_path / 'st', rows)}"]
    else:
        parts = [write_store(tmp_path / name, rows) for name in ("a", "b")]
        data = ["source=joined", f"source.paths=[{','.join(parts)}]", "sae.family=crosscoder"]
    return runs.compose("topk", n_steps, *data, "sae.d_sae=32", "train.batch=128", "buffer.rows=256", *more)


@pytest.fixture
def uncompiled(monkeypatch):
    """No step is compiled: what is refused is refused before."""

    def compiled(*_, **__):
        raise AssertionError("compiled before the rows were looked at")

    monkeypatch.setattr(memory, "compile_step", compiled)


@pytest.mark.parametrize(
    ("kind", "data"),
    [("arrays", data) for data in DATA]
    + [(k, data) for k in ("store", "joined") for data in ("zero", "1e-30", "1e18")],
)
def test_rows_without_a_scale_are_called_what_they_are(data, kind, tmp_path, uncompiled):
    rows, said = DATA[data]
    cfg = compose(tmp_path, kind, rows)
    with pytest.raises(
        UserError, match=f"^{'source.paths' if kind == 'joined' else 'source.path'} = .*: the data .*{said}"
    ) as caught:
        runs.train(tmp_path / "run", cfg)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"amplitude_low": 0.0, "amplitude_high": 0.0, "noise": 0.0}, "are all zero"),
        ({"amplitude_low": 1e-25, "amplitude_high": 1e-25, "noise": 0.0}, "are too small"),
        ({"amplitude_low": 1e20, "amplitude_high": 1e20, "noise": 0.0}, "are too large"),
    ],
)
def test_generated_rows_too(change, said, tmp_path, uncompiled):
    overrides = [f"source.{key}={value}" for key, value in change.items()]
    with pytest.raises(UserError, match=f"^source = synthetic: the data {said}"):
        runs.train(tmp_path / "run", runs.compose("topk", 2, *overrides))


@pytest.mark.parametrize("mode", [mode for mode in NormMode if mode is not NormMode.auto])
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("data", ["zero", "constant", "1e-30", "1e25"])
def test_a_scale_that_is_not_there_is_explained(mode, center, data):
    """Also where `estimate` is called alone, and for each mode that needs a scale."""
    rows, said = DATA[data]
    try:
        found = normalize.estimate(rows, mode, center=center)
    except UserError as error:
        reasons = [said] if mode is not NormMode.layer_norm else [said, "are all zero"]  # each row by itself is nothing
        assert any(reason.split(r" \(")[0].split(" in float32")[0] in str(error) for reason in reasons), error
        assert not ("large" in str(error) and data != "1e25") and not ("equal" in str(error) and data == "1e25")
    else:
        assert 0 < float(found.scale) < np.inf


def test_the_site_without_a_scale_is_named():
    rows = np.concatenate([NORMAL[:, :8], NORMAL[:, 8:] * np.float32(1e-30)], axis=1)
    with pytest.raises(UserError, match="the rows of site 2 are too small to be squared"):
        normalize.estimate(rows, NormMode.sqrt_d, sites=(8, 8))
    rows[:, 8:] = 0
    with pytest.raises(UserError, match="the rows of site 2 are all zero"):
        normalize.estimate(rows, NormMode.unit, sites=(8, 8))


@pytest.mark.parametrize("exponent", [-50, pytest.param(40, marks=pytest.mark.nightly), 50])
def test_small_and_large_data_that_float32_can_square_train_as_others(exponent, tmp_path):
    """Scaled by a power of two, rows differ in nothing but their exponent, and the share of variance has none."""
    found = {}
    for power in (0, exponent):
        folder = tmp_path / str(power)
        folder.mkdir()
        cfg = compose(folder, "arrays", NORMAL * np.float32(2.0**power), n_steps=20)
        found[power] = runs.train(folder / "run", cfg).evaluation
    assert found[exponent]["fvu"] == pytest.approx(found[0]["fvu"], rel=1e-4)
    assert found[exponent]["mse"] == pytest.approx(found[0]["mse"] * 4.0**exponent, rel=1e-4)


def test_the_limits_are_those_that_are_said():
    """Mean square about the mean 2^-106, and mean square norm 2^108: one binade inside, one outside."""
    signs = np.where(NORMAL > 0, 1, -1).astype(np.float32)  # mean square 1, about a mean of about 0; norm 4
    assert normalize.trouble(signs * np.float32(2.0**-52)) is None
    assert "too small" in str(normalize.trouble(signs * np.float32(2.0**-54)))
    assert normalize.trouble(signs * np.float32(2.0**51)) is None
    assert "too large" in str(normalize.trouble(signs * np.float32(2.0**52)))


# NaN ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["heldout", "first"])
@pytest.mark.parametrize("kind", ["arrays", "store", "joined"])
def test_rows_that_are_not_finite_are_refused_before_the_slow_part(bad, where, kind, tmp_path, uncompiled):
    """By row, and by file where rows lie in one; in the held-out rows, and in those that the run begins with."""
    for name in ("clean", "bad"):
        (tmp_path / name).mkdir()
    clean, rows = compose(tmp_path / "clean", kind, NORMAL), NORMAL.copy()
    stream = clean.source.open(n_lanes=8, block_rows=16, lanes=range(8), seed=clean.stream_seed)
    first = int(stream.starts(1)[2]) + 5  # pyright: ignore[reportOptionalSubscript]
    row = first if where == "first" else N - 2 if kind == "arrays" else 300
    rows[row, 3] = bad
    cfg = compose(tmp_path / "bad", kind, rows)
    sound = "heldout" if where == "first" else "train"
    for name in ("st", "a", "b"):  # both splits of a store are copies of the rows here: one of them is made sound
        if (dirty := tmp_path / "bad" / name / sound).is_dir():
            dirty.rename(dirty.with_name("aside"))
            (tmp_path / "clean" / name / sound).rename(dirty)
    found = {
        "first": f"row {row} of the source, record 1, lane 2, row 5",
        "heldout": f"held-out row {row} is not finite",
    }
    with pytest.raises(UserError) as caught:
        runs.train(tmp_path / "run", cfg)
    line = str(caught.value)
    assert (f"rows.npy: row {row} holds NaN or an infinity" if kind == "arrays" else found[where]) in line
    assert "\n" not in line and str(tmp_path / "bad") in line


def test_an_ensemble_looks_at_its_rows_as_a_run_does(tmp_path, uncompiled):
    cfg = compose(tmp_path, "arrays", DATA["constant"][0], "ensemble.seed=[0,1]", "data_seed=0")
    with pytest.raises(UserError, match="rows.npy: the data are all equal"):
        ensembles.train(cfg, tmp_path / "run")


def test_rows_that_begin_alike_but_go_on_are_trained_on(tmp_path):
    """A silent stretch is no silent recording."""
    rows = NORMAL.copy()
    rows[: N // 2] = 0
    assert np.isfinite(runs.train(tmp_path / "run", compose(tmp_path, "arrays", rows)).evaluation["fvu"])


def test_held_out_rows_that_are_all_equal_are_said(tmp_path, caplog):
    rows = NORMAL.copy()
    rows[-N // 10 :] = 0
    runs.train(tmp_path / "run", compose(tmp_path, "arrays", rows))
    assert "held-out rows are all equal, so their fvu means nothing" in caplog.text


def test_no_held_out_row_is_said(tmp_path, uncompiled):
    cfg = compose(tmp_path, "arrays", NORMAL, "source.heldout_share=0")
    with pytest.raises(UserError, match="rows.npy: the source has no held-out row: raise its heldout share"):
        runs.train(tmp_path / "run", cfg)


def test_the_place_of_the_data_is_what_was_typed():
    joined = Joined(paths=("/a", "/b"))
    assert joined.place() == "source.paths = /a, /b"
    assert dataclasses.replace(joined, paths=("/a", "/c")).place() == "source.paths = /a, /c"
