"""Codes against known features: correlation on held-out rows, support, size; all by numpy and by counting."""

import itertools

import numpy as np
import pytest

from saejax.errors import UserError
from saejax.lab.metrics import true_codes
from saejax.lab.metrics.over import over


def codes(n=400, n_features=4, n_latents=5, seed=0):
    """Sparse features, and latents that mix them with noise."""
    rng = np.random.default_rng(seed)
    features = rng.random((n, n_features)) * (rng.random((n, n_features)) < 0.4)
    latents = features @ rng.random((n_features, n_latents)) ** 3 + 0.3 * rng.random((n, n_latents)) + 5.0
    return features.astype(np.float32), latents.astype(np.float32)


def test_matched_on_one_part_and_scored_on_the_other():
    features, latents = codes()
    split = true_codes.split_rows(np.arange(400))
    result = over(true_codes.CodeMcc(), true_codes.CodeBatch(features=features, latents=latents, split=split), rows=64)

    def corr(rows):
        return np.abs(np.corrcoef(features[rows].T.astype(float), latents[rows].T.astype(float))[:4, 4:])

    a, b = corr(split == true_codes.MATCH), corr(split == true_codes.SCORE)
    best = max(itertools.permutations(range(5), 4), key=lambda p: sum(a[j, p[j]] for j in range(4)))
    assert tuple(result.arrays["code_match"]) == best
    assert result["code_mcc"] == pytest.approx(np.mean([b[j, best[j]] for j in range(4)]), rel=1e-5)
    assert result["code_mcc_chance"] == pytest.approx(b.mean(), rel=1e-5)


def test_noise_scores_at_chance_though_its_matching_was_chosen():
    rng = np.random.default_rng(0)
    features, latents = rng.random((2, 200, 20)).astype(np.float32)
    split = true_codes.split_rows(np.arange(200))
    result = over(true_codes.CodeMcc(), true_codes.CodeBatch(features=features, latents=latents, split=split))
    # Scored on the rows that chose it, the same matching would look like 0.2.
    assert result["code_mcc"] == pytest.approx(result["code_mcc_chance"], abs=0.04)


def test_missing_and_silent_latents_and_features():
    features, _ = codes()
    latents = features[:, :2] * 3 + 1
    features = np.concatenate([features, np.zeros((400, 1), np.float32)], axis=1)
    latents = np.concatenate([latents, np.ones((400, 1), np.float32)], axis=1)
    split = true_codes.split_rows(np.arange(400))
    result = over(true_codes.CodeMcc(), true_codes.CodeBatch(features=features, latents=latents, split=split), rows=50)
    assert result.arrays["code_match"][:2].tolist() == [0, 1]
    assert result["code_mcc_features"] == pytest.approx(2 / 4, rel=1e-5)  # the fifth feature never occurs


def test_the_shift_is_scored_with_the_matching_of_the_training_distribution():
    features, latents = codes(600)
    split = np.concatenate([true_codes.split_rows(np.arange(400)), np.full(200, true_codes.SHIFTED, np.int32)])
    latents[400:] = latents[400:, ::-1]
    result = over(
        true_codes.CodeMcc(shifted=True), true_codes.CodeBatch(features=features, latents=latents, split=split)
    )
    corr = np.abs(np.corrcoef(features[400:].T.astype(float), latents[400:].T.astype(float))[:4, 4:])
    wanted = np.mean([corr[j, result.arrays["code_match"][j]] for j in range(4)])
    assert result["code_mcc_shifted"] == pytest.approx(wanted, rel=1e-5)
    assert result["code_mcc_shift_gap"] == pytest.approx(result["code_mcc"] - wanted, rel=1e-5)
    assert set(result.definitions) == set(result) | {"code_match"}


def test_the_split_belongs_to_the_row():
    ids = np.random.default_rng(0).permutation(10_000)
    split = true_codes.split_rows(ids, match_share=0.3)
    np.testing.assert_array_equal(split, true_codes.split_rows(np.arange(10_000), match_share=0.3)[ids])
    assert (split == true_codes.MATCH).mean() == pytest.approx(0.3, abs=4 * (0.21 / 10_000) ** 0.5)
    assert (split != true_codes.split_rows(ids, match_share=0.3, seed=1)).mean() > 0.3


def test_support_by_counting():
    """Four rows, two features, three latents; latent 2 belongs to feature 0, latent 1 to feature 1."""
    features = np.array([[1, 0], [2, 2], [0, 4], [0, 0]], np.float32)
    latents = np.array([[1, 0, 0.5], [0, 1, 1.0], [0, 0, 3.0], [1, 1, 0]], np.float32)
    match = np.array([2, 1], np.int32)
    result = over(true_codes.Support(), true_codes.CodeBatch(features=features, latents=latents, match=match), rows=3)
    # Features on: 2 + 2. Firings: 2 + 2 + 3 = 7. Both: feature 0 on rows 0 and 1, feature 1 on row 1.
    assert result["support_precision"] == pytest.approx(3 / 7) and result["support_recall"] == pytest.approx(3 / 4)
    assert result["support_f1"] == pytest.approx(6 / 11)
    assert result["support_precision_macro"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert result["support_recall_macro"] == pytest.approx((1 + 1 / 2) / 2)
    assert result["support_f1_macro"] == pytest.approx((4 / 5 + 2 / 4) / 2)
    # Drawn at random: 2 * 3 / 4 + 2 * 2 / 4 hits expected.
    assert result["support_recall_chance"] == pytest.approx(2.5 / 4)
    np.testing.assert_allclose(result.arrays["on_truth_ratio"], [1.5 / 3, 1 / 6], rtol=1e-6)
    assert result["on_truth_ratio_shared"] == pytest.approx(2.5 / 9)


def test_a_feature_without_a_latent_is_missed():
    features = np.array([[1, 1], [1, 0]], np.float32)
    batch = true_codes.CodeBatch(features=features, latents=features[:, :1], match=np.array([0, -1], np.int32))
    result = over(true_codes.Support(), batch)
    assert result["support_recall"] == pytest.approx(2 / 3) and result["support_precision"] == 1.0
    assert result["support_f1_macro"] == 0.5 and np.isnan(result.arrays["on_truth_ratio"][1])


def test_chance_is_what_shuffled_rows_give():
    rng = np.random.default_rng(0)
    features = (rng.random((4000, 6)) < 0.3).astype(np.float32)
    match = np.arange(6, dtype=np.int32)
    scores = over(true_codes.Support(), true_codes.CodeBatch(features=features, latents=features, match=match))
    shuffled = over(
        true_codes.Support(), true_codes.CodeBatch(features=features, latents=rng.permutation(features), match=match)
    )
    for key in ("support_f1", "support_f1_macro", "support_precision", "support_recall"):
        assert scores[key] == 1.0
        assert shuffled[key] == pytest.approx(scores[f"{key}_chance"], abs=0.02)


def test_soft_threshold_on_truth():
    """Exp(1) amplitudes, threshold t: the sum of found over that of true ones is exp(-t)."""
    z = np.random.default_rng(0).exponential(size=(200_000, 1)).astype(np.float32)
    batch = true_codes.CodeBatch(features=z, latents=np.maximum(z - 0.2, 0), match=np.array([0], np.int32))
    assert over(true_codes.Support(), batch, rows=50_000)["on_truth_ratio_shared"] == pytest.approx(
        np.exp(-0.2), abs=0.005
    )


def test_what_is_missing_is_named():
    features, latents = codes(10)
    with pytest.raises(UserError, match="split must"):
        over(true_codes.CodeMcc(), true_codes.CodeBatch(features=features, latents=latents))
    with pytest.raises(UserError, match="match must give"):
        over(true_codes.Support(), true_codes.CodeBatch(features=features, latents=latents))
    with pytest.raises(UserError, match="match_share must"):
        true_codes.split_rows(np.arange(3), match_share=1.0)
