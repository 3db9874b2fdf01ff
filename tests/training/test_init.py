"""Where a run starts: calibrated encoder biases, and the advice about data that are not centred."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_runs as runs

from saejax.activations.normalize import NormalizeConfig
from saejax.errors import UserError
from saejax.training import diagnose, start

ROWS = np.random.default_rng(0).normal(size=(4000, 64)).astype(np.float32) + 0.5


@pytest.mark.parametrize(
    "architecture, override",
    [("l1", "seed=0"), ("jumprelu", "seed=0"), ("gated", "seed=0"), ("l1", "sae.encoder=mlp")],
)
def test_every_latent_fires_at_the_rate_asked_for(architecture, override):
    sae = runs.compose(architecture, 4, "sae.d_sae=96", override).sae
    params = sae.init(jax.random.key(0)).replace(b_dec=jnp.full(64, 0.3))
    b_enc = start.encoder_bias(sae, params, jnp.asarray(ROWS), 0.05)
    latents = sae.encode(params.replace(b_enc=b_enc), jnp.asarray(ROWS)).dense()
    # Half-way between two rows, so the count is met but for rounding of rows at the edge.
    np.testing.assert_allclose((np.asarray(latents) > 0).mean(0), 0.05, atol=1.1 / len(ROWS))


def test_a_run_starts_calibrated(tmp_path):
    given = ("train.b_enc_init=firing_rate", "train.firing_rate=0.02", "sae.aux_alpha=0", "optim.lr=1e-9")
    assert np.ptp(runs.train(tmp_path, runs.compose("l1", 2, *given)).state.params.b_enc) > 0
    # 128 latents at 0.02; rows vary, and so does the estimate from 1024 rows of them.
    assert runs.logged(tmp_path, "train/l0")[0] == pytest.approx(128 * 0.02, rel=0.25)


@pytest.mark.parametrize("architecture", ["matching_pursuit", "abs_topk"])
def test_a_calibration_without_meaning_is_refused(architecture):
    with pytest.raises(UserError, match=f"train.b_enc_init must be zero for sae={architecture}"):
        runs.compose(architecture, 4, "train.b_enc_init=firing_rate")


def test_the_default_rate_is_ten_thousand_over_the_width():
    settings = runs.compose("l1", 4, "train.b_enc_init=firing_rate").train
    assert settings.rate(100_000) == 0.1 and settings.rate(128) == 0.5
    with pytest.raises(UserError, match="train.firing_rate needs train.b_enc_init=firing_rate"):
        runs.compose("l1", 4, "train.firing_rate=0.1")


def test_data_far_from_zero_are_advised_to_be_centred(caplog):
    rows = np.random.default_rng(0).normal(size=(2000, 4)).astype(np.float32)
    rows[:, 0] += 8  # mean 8, spread sqrt(4)
    with caplog.at_level(logging.INFO):
        assert diagnose.report(jnp.asarray(rows), NormalizeConfig()) == pytest.approx(4, rel=0.05)
        assert "normalize.center=true" in caplog.records[-1].message and caplog.records[-1].levelname == "WARNING"
        diagnose.report(jnp.asarray(rows), NormalizeConfig(center=True))
        diagnose.report(jnp.asarray(rows - rows.mean(0)), NormalizeConfig())
    assert [record.levelname for record in caplog.records[1:]] == ["INFO", "INFO"]
