"""Where a run lies and where its data lie: relative paths at every door, and data that are elsewhere or gone."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_run_binding import SIZES, compose

import saejax
from saejax import cli, config
from saejax.errors import UserError
from saejax.runs import ensembles, run
from saejax.storage import checkpoint


@pytest.mark.nightly
def test_a_relative_ensemble_is_begun_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = compose(4, "ensemble.seed=[0,1]")
    assert len(ensembles.train(cfg, Path("en")).evaluations) == 2
    longer = config.from_run(Path("en"), [f"train.n_tokens={64 * 6}"])
    assert len(ensembles.train(longer, Path("en"), resume=True).evaluations) == 2
    assert checkpoint.steps(Path("en/members/seed1"))[-1] == 6


def test_a_relative_folded_sweep_that_was_stopped_goes_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["train", "-m", "sweep.fold=true", *SIZES, f"train.n_tokens={64 * 8}", "seed=0,1", "data_seed=0"]
    words += ["hydra.sweep.dir=runs/swept"]
    assert cli.main(words) == 0
    jobs = [Path("runs/swept") / number for number in "01"]
    before = [checkpoint.load_arrays(job, ("params",)) for job in jobs]
    for job in jobs:
        (job / "run.json").unlink()
        (job / "checkpoints" / "8").rename(job / "elsewhere")
    assert cli.main(words) == 0
    for job, (step, params) in zip(jobs, before, strict=True):
        found, again = checkpoint.load_arrays(job, ("params",))
        assert found == step == 8
        for name, array in params["params"].items():
            np.testing.assert_array_equal(again["params"][name], array)
        logged = [json.loads(line) for line in (job / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in logged if "train/loss" in line] == list(range(1, 9))


@pytest.fixture
def moved(tmp_path) -> tuple[Path, Path]:
    """A run whose data lie elsewhere by now."""
    there = tmp_path / "data" / "rows.npy"
    there.parent.mkdir()
    np.save(there, np.random.default_rng(0).normal(size=(4096, 16)).astype(np.float32))
    run_dir = tmp_path / "moved-run"
    run.train(compose(4, "source=arrays", f"source.path={there}"), run_dir)
    new = tmp_path / "elsewhere.npy"
    there.rename(new)
    return run_dir, new


def test_loading_reads_no_data(moved):
    run_dir, new = moved
    sae = saejax.load(run_dir)
    assert sae.provenance["source"]["type"] == "arrays"
    rows = np.load(new)[:64]
    assert sae(rows).shape == rows.shape
    saejax.export(sae, run_dir / "out")
    longer = config.from_run(run_dir, [f"source.path={new}", f"train.n_tokens={64 * 6}"])
    assert run.train(longer, run_dir, resume=True).step == 6
    assert config.from_run(run_dir).source.path == str(new)


AFRESH = """
import sys
import saejax
from saejax import cli
run_dir, new = sys.argv[1:]
saejax.load(run_dir)
for words in (
    ["evaluate", f"run={run_dir}", f"activations={new}"], ["export", f"run={run_dir}", f"path={run_dir}/afresh"],
    ["report", f"run={run_dir}"], ["train", f"resume={run_dir}", f"source.path={new}", "train.n_tokens=512"],
):
    assert cli.main(words) == 0, words
"""


@pytest.mark.nightly
def test_a_process_that_never_saw_the_data_does_without_them(moved):
    """The one that trained has them open still, under the name that they had."""
    run_dir, new = moved
    done = subprocess.run([sys.executable, "-c", AFRESH, run_dir, new], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert checkpoint.steps(run_dir)[-1] == 8 and (run_dir / "report.html").is_file()


def test_data_that_are_gone_are_named_by_the_path_that_was_given(moved, tmp_path):
    run_dir, _ = moved
    for path in (None, tmp_path / "nowhere.npy"):
        overrides = [f"train.n_tokens={64 * 6}"] + ([] if path is None else [f"source.path={path}"])
        cfg = config.from_run(run_dir, overrides)
        with pytest.raises(UserError, match=f"source.path = {cfg.source.path}: "):
            run.train(cfg, run_dir, resume=True)
