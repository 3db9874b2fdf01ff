"""Absorption: SAEBench's hand cases, and counting on known families."""

import numpy as np
import pytest

from saejax.errors import UserError
from saejax.lab.metrics import absorption
from saejax.lab.metrics.over import over

# One probe along the first axis; latent 0 is the main one; latents 1 to 4 point along the probe, 5 across it.
W_DEC = np.array([[1, 0], [1, 0], [1, 0], [1, 0], [1, 0], [0, 1]], np.float32)
MAIN = np.arange(6) < 1

CASES = {
    "full": ([0, 1, 0, 0, 0, 0], 1.0, True),
    "partial": ([1 / 3, 2 / 3, 0, 0, 0, 0], 2 / 3, False),
    "none": ([1, 0, 0, 0, 0, 0], 0.0, False),
    "below the proportion": ([0.2, 0.3, 0, 0, 0, 0], 0.0, False),
    "more than is missing counts only what is missing": ([0.5, 0.9, 0, 0, 0, 0], 0.5, False),
    "at most three absorbers": ([0.1, 0.15, 0.15, 0.15, 0.4, 0], 0.7 / 0.8, False),
    "across the probe": ([0, 0, 0, 0, 0, 5], 0.0, False),
    "many small ones": ([0, 0.3, 0.3, 0.3, 0, 0], 1.0, False),
}


@pytest.mark.parametrize("latents, fraction, full", CASES.values(), ids=CASES.keys())
def test_hand_cases(latents, fraction, full):
    x = np.array([[1, 7]], np.float32)
    found = absorption.absorbed(x, np.array([latents], np.float32), W_DEC, np.array([2.0, 0.0]), MAIN)
    assert float(found[0][0]) == pytest.approx(fraction, abs=1e-6) and bool(found[1][0]) == full


def test_a_concept_that_is_not_there_is_not_absorbed():
    for along in (0.0, -1.0):
        found = absorption.absorbed(
            np.array([[along, 1]], np.float32), np.ones((1, 6), np.float32), W_DEC, np.array([1.0, 0.0]), ~MAIN & MAIN
        )
        assert float(found[0][0]) == 0.0 and not found[1][0]


def test_cosines_decide_who_can_absorb():
    """A latent at cosine 0.05 carries the projection: too far for the fraction, near enough to be full absorption."""
    W_dec = np.array([[1, 0], [0.05, (1 - 0.05**2) ** 0.5]], np.float32)
    found = absorption.absorbed(
        np.array([[1, 0]], np.float32),
        np.array([[0, 10]], np.float32),
        W_dec,
        np.array([1.0, 0.0]),
        np.array([True, False]),
    )
    assert float(found[0][0]) == 0.0 and bool(found[1][0])


def test_the_length_of_decoder_rows_does_not_matter():
    latents = np.array([[1 / 3, 2 / 3, 0, 0, 0, 0]], np.float32)
    scale = np.array([2, 5, 1, 1, 1, 1], np.float32)
    found = absorption.absorbed(
        np.array([[1, 0]], np.float32), latents / scale, W_DEC * scale[:, None], np.array([1.0, 0.0]), MAIN
    )
    assert float(found[0][0]) == pytest.approx(2 / 3, abs=1e-6)


def test_the_metric_is_the_mean_over_rows():
    latents = np.array([case[0] for case in CASES.values()], np.float32)
    x = np.tile(np.float32([1, 7]), (len(latents), 1))
    batch = absorption.ProbeBatch(x=x, latents=latents, W_dec=W_DEC, probe=np.float32([1, 0]), main=MAIN)
    result = over(absorption.ProbeAbsorption(), batch, rows=3)
    assert result["absorption_fraction"] == pytest.approx(np.mean([case[1] for case in CASES.values()]), rel=1e-6)
    assert result["absorption_full"] == 1 / 8 and result["main_off"] == 3 / 8
    with pytest.raises(UserError, match="main must have 6"):
        over(absorption.ProbeAbsorption(), batch.replace(main=MAIN[:2]))


def test_parents_by_counting():
    """Parent 0: on in rows 0-5, child in 0-3, latent off in 0, 1 (with child) and 5 (alone). Parent 1 has no child."""
    parent, child, latent = (np.zeros((8, 2), np.float32) for _ in range(3))
    parent[:6, 0] = child[:4, 0] = latent[2:5, 0] = 1
    child[6:, 0] = 1  # without its parent: no case
    parent[:2, 1] = 1
    result = over(
        absorption.ParentAbsorption(), absorption.FamilyBatch(parent=parent, child=child, latent=latent), rows=3
    )
    assert result["absorption"] == 2 / 4 and result["missed_alone"] == pytest.approx(3 / 4)
    np.testing.assert_array_equal(result.arrays["absorption_by_parent"], [0.5, np.nan])
