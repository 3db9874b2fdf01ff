"""What is logged is read back; a resumed run is one curve; W&B works offline without a login."""

import errno
import io
import json
import os
import subprocess
import sys

import pytest

from saejax.storage import tracking


def test_lines_are_read_back_and_json_stays_json(tmp_path):
    tracker = tracking.Tracker(tmp_path, tracking.TrackerConfig(), {})
    tracker.log(1, {"train/loss": 0.5})
    tracker.log(2, {"train/loss": float("nan")})
    tracker.close()
    assert tracking.read(tmp_path) == [{"step": 1, "train/loss": 0.5}, {"step": 2, "train/loss": None}]


def test_resume_drops_what_will_be_written_again_and_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": n}) + "\n" for n in range(1, 8)) + '{"step": 8, "tr')
    tracking.Tracker(tmp_path, tracking.TrackerConfig(), {}, start_step=5).close()
    assert [line["step"] for line in tracking.read(tmp_path)] == [1, 2, 3, 4, 5]
    tracking.Tracker(tmp_path, tracking.TrackerConfig(), {}).close()
    assert path.read_text() == ""


def test_other_processes_log_nothing(tmp_path):
    tracker = tracking.Tracker(tmp_path, tracking.TrackerConfig(wandb=True), {}, enabled=False)
    tracker.log(1, {"train/loss": 0.5})
    tracker.close()
    assert not list(tmp_path.iterdir())


def test_wandb_offline_needs_no_login(tmp_path):
    pytest.importorskip("wandb")
    code = (
        "import sys; from pathlib import Path; from saejax.storage import tracking as t\n"
        "c = t.TrackerConfig(wandb=True, mode=t.WandbMode.offline)\n"
        "x = t.Tracker(Path(sys.argv[1]), c, {'seed': 0}); x.log(1, {'train/loss': 0.5}); x.close()"
    )
    env = {k: v for k, v in os.environ.items() if k != "WANDB_API_KEY"} | {"WANDB_SILENT": "true"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb")), done.stderr
    assert (tmp_path / "wandb_id").read_text()
    assert tracking.read(tmp_path) == [{"step": 1, "train/loss": 0.5}]


class FullDisk(io.FileIO):
    """Takes `room` bytes, then says that there is no more."""

    room = 50

    def write(self, data):
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = super().write(bytes(data)[: self.room])
        self.room -= taken
        return taken


def test_a_full_disk_stops_nothing_and_costs_no_line(tmp_path, caplog):
    tracker = tracking.Tracker(tmp_path, tracking.TrackerConfig(), {})
    tracker._file.close()
    tracker._file = disk = FullDisk(tmp_path / "metrics.jsonl", "ab")
    path = tmp_path / "metrics.jsonl"
    for step in range(1, 6):
        tracker.log(step, {"train/loss": 0.5})
        assert path.read_text().count("\n") == len(tracking.read(tmp_path)) == min(step, 1)  # never half a line
    assert caplog.text.count("METRICS NOT WRITTEN") == 1
    disk.room = 10_000
    tracker.log(6, {})
    assert [line["step"] for line in tracking.read(tmp_path)] == [1, 2, 3, 4, 5, 6]
    disk.room = 0
    tracker.log(7, {})
    tracker.close()
    assert "lacks its last 1 lines" in caplog.text


def test_a_failing_dashboard_is_left_behind(tmp_path, caplog):
    class Dashboard:
        calls = 0

        def log(self, values, step):
            self.calls += 1
            raise ConnectionError("the network\nis gone")

        finish = None  # not called any more

    tracker = tracking.Tracker(tmp_path, tracking.TrackerConfig(), {})
    tracker._wandb = dashboard = Dashboard()
    for step in (1, 2):
        tracker.log(step, {"train/loss": 0.5})
    tracker.close()
    assert dashboard.calls == 1 and "W&B failed (the network); continuing" in caplog.text
    assert len(tracking.read(tmp_path)) == 2
