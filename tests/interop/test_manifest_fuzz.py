"""Damaged manifests and records of our own: every reader answers with what they say, or with one line for the user.

The files are those of a run and a store of tests/fixtures, each damaged in one place as in test_fuzz.py. No reader
opens a file outside the folder, whatever a manifest says.
"""

import collections
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import yaml
from test_fuzz import PARTS, STRUCTURED, VALUES, damaged_bytes, damaged_tree, nothing_opened_outside

from saejax import config, report
from saejax.activations import store
from saejax.errors import UserError
from saejax.report import sweep
from saejax.runs import directory
from saejax.storage import checkpoint, json_yaml, tracking

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two sweeps of one run that was evaluated, the second with a short config, and a complete and a growing store."""
    run_dir = Path(shutil.copytree(FIXTURES / "run_format_2", tmp_path / "sweep" / "0"))
    rates = np.linspace(0, 0.5, 16).tolist()
    evaluation = {"metrics": {"fvu": 0.2, "l0": 2.0}, "definitions": {"fvu": "share"}, "data": {"rows": 64}}
    (run_dir / "eval.json").write_text(json.dumps(evaluation | {"arrays": {"firing_rate": rates}}))
    short = Path(shutil.copytree(run_dir, tmp_path / "short" / "0"))  # what is not damaged is read often
    tree = yaml.safe_load((run_dir / "config.yaml").read_text())
    kept = {"sae": ("type", "d_in", "d_sae", "k"), "source": ("type", "d_in"), "train": ("n_tokens", "batch")}
    tree = {group: {key: tree[group][key] for key in keys} for group, keys in kept.items()} | {"buffer": {"rows": 64}}
    (short / "config.yaml").write_text(yaml.safe_dump(tree))
    shutil.copytree(FIXTURES / "store_format_1" / "train", tmp_path / "store")
    shutil.copytree(FIXTURES / "store_format_1" / "train", tmp_path / "growing")
    manifest = tmp_path / "growing" / "manifest.json"
    tree = json.loads(manifest.read_text()) | {"complete": False, "shards": [], "rows": 0}
    manifest.write_text(json.dumps(tree))
    return tmp_path


def damaged_lines(data: bytes, rng: np.random.Generator) -> bytes:
    """One line of a JSONL file changed."""
    lines = data.splitlines()
    at = rng.integers(len(lines))
    lines[at] = json.dumps(damaged_tree(json.loads(lines[at]), rng)).encode()
    return b"\n".join(lines)


def read_run(run_dir: Path, rng: np.random.Generator, name: str) -> None:
    """What commands read of a file of a run."""
    if name == "config.yaml":
        answers(lambda: config.from_run(run_dir))
    if name == "metrics.jsonl":
        answers(lambda: tracking.read(run_dir))
    if name == "run.json":
        answers(lambda: directory.objective(run_dir, ["minimize", "minimize"]))
    answers(lambda: sweep.text(sweep.read_sweep(run_dir.parent)))
    if rng.random() < 0.008:
        if name != "config.yaml":
            answers(lambda: directory.decide(config.from_run(run_dir), run_dir, directory.Request.same))
        answers(lambda: report.build(run_dir, out=run_dir.parent.parent / "page.html"))
        answers(lambda: report.build_sweep(run_dir.parent, out=run_dir.parent.parent / "page.html"))


def read_checkpoint(run_dir: Path, rng: np.random.Generator, name: str) -> None:
    """The arrays of a run."""
    answers(lambda: checkpoint.load_arrays(run_dir, ("params", "normalizer")))


def read_store(path: Path, rng: np.random.Generator, name: str) -> None:
    """All that is read of a store."""

    def everything() -> None:
        reader = store.Reader(path)
        reader.rows(0, reader.n_rows), reader.index(0, reader.n_rows), reader.hooks, reader.sites
        for row in range(0, reader.n_rows, 97):
            reader.trace(row)

    answers(everything)
    answers(lambda: store.describe(path))
    answers(lambda: store.verify(path))


counts: collections.Counter = collections.Counter()


def answers(read) -> None:
    """Fails on any exception but the documented one, and on a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", ResourceWarning)  # as elsewhere: of event loops that Orbax drops
        try:
            read()
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 4000
            counts["refused"] += 1
        else:
            counts["read"] += 1


@pytest.mark.timeout(7200)
@pytest.mark.parametrize(("seed", "count"), PARTS)
def test_damaged_manifests_end_in_what_they_say_or_in_one_line(seed, count, folder, capsys):
    run_dir, short = folder / "sweep" / "0", folder / "short" / "0"
    places = [(run_dir / "config.yaml", read_run, run_dir)]
    names = ("config.yaml", "run.json", "eval.json", "metrics.jsonl")
    places += [(short / name, read_run, short) for name in names]
    for name in ("store", "growing"):
        places += [(folder / name / file, read_store, folder / name) for file in ("manifest.json", "shard-00000.json")]
    record = [file for file in sorted((run_dir / "checkpoints" / "6" / "record").rglob("*")) if file.is_file()]
    counts.clear()
    for number in range(count):
        rng = np.random.default_rng((seed, number))
        file, read, what = places[number % len(places)]
        if number % 100 == 99:  # arrays take longest
            file, read, what = record[rng.integers(len(record))], read_checkpoint, run_dir
        whole = file.read_bytes()
        change = {".jsonl": damaged_lines, **STRUCTURED}.get(file.suffix, damaged_bytes)
        damaged = (change if rng.random() < 0.7 else damaged_bytes)(whole, rng)
        file.write_bytes(damaged)
        try:
            with nothing_opened_outside(folder):
                read(what, rng, file.name)
        except Exception as error:
            raise AssertionError(f"case {seed}-{number}, {file.name}: {damaged[:2000]!r}") from error
        finally:
            file.write_bytes(whole)
        counts["arrays of a checkpoint" if file in record else file.name] += 1
    with capsys.disabled():
        if count > 1000:
            print(f"\n{count} damaged files: {dict(counts)}")
    assert counts["read"] > count / 10 and counts["refused"] > count / 10


@pytest.mark.parametrize("value", VALUES, ids=lambda value: str(value)[:20])
def test_one_line_of_anything(value):
    assert json_yaml.one_line(value).isprintable() and len(json_yaml.one_line(value)) < 1100
