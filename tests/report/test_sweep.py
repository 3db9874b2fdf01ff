"""The page of a sweep: every run is listed, differing settings are columns, the front is the front."""

import numpy as np
import pytest
from conftest import write_run
from test_page import Page

from saejax import report
from saejax.errors import UserError
from saejax.report import records, sweep


def test_pareto_front_equals_brute_force():
    rng = np.random.default_rng(0)
    for _ in range(200):
        points = [tuple(p) for p in rng.integers(0, 6, size=(rng.integers(1, 9), 2)).tolist()]
        front = {
            i for i, (x, y) in enumerate(points) if not any(a <= x and b <= y and (a < x or b < y) for a, b in points)
        }
        assert sweep.pareto(points) == front


def make(root):
    for n, (k, seed, fvu) in enumerate([(16, 0, 0.3), (32, 0, 0.2), (64, 0, 0.25), (16, 1, 0.31)]):
        write_run(root / str(n), k=k, seed=seed, fvu=fvu, l0=float(k))
    write_run(root / "4", k=32, seed=1, l0=32.0, evaluated=False)
    write_run(root / "10", k=64, seed=1, evaluated=False, rows=0)
    (root / "5" / ".hydra").mkdir(parents=True)
    (root / "multirun.yaml").write_text("hydra: {}\n")
    return root


def test_every_run_is_listed_with_its_fate(tmp_path):
    root = make(tmp_path / "sweep")
    report.build(root / "0")
    text = report.build_sweep(root).read_text(encoding="utf-8")
    page = Page(text)
    shown = " ".join(" ".join(page.texts).split())
    assert "7 runs, 2 failed or without results" in shown
    table = shown.split("Runs", 1)[1]
    for row in (
        "0 evaluated ◦ front 16 0 0.3",
        "2 evaluated 64 0 0.25",
        "4 unfinished 32 1 0.215",
        "5 failed",
        "10 failed 64 1 –",
    ):
        assert row in table, table
    assert page.links == ["data:,", "0/report.html"]
    assert "sae.k" in shown and "seed" in shown and "optim.lr" not in shown and "sae.d_sae" not in shown
    assert "http" not in text


def test_the_knee_of_every_curve_is_named(tmp_path):
    # On log l0 the chord of the first curve passes 0.5 at l0 = 4; its run lies farthest below. The second is a line.
    for n, (l0, fvu) in enumerate([(1, 0.9), (4, 0.2), (16, 0.1)]):
        write_run(tmp_path / f"bent{n}", k=l0, l0=float(l0), fvu=fvu, lr=0.1)
        write_run(tmp_path / f"line{n}", k=l0, l0=float(l0), fvu=0.9 - 0.4 * n, lr=0.2)
    found = sweep.read_sweep(tmp_path)
    assert [(k.label, found.runs[k.run].path.name, k.l0) for k in found.knees] == [("optim.lr=0.1", "bent1", 4.0)]
    lines = sweep.text(found).splitlines()
    assert lines[0].split() == ["run", "status", "sae.k", "optim.lr", "l0", "fvu"]
    assert lines[2].split() == ["bent1", "evaluated", "4", "0.1", "4", "0.2", "front,", "knee"]
    assert lines[-1].startswith("knee of optim.lr=0.1: run bent1, l0 4")
    shown = " ".join(" ".join(Page(sweep.build_sweep(found).read_text(encoding="utf-8")).texts).split())
    assert "bent1 evaluated ◦ front ◆ knee" in shown and shown.count("◆ knee") == 1
    assert "Knee of optim.lr=0.1 : run bent1 , l0 4" in shown.replace(":", " :").replace(",", " ,").replace("  ", " ")


def test_runs_come_in_natural_order(tmp_path):
    assert [p.name for p in sweep.find(make(tmp_path))] == ["0", "1", "2", "3", "4", "5", "10"]


def test_runs_behind_links_are_listed_once(tmp_path):
    root = make(tmp_path / "all/sweep")
    write_run(tmp_path / "all/elsewhere/deep/11", k=16)
    for name, target in {
        "linked": "../elsewhere", "again": "../elsewhere/deep", "0b": "0", "loop": ".", "up": "..", "top": "../..",
        "itself": "itself", "gone": "nowhere", ".hidden": "../elsewhere",
    }.items():  # fmt: skip
        (root / name).symlink_to(target)
    found = [str(path.relative_to(root)) for path in sweep.find(root)]
    assert found == ["0", "1", "2", "3", "4", "5", "10", "again/11"]


def test_runs_that_differ_in_sparsity_and_seed_share_a_colour(tmp_path):
    for n, (k, lr) in enumerate([(16, 0.1), (32, 0.1), (16, 0.2)]):
        write_run(tmp_path / str(n), k=k, lr=lr, seed=n)
    runs = [records.read(p) for p in sweep.find(tmp_path)]
    groups = sweep._groups(runs, sweep.differing([records.flatten(r.config) for r in runs]))
    assert groups.of_run == [0, 0, 1] and groups.labels == ["optim.lr=0.1", "optim.lr=0.2"]


def test_a_sweep_in_which_all_failed_is_still_a_page(tmp_path):
    write_run(tmp_path / "0", evaluated=False, rows=0)
    Page(report.build_sweep(tmp_path).read_text())


def test_a_directory_without_runs_is_refused(tmp_path):
    with pytest.raises(UserError, match="no run directory"):
        report.build_sweep(tmp_path)
    with pytest.raises(UserError, match="no such directory"):
        report.build_sweep(tmp_path / "nowhere")
