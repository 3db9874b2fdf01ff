"""Experiments on known features: closed forms against simulation; each program tiny, or with a planted dictionary."""

import numpy as np
import pytest

from saejax.lab.experiments import fit, soft_threshold
from saejax.lab.experiments.stability import Seeds
from saejax.lab.experiments.synth_dead import DeadLatents
from saejax.lab.experiments.synth_recovery import SbIid, Width
from saejax.lab.experiments.synth_shrinkage import KneeAndShrinkage
from saejax.sae import base, model


@pytest.mark.parametrize("name", soft_threshold.QUANTILES)
def test_closed_forms_against_simulation(name):
    t, p = 0.3, 0.2
    codes = soft_threshold.rows(name, np.eye(4, dtype=np.float32), 500_000, p, 0)[1].ravel()
    assert codes[codes > 0].size / codes.size == pytest.approx(p, abs=0.003)
    kept = np.maximum(codes - t, 0)
    assert (kept**2).sum() / (codes * kept).sum() == pytest.approx(soft_threshold.oracle_bias(name, t), abs=0.003)
    # The penalised loss has its least value where the formula for the decoder bias says, each code at its own optimum.
    betas = soft_threshold.decoder_bias(name, t, p) + np.array([-0.02, 0.0, 0.02])
    best = np.maximum(codes - betas[:, None] - t, 0)
    losses = ((codes - best - betas[:, None]) ** 2 + 2 * t * best).mean(axis=1)
    assert losses.argmin() == 1
    recon = best[1] + betas[1]
    gamma = (recon**2).sum() / (codes * recon).sum()
    assert gamma == pytest.approx(soft_threshold.trained_bias(name, t, p), abs=0.004)


def test_reference_values_of_the_half_normal():
    found = [soft_threshold.oracle_bias("half-normal", t) for t in (0.05, 0.1, 0.2, 0.4)]
    assert found == pytest.approx([0.96100, 0.92374, 0.85412, 0.73250], abs=2e-5)


def test_identical_init_is_flagged_and_seeds_are_not():
    outcome = Seeds(n_seeds=2, n_tokens=153_600).run()
    free, trap = outcome.values["independent"], outcome.values["identical_init"]
    assert trap["flagged"] and trap["pw_mcc_initial"] == pytest.approx(1) and trap["pw_mcc_final"] > 0.7
    assert not free["flagged"] and free["stabilisation"] > 0.1
    assert abs(free["pw_mcc_initial"] - free["pw_mcc_chance"]) < 0.02
    wanted = {check.quantity: check.verdict for check in outcome.checks}
    assert wanted["flags raised: identical init, seeds"] == "pass"


def test_oracle_bias_through_the_solver_and_the_metric():
    found = KneeAndShrinkage(thresholds=(0.2, 0.4), eval_rows=8192)._oracle("U[0, 1]")
    assert found["gamma"] == pytest.approx([2 * 0.8 / 2.2, 2 * 0.6 / 2.4], abs=0.004)


def test_the_sweep_is_judged():
    experiment = KneeAndShrinkage(l1_coefs=(0.1, 0.2, 0.4, 0.8, 1.6))
    gammas, stable = [[0.9, 0.87, 0.82, 0.68, 0.44]] * 2, {"knee_x": 1.0, "knee_x_low": 1.0, "knee_x_high": 1.0}
    good = {"relative_reconstruction_bias": gammas, "knee": stable | {"knee_index": 3}, "knee_index_per_seed": [3, 3]}
    wrong = {"relative_reconstruction_bias": [gammas[0][::-1]] * 2, "knee_index_per_seed": [0, 3]}
    wrong["knee"] = good["knee"] | {"knee_x_low": -2.0}
    assert [check.verdict for check in experiment._sweep_checks(good)] == ["pass"] * 3
    assert [check.verdict for check in experiment._sweep_checks(wrong)] == ["FAIL"] * 3


def planted(n_dead=0):
    """Stands for training: the true features, then random directions; the last `n_dead` latents never fire."""

    def fit_instead(sparsifier, source, **_):
        extra = np.random.default_rng(7).standard_normal((sparsifier.d_sae, sparsifier.d_in))
        extra /= np.linalg.norm(extra, axis=1, keepdims=True)
        W = np.concatenate([source.features(), extra])[: sparsifier.d_sae].astype(np.float32)
        b_enc = np.where(np.arange(len(W)) < len(W) - n_dead, 0, -100).astype(np.float32)
        parts = {"W_enc": W.T, "b_enc": b_enc, "W_dec": W, "b_dec": np.zeros(64, np.float32)}
        sae = model.SAE(sparsifier, base.SAEParams(**parts, extra=sparsifier.extra()))
        history = {"step": np.arange(2), "dead_share": np.zeros(2)}
        return fit.Fit(sae=sae, start=sae, history=history)

    return fit_instead


def test_width_counts_what_is_found_and_what_is_left_over(monkeypatch):
    monkeypatch.setattr(fit, "train", lambda *args, **kwargs: planted()(*args, **kwargs).sae)
    outcome = Width(ratios=(0.5, 2.0), eval_rows=1024).run()
    half, double = outcome.values["widths"].values()
    assert (half["recovered_features"], half["mcc_features"]) == (0.5, pytest.approx(0.5, abs=1e-5))
    assert (half["unmatched_share"], double["unmatched_share"]) == (0.0, 0.5)
    assert {c.quantity: c.verdict for c in outcome.checks}["latents without a feature, N_sae = 2 N"] == "pass"


def test_dead_latents_are_counted_in_every_arm(monkeypatch):
    monkeypatch.setattr(fit, "fit", planted(n_dead=26))
    outcome = DeadLatents(alphas=(0.0,), eval_rows=4096).run()
    assert outcome.values["arms"]["TopK, no revival"]["dead_share"] == 26 / 256
    verdicts = {check.quantity: check.verdict for check in outcome.checks}
    assert verdicts["dead latents, TopK, no revival"] == "pass"
    assert verdicts["dead latents, TopK + resampling"] == verdicts["dead latents, BatchTopK, no revival"] == "FAIL"


def test_dead_latents_fail_where_revival_does_nothing():
    names = ("TopK, no revival", "TopK + AuxK 1", "TopK + resampling", "BatchTopK, no revival")
    assert [DeadLatents()._check(name, 0.05).verdict for name in names] == ["FAIL"] * 4
    assert DeadLatents()._check("TopK + resampling", 0.03).verdict == "pass"


def test_recovery_holds_each_arm_to_its_own_number():
    judged = {name: SbIid()._check(name, 0.98).verdict for name in ("TopK + AuxK 1/32", "L1", "dictionary learning")}
    assert judged == {"TopK + AuxK 1/32": "FAIL", "L1": "pass", "dictionary learning": "FAIL"}
