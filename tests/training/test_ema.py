"""The average of the parameters: its formula, its constraint, and that everybody outside training gets it."""

import numpy as np
import pytest
import small_runs as runs
import small_steps

from saejax import config
from saejax.errors import UserError
from saejax.runs import run


def test_the_average_is_the_running_one_constrained():
    steps = small_steps.Steps("batch_topk", "sae.d_sae=32", "sae.aux_alpha=0", "train.ema_decay=0.3")
    now, mean = steps.born, np.asarray(steps.born.params.W_enc, np.float64)
    for step in range(8):
        now, _ = steps.run(now, [steps.record()])
        decay = min(0.3, (1 + step) / (10 + step))  # reaches 0.3 at step 3
        mean = decay * mean + (1 - decay) * np.asarray(now.params.W_enc)
        np.testing.assert_allclose(now.average.W_enc, mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(now.average.W_dec, axis=1), 1, atol=1e-6)
    # A running statistic is not averaged once more.
    assert float(now.average.extra["threshold"]) == float(now.params.extra["threshold"]) > 0


@pytest.mark.parametrize(
    "chosen", ["train.ema_decay=0.5", pytest.param("optim.name=schedule_free", marks=pytest.mark.nightly)]
)
def test_the_average_is_evaluated_and_loaded_and_survives_a_resume(chosen, tmp_path):
    small = ("sae.aux_alpha=0", "sae.d_sae=32", "checkpoint.save_every_steps=4", "checkpoint.keep_last=5")
    cfg = runs.compose("l1", 8, *small, "optim.lr=0.02", chosen)
    outcome = runs.train(tmp_path, cfg)
    state = outcome.state
    sae = run.load(tmp_path)
    scale = float(state.normalizer.scale)
    np.testing.assert_array_equal(sae.params.W_enc, state.average.W_enc)
    np.testing.assert_allclose(sae.params.b_enc, np.asarray(state.average.b_enc) / scale, rtol=1e-5, atol=1e-7)
    assert np.abs(np.asarray(state.average.W_enc) - np.asarray(state.params.W_enc)).max() > 1e-3
    # What training logged of held-out rows is what the loaded SAE does on them.
    rows = np.concatenate(list(cfg.source.heldout(512, 512)))
    residual = rows - np.asarray(sae(rows))
    fvu = np.sum(residual**2) / np.sum((rows - rows.mean(0)) ** 2)
    np.testing.assert_allclose(outcome.evaluation["fvu"], fvu, rtol=1e-4)

    with pytest.raises(UserError, match="optim.name cannot change on resume"):
        run.train(config.from_run(tmp_path, ["optim.name=muon"]), tmp_path, resume=True)
    before = runs.saved(tmp_path, 8), state.average
    (tmp_path / "checkpoints" / "8").rename(tmp_path / "later")
    again = runs.train(tmp_path, config.from_run(tmp_path), resume=True)
    np.testing.assert_array_equal(again.state.average.W_dec, before[1].W_dec)
    for path, value in runs.saved(tmp_path, 8).items():
        np.testing.assert_array_equal(value, before[0][path], err_msg=path)
