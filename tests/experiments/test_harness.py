"""Checks, tables, and training in process against what it stands for."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from saejax.activations import normalize
from saejax.activations.synthetic import Synthetic
from saejax.errors import UserError
from saejax.evals import recovery
from saejax.lab.experiments import fit, harness, synth_shrinkage
from saejax.sae import L1, TopK

SMALL = Synthetic(d_in=16, n_features=24, firing_rate=0.06)


@pytest.mark.parametrize(
    ("measured", "low", "high", "verdict"),
    [
        (0.5, 0.5, math.inf, "pass"),
        (0.4, 0.5, math.inf, "FAIL"),
        (0.4, 0.1, 0.3, "FAIL"),
        (math.nan, 0.5, math.inf, "FAIL"),
        (math.nan, -math.inf, 1.0, "FAIL"),
        (math.inf, 0.5, math.inf, "FAIL"),
        (3.0, -math.inf, math.inf, "-"),
        (None, 0.5, math.inf, "not built"),
    ],
)
def test_verdict(measured, low, high, verdict):
    check = harness.Check(quantity="q", measured=measured, low=low, high=high, source="s")
    assert check.verdict == verdict and check.passed == (verdict != "FAIL")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (dict(n_tokens=0), "n_tokens = 0"),
        (dict(seed=-1), "seed must be at least 0, got -1"),
        (dict(thresholds=[]), "thresholds = "),
        (dict(thresholds=[0.1, math.nan]), "thresholds must be a finite number, got nan"),
        (dict(thresholds=[2.0]), "thresholds = "),
        (dict(firing_rate=1.5), "firing_rate = 1.5"),
        (dict(trained=["Exp(2) 0.1"]), "trained = 'Exp"),
        (dict(l1_coefs=[0.1]), "l1_coefs = "),
        (dict(n_seeds=1), "n_seeds = 1"),
    ],
)
def test_settings_that_cannot_be_run_are_named_at_once(change, named):
    with pytest.raises(UserError, match=named):
        synth_shrinkage.KneeAndShrinkage(**change)


def test_table_has_aligned_columns():
    rows = [("a/b", harness.near("gamma", 0.9, 0.91, 0.004, "closed form")),
            ("longer/name", harness.Check(quantity="x", measured=2.0, high=1.0, source="s"))]  # fmt: skip
    header, _, first, second = harness.table(rows).splitlines()
    assert first.index("0.91 +- 0.004") == second.index("<= 1") == header.index("expected")
    assert first.index("FAIL") == second.index("FAIL") == header.index("verdict")


class TestFit:
    def test_learns_known_features_and_keeps_its_start(self):
        done = fit.fit(
            TopK(d_in=16, d_sae=24, k=2, aux_alpha=1.0),
            SMALL,
            n_tokens=80_000,
            batch=128,
            lr=5e-3,
            dead_after_tokens=2560,
        )
        truth = SMALL.features()
        after = recovery.dictionary_recovery(np.asarray(done.sae.params.W_dec), truth)
        before = recovery.dictionary_recovery(np.asarray(done.start.params.W_dec), truth)
        assert after["mcc"] > 0.9 and abs(before["mcc"] - before["mcc_chance"]) < 0.06
        assert done.history["fvu"][-1] < done.history["fvu"][0] / 2
        assert done.history["step"][-1] == 80_000 // 128

    def test_seeds_of_parameters_and_data_are_two(self):
        def rows(**seeds):
            done = fit.fit(TopK(d_in=16, d_sae=24, k=2), SMALL, n_tokens=1280, batch=128, **seeds)
            return np.asarray(done.start.params.W_dec), np.asarray(done.sae.params.W_dec)

        start, end = rows(seed=1)
        again_start, again_end = rows(seed=1)
        same_start, other_end = rows(seed=1, data_seed=2)
        np.testing.assert_array_equal(end, again_end)
        np.testing.assert_array_equal(start, again_start)
        np.testing.assert_array_equal(start, same_start)
        assert np.abs(end - other_end).max() > 1e-4

    def test_first_step_is_that_of_adam_on_the_whole_array(self):
        rows = np.random.default_rng(0).standard_normal((64, 16)).astype(np.float32)
        sparsifier = L1(d_in=16, d_sae=24, l1_coef=0.1)
        done = fit.fit(sparsifier, rows, n_tokens=64, batch=64, lr=0.01, decay_share=0.0, clip_norm=None)
        moved = np.asarray(done.sae.params.W_dec - done.start.params.W_dec)
        np.testing.assert_allclose(np.abs(moved), 0.01, rtol=1e-3)  # Adam's first step is lr times the sign

    def test_normalisation_is_folded_back(self):
        rows = 100 * np.random.default_rng(0).standard_normal((4096, 16)).astype(np.float32) + 300
        done = fit.fit(TopK(d_in=16, d_sae=64, k=8), rows, n_tokens=40_000, batch=256, norm=normalize.NormMode.auto)
        fvu = float(jnp.sum((done.sae(rows) - rows) ** 2)) / float(np.sum((rows - rows.mean(0)) ** 2))
        assert fvu < 0.6

    @pytest.mark.parametrize(
        ("rows", "told"),
        [
            (np.zeros((8, 16), np.float32), "batch=128"),
            (np.zeros((256, 3), np.float32), "d_in=16"),
            (np.zeros((2, 128, 16), np.float32), r"\[2, 128, 16\]"),
            (np.full((256, 16), np.nan, np.float32), "finite"),
            (Synthetic(d_in=8), "width of the source, 8"),
        ],
    )
    def test_refuses(self, rows, told):
        with pytest.raises(UserError, match=told):
            fit.train(TopK(d_in=16, d_sae=24, k=2), rows, n_tokens=1024, batch=128)
