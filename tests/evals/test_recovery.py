"""Matching of dictionaries: invariances, sizes, and the level of chance."""

import itertools

import numpy as np
import pytest

from saejax.errors import UserError
from saejax.evals import recovery


def unit(a):
    return a / np.linalg.norm(a, axis=-1, keepdims=True)


@pytest.fixture
def features():
    return unit(np.random.default_rng(0).standard_normal((7, 10)))


def test_order_length_and_sign_of_latents_do_not_matter(features):
    rng = np.random.default_rng(1)
    order = rng.permutation(7)
    learnt = (features * rng.uniform(0.1, 9, (7, 1)) * rng.choice([-1, 1], (7, 1)))[order]
    scores = recovery.dictionary_recovery(learnt, 5 * features)
    assert scores["mcc"] == scores["mcc_features"] == pytest.approx(1.0)
    assert scores["mmcs_features"] == scores["mmcs_latents"] == pytest.approx(1.0)
    assert scores["recovered_features"] == 1.0
    np.testing.assert_array_equal(order[scores["match"]], np.arange(7))
    signs = np.sign((learnt[scores["match"]] * features).sum(1))
    np.testing.assert_allclose(scores["match_cos"], signs)


def test_matching_is_the_best_of_all(features):
    learnt = np.random.default_rng(2).standard_normal((5, 10))
    cos = np.abs(unit(learnt) @ features[:5].T)
    best = max(np.mean([cos[p[j], j] for j in range(5)]) for p in itertools.permutations(range(5)))
    scores = recovery.dictionary_recovery(learnt, features[:5])
    assert scores["mcc"] == pytest.approx(best)
    assert scores["mmcs_features"] == pytest.approx(cos.max(0).mean())
    assert scores["mmcs_latents"] == pytest.approx(cos.max(1).mean())


def test_missing_features_lower_only_the_mean_over_features(features):
    scores = recovery.dictionary_recovery(features[:4], features)
    assert scores["mcc"] == pytest.approx(1.0) and scores["mcc_features"] == pytest.approx(4 / 7)
    assert scores["match"].tolist() == [0, 1, 2, 3, -1, -1, -1] and scores["match_cos"][4:].tolist() == [0, 0, 0]
    assert scores["recovered_features"] == pytest.approx(4 / 7)


def test_one_latent_cannot_serve_two_features(features):
    """Best single matches do not see that the dictionary holds one feature seven times; the matching does."""
    scores = recovery.dictionary_recovery(np.tile(features[:1], (7, 1)), features)
    assert scores["mmcs_latents"] == pytest.approx(1.0) and scores["mcc"] < 0.7


def test_a_random_dictionary_scores_at_chance():
    rng = np.random.default_rng(0)
    features = rng.standard_normal((64, 32))
    scores = recovery.dictionary_recovery(rng.standard_normal((64, 32)), features)
    assert scores["mcc"] == pytest.approx(scores["mcc_chance"], abs=0.03)
    assert scores["mmcs_features"] == pytest.approx(scores["mmcs_features_chance"], abs=0.03)
    assert scores["mcc_chance"] < 0.6


def test_rows_of_zeros_are_no_direction(features):
    learnt = features.copy()
    learnt[3] = 0.0
    scores = recovery.dictionary_recovery(learnt, features)
    assert scores["mcc"] == pytest.approx(6 / 7)


def test_every_key_is_defined_and_widths_must_agree(features):
    assert set(recovery.dictionary_recovery(features, features)) == set(recovery.DEFINITIONS)
    with pytest.raises(UserError, match="width 10.*d_in=9"):
        recovery.dictionary_recovery(features[:, :9], features)


def test_uniqueness_counts_features_not_latents(features):
    """Three latents on feature 0, one on feature 1: two features are tracked by four latents."""
    scores = recovery.dictionary_recovery(features[[0, 0, 0, 1]], features)
    assert scores["uniqueness"] == 2 / 4 and 0 < scores["uniqueness_chance"] <= 1


def test_every_score_has_its_chance(features):
    scores = recovery.dictionary_recovery(features, features)
    for key in ("mcc", "mcc_features", "recovered_features", "mmcs_features", "mmcs_latents", "uniqueness"):
        assert 0 <= scores[f"{key}_chance"] < scores[key] == pytest.approx(1.0), key
    assert scores["recovered_features_above_07_chance"] <= 1.0
