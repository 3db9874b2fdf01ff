"""The meter of a run, and the profile that it starts and stops."""

import gzip
import json

import pytest
from small_runs import compose, logged, train

from saejax.training import flops, progress


class Profiler:
    """Stands for jax.profiler and notes at which step it was called."""

    def __init__(self, monkeypatch):
        self.steps, self.calls = 0, []
        monkeypatch.setattr("jax.profiler.start_trace", lambda folder: self.calls.append(("start", self.steps)))
        monkeypatch.setattr("jax.profiler.stop_trace", lambda: self.calls.append(("stop", self.steps)))


@pytest.mark.parametrize(
    ("n_steps", "taken", "calls"),
    [
        (100, 100, [("start", 10), ("stop", 21)]),
        (15, 15, [("start", 4), ("stop", 15)]),
        (5, 5, [("start", 1), ("stop", 5)]),
        (100, 13, [("start", 10), ("stop", 13)]),
        (100, 4, []),
    ],
)
def test_ten_steps_are_recorded_or_what_a_stopped_run_took(tmp_path, monkeypatch, n_steps, taken, calls):
    profiler = Profiler(monkeypatch)
    meter = progress.Progress(0, n_steps, 8, show=False, profile=tmp_path / "profile")
    try:
        for profiler.steps in range(1, taken + 1):
            meter.step(0.0)
        if taken < n_steps:
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    finally:
        meter.close()
    assert profiler.calls == calls


def test_nothing_is_recorded_unasked(monkeypatch):
    profiler = Profiler(monkeypatch)
    meter = progress.Progress(0, 100, 8, show=False)
    for _ in range(50):
        meter.step(0.0)
    meter.close()
    assert profiler.calls == []


def test_a_lap_says_speed_wait_utilisation_and_memory(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    meter = progress.Progress(0, 100, 8, show=False, work=flops.Work(per_step=1e6, peak=1e7))
    for _ in range(10):
        now[0] += 0.5
        meter.step(0.125)
    now[0] += 2.0
    meter.pause(2.0)
    lap = meter.lap()
    assert lap.pop("peak_memory_bytes") > 1e6
    expected = {"tokens_per_second": 16.0, "data_wait_share": 0.25, "model_flops_per_second": 2e6, "mfu": 0.2}
    assert lap == expected
    assert meter.total() == {"steps": 10, "seconds": 5.0} | expected
    meter.close()


@pytest.mark.nightly
def test_a_run_leaves_a_profile_and_says_its_utilisation(tmp_path):
    run_dir = tmp_path / "run"
    train(run_dir, compose("topk", 30, "mesh=single", "train.profile=true", "train.measure_peak=true"))
    (found,) = (run_dir / "profile").rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(found.read_bytes()))["traceEvents"]
    assert len(events) > 100
    assert all(0 < value < 1.5 for value in logged(run_dir, "train/mfu")[5:-1])
    record = json.loads((run_dir / "run.json").read_text())
    assert record["mfu"] > 0 and record["model_flops_per_second"] > 0 and record["peak_memory_bytes"] > 0
