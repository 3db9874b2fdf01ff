"""A run beside its language model: trained, stopped, resumed; nothing but its own files on disk."""

import dataclasses

import numpy as np
import pytest
from small_runs import compose, logged, saved, train

from saejax.runs import run


def settings(small_model) -> list[str]:
    return [
        "source=language_model", f"source.model={small_model}", "source.corpus=pydoc", "source.n_tokens=8192",
        "source.heldout_tokens=2048", "source.context_length=64", "source.hook=blocks.1.hook_resid_post",
        "mesh=single", "train.eval_every_steps=null", "checkpoint.save_every_steps=null",
    ]  # fmt: skip


@pytest.mark.nightly
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(small_model, tmp_path):
    cfg = compose("topk", 24, *settings(small_model))
    half = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, n_tokens=12 * 128))
    schedule = {"lr": 1e-3, "warmup_share": 0.0, "decay_share": 0.0}  # the same at any length of the run
    half, cfg = (dataclasses.replace(c, optim=dataclasses.replace(c.optim, **schedule)) for c in (half, cfg))
    train(tmp_path / "flat", cfg)
    train(tmp_path / "parts", half)
    train(tmp_path / "parts", cfg, resume=True)
    expected, found = saved(tmp_path / "flat"), saved(tmp_path / "parts")
    assert expected.keys() == found.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    assert logged(tmp_path / "parts", "train/loss") == logged(tmp_path / "flat", "train/loss")
    loss = logged(tmp_path / "flat", "train/fvu")
    assert loss[-1] < loss[0]
    assert run.load(tmp_path / "flat").provenance["source"]["type"] == "language_model"
    assert not list(tmp_path.rglob("*.rows"))
