"""No tracker stops a run: W&B that cannot be reached, breaks in the middle or never ends; metrics.jsonl is whole."""

import json
import sys
import threading
import time
import types

import pytest

from saejax import config
from saejax.errors import UserError
from saejax.runs import run
from saejax.storage import tracking

STEPS = 12
QUICK = [
    f"train.n_tokens={STEPS * 128}", "train.batch=128", "buffer.rows=512", "train.eval_rows=128", "mesh=single",
    "sae.d_sae=32", "train.log_every_steps=1", "tracker=wandb",
]  # fmt: skip


class Wandb(types.ModuleType):
    """A tracker that fails at one place: `init`, the third `log`, every `finish`, or a `finish` that never ends."""

    def __init__(self, fails: str) -> None:
        super().__init__("wandb")
        self.fails, self.logged, self.id, self.given = fails, 0, "abc", {}

    def Settings(self, **given):  # noqa: N802
        self.given = given

    def init(self, **given):
        if self.fails == "init":
            raise ConnectionError("api.example: unreachable\nand a page of advice")
        return self

    def log(self, values, step):
        self.logged += 1
        if self.fails == "log" and self.logged == 3:
            raise RuntimeError("")

    def finish(self):
        if self.fails == "finish":
            raise BrokenPipeError("the service is gone")
        if self.fails == "hang":
            threading.Event().wait(600)


@pytest.mark.parametrize(
    ("fails", "logged", "said"),
    [
        ("init", 0, "W&B could not start (api.example: unreachable); continuing with metrics.jsonl"),
        ("log", 3, "W&B failed (RuntimeError('')); continuing with metrics.jsonl"),
        ("finish", STEPS + 1, "W&B failed (the service is gone); continuing with metrics.jsonl"),
        ("hang", STEPS + 1, "W&B failed (not finished after 0.2 s); continuing with metrics.jsonl"),
    ],
)
def test_a_real_run_ends_well_with_a_broken_tracker(fails, logged, said, tmp_path, monkeypatch, caplog):
    wandb = Wandb(fails)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(tracking, "FINISH_SECONDS", -9.8)
    started = time.monotonic()
    outcome = run.train(config.load("train", config.Config, QUICK), tmp_path)
    assert outcome.step == STEPS and json.loads((tmp_path / "run.json").read_text())["finished"]
    assert wandb.logged == logged and wandb.given["init_timeout"] == 20
    assert [record.getMessage() for record in caplog.records].count(said) == 1
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(1, STEPS + 1))
    assert time.monotonic() - started < 200


def test_wandb_that_is_not_installed_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"tracker.wandb=true needs wandb: pip install 'saejax\[wandb\]'"):
        tracking.Tracker(tmp_path, tracking.TrackerConfig(wandb=True), {})
