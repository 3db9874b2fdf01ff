"""A step that is not finite stops the run or is left out, and its rows are found again, each by its place."""

import json

import jax
import numpy as np
import pytest
import small_runs as runs
from small_steps import BATCHES, D_IN, LANES, ROWS, Steps

from saejax import config
from saejax.activations import buffer
from saejax.errors import UserError
from saejax.training import nonfinite, step

N_ROWS, WIDTH, BATCH = 4000, 16, 128


def rows(n: int = N_ROWS) -> np.ndarray:
    """Sparse rows: one atom each."""
    rng = np.random.default_rng(0)
    atoms = rng.normal(size=(32, WIDTH))
    return (rng.uniform(0.5, 1.5, (n, 1)) * atoms[rng.integers(32, size=n)]).astype(np.float32)


def compose(path, n_steps: int, *overrides: str) -> config.Config:
    return runs.compose("topk", n_steps, "source=arrays", f"source.path={path}", "sae.d_sae=32", *overrides)


@pytest.fixture
def spoiled(tmp_path):
    """Rows of which one, far from the first filling, is not a number; and where it lies."""
    data = rows()
    source = tmp_path / "rows.npy"
    np.save(source, data)
    cfg = compose(source, 1)
    stream = cfg.source.open(n_lanes=8, block_rows=BATCH // 8, lanes=range(8), seed=0)
    bad = int(stream.starts(12)[5]) + 3
    data[bad, 2] = np.nan
    np.save(source, data)
    return source, bad


def test_rows_are_found_where_the_buffer_drew_them():
    """Against the buffer itself: rows that carry their record and place."""
    key, shape = jax.random.key(3), (LANES, BATCHES, ROWS, 2)

    def record(number):
        place = np.arange(ROWS) + np.zeros((LANES, 1))
        return np.stack([np.full((LANES, ROWS), number), place], axis=-1).astype(np.float32)

    state = buffer.create(np.stack([record(i) for i in range(BATCHES)], axis=1))
    for number in range(150):
        expected = nonfinite.records_of(key, number, shape)
        state, drawn = buffer.swap(state, record(BATCHES + number), jax.random.fold_in(key, number))
        np.testing.assert_array_equal(drawn[..., 0], expected)
        np.testing.assert_array_equal(drawn[..., 1], record(0)[..., 1])


@pytest.mark.parametrize("log_every", [pytest.param(1, marks=pytest.mark.nightly), 50])
def test_a_bad_row_stops_the_run_and_is_named(spoiled, tmp_path, log_every):
    source, bad = spoiled
    cfg = compose(
        source, 40, "source.refuse_nonfinite=false", f"train.log_every_steps={log_every}",
        "checkpoint.save_every_steps=4", "train.eval_every_steps=null",
    )  # fmt: skip
    with pytest.raises(
        UserError,
        match=f"train/loss is nan at step .*: 1 of its 128 rows not finite, the first row {bad} of the source",
    ):
        runs.train(tmp_path / "run", cfg)
    (file,) = (tmp_path / "run" / "nonfinite").glob("*.json")
    said = json.loads(file.read_text())
    assert said["rows"][0]["source_row"] == bad and said["not_finite"] == 1 and said["loss"] == "nan"
    saved = np.load(file.with_suffix(".npz"))
    np.testing.assert_array_equal(saved["rows"], np.load(source)[saved["source_row"]])
    assert np.isnan(saved["rows"]).any(axis=-1).sum() == 1
    steps = runs.checkpoint.steps(tmp_path / "run")
    assert all(number < said["step"] for number in steps) and max(steps, default=0) > said["step"] - 5
    # With skip the same run goes on, from the last good checkpoint.
    again = config.from_run(tmp_path / "run", ["train.on_nonfinite=skip"])
    assert runs.train(tmp_path / "run", again, resume=True).step == 40
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert 1 <= record["nonfinite_steps"] <= 3  # the row returns with its epoch
    learned = {name: v for name, v in runs.saved(tmp_path / "run").items() if "buffer" not in name}
    assert all(np.isfinite(value).all() for value in learned.values())


def test_a_step_left_out_changes_the_buffer_only():
    steps = Steps("topk")
    made = step.make(
        steps.cfg.sae,
        steps.tx,
        dead_window_tokens=steps.cfg.train.dead_window_tokens,
        learning_rate=lambda _: 1e-3,
        skip_nonfinite=True,
    )
    with jax.set_mesh(steps.mesh):
        plain, _ = jax.jit(steps.made)(steps.born, steps.record(1)[:, 0])
        same, metrics = jax.jit(made)(steps.born, steps.record(1)[:, 0])
        assert metrics["skipped"] == 0
        for a, b in zip(jax.tree.leaves(plain.params), jax.tree.leaves(same.params), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
        before = same.replace(buffer=buffer.create(np.full((LANES, BATCHES, ROWS, D_IN), np.nan, np.float32)))
        after, metrics = jax.jit(made)(before, steps.record(1)[:, 0])
    assert metrics["skipped"] == 1 and after.step == 2
    for name in ("params", "opt_state", "liveness"):
        for a, b in zip(jax.tree.leaves(getattr(before, name)), jax.tree.leaves(getattr(after, name)), strict=True):
            np.testing.assert_array_equal(a, b)
    assert (np.asarray(after.buffer.rows) != np.asarray(before.buffer.rows)).any()


def test_too_many_in_a_row_stop_the_run(tmp_path):
    data = rows()
    source = tmp_path / "rows.npy"
    np.save(source, data)
    cfg = compose(
        source, 40, "source.refuse_nonfinite=false", "train.on_nonfinite=skip", "train.max_skipped_steps=3",
        "train.eval_every_steps=null", "checkpoint.save_every_steps=null",
    )  # fmt: skip
    stream = cfg.source.open(n_lanes=8, block_rows=BATCH // 8, lanes=range(8), seed=0)
    for record in range(10, 20):
        for start in stream.starts(record):
            data[start : start + BATCH // 8] = np.inf
    np.save(source, data)
    with pytest.raises(UserError, match="is nan at step .*train.max_skipped_steps=3 were left out in a row"):
        runs.train(tmp_path / "run", cfg)
    assert not runs.checkpoint.steps(tmp_path / "run")


def test_a_start_that_is_not_finite_is_refused(tmp_path):
    data = rows()
    data[:-200] = np.where(np.arange(N_ROWS - 200)[:, None] % 50 == 7, np.nan, data[:-200])  # not those held out
    np.save(tmp_path / "rows.npy", data)
    cfg = compose(tmp_path / "rows.npy", 5, "source.refuse_nonfinite=false")
    with pytest.raises(
        UserError, match=r"the data are not finite: row \d+ of the source, record 0, lane \d, row \d+ of it"
    ):
        runs.train(tmp_path / "run", cfg)
    np.save(tmp_path / "large.npy", rows() * np.float32(1e25))
    with pytest.raises(UserError, match="too large to be squared"):
        runs.train(tmp_path / "large", compose(tmp_path / "large.npy", 5))


def test_data_that_cannot_be_read_cost_no_step(tmp_path):
    """The rows turn bad in the middle: what was learned before is saved."""
    data = rows()
    source = tmp_path / "rows.npy"
    np.save(source, data)
    cfg = compose(source, 40, "train.eval_every_steps=null", "checkpoint.save_every_steps=null")
    stream = cfg.source.open(n_lanes=8, block_rows=BATCH // 8, lanes=range(8), seed=0)
    data[int(stream.starts(14)[0])] = np.nan
    np.save(source, data)
    with pytest.raises(UserError, match="rows.npy: row .* holds NaN"):
        runs.train(tmp_path / "run", cfg)
    (saved,) = runs.checkpoint.steps(tmp_path / "run")
    assert 1 <= saved <= 14 - 8  # record 14 is the seventh after the filling of 8
