"""The 2x2 of dictionary and inference at the smallest size that still shows it, and the scores of codes it rests on."""

import dataclasses

import numpy as np
import pytest

from saejax.errors import UserError
from saejax.lab.experiments import amortisation, known_codes
from saejax.lab.experiments.amortisation import Amortisation


@pytest.fixture(scope="module")
def outcome():
    return dataclasses.replace(
        Amortisation(), arms=("learning",), n_learning_steps=100, learning_batch=256, n_test=500
    ).run()


def test_the_true_dictionary_is_limited_by_inference_alone(outcome):
    measured = {check.quantity: check.measured for check in outcome.checks}
    assert measured["F1, true dictionary, matched filter"] < 0.76
    assert measured["F1, true dictionary, OMP"] > 0.98
    oracle = outcome.values["grid"]["oracle"]
    assert oracle["dictionary_gap_f1"] == 0
    assert oracle["amortisation_gap_f1"] == pytest.approx(oracle["OMP"]["f1"] - oracle["one product"]["f1"])
    assert oracle["loss"]["amortisation_gap"] > 0 == oracle["loss"]["solver_worse_share"]
    assert oracle["OMP"]["f1_chance"] < 0.1


def test_a_learnt_dictionary_stands_in_the_table_and_the_figure(outcome):
    cells = outcome.values["grid"]["learning"]
    assert 0.6 < cells["dictionary_mcc"] <= 1
    assert cells["OMP"]["f1"] > cells["one product"]["f1"]
    assert [label.get_text() for label in outcome.figure.axes[0].get_xticklabels()] == [
        "true\ndictionary",
        "dictionary\nlearning",
    ]


def test_gaps_are_judged_by_their_sign():
    cell = {"f1": 0.7, "code_mcc": 0.9}
    cells = {name: cell for name in amortisation.INFERENCES} | {
        "dictionary_mcc": 0.99, "amortisation_gap_f1": 0.05, "dictionary_gap_f1": 0.3,
    }  # fmt: skip
    checks = {c.quantity: c for c in amortisation._checks({"oracle": cells, "topk_auxk": cells})}
    assert not checks["amortisation gap (F1), TopK + AuxK"].passed
    assert not checks["F1, true dictionary, OMP"].passed
    assert checks["F1, true dictionary, matched filter"].passed


def test_unknown_arms_are_named():
    with pytest.raises(UserError, match="arms must be among topk, .* got topk_relu"):
        Amortisation(arms=("topk_relu",))


def test_scores_of_permuted_true_codes_are_perfect_and_of_other_rows_are_chance():
    rng = np.random.default_rng(0)
    true = (rng.random((2000, 12)) < 0.2) * rng.uniform(0.5, 1.5, (2000, 12))
    order = rng.permutation(12)
    perfect = known_codes.scores(true, true[:, order], np.argsort(order))
    assert perfect["f1"] == pytest.approx(1)
    assert perfect["code_mcc"] == pytest.approx(1, abs=1e-5)
    assert perfect["l0"] == pytest.approx((true > 0).sum(axis=1).mean())
    assert perfect["unused"] == 0
    apart = known_codes.scores(true, np.roll(true, 1, axis=0), np.arange(12))
    assert abs(apart["f1"] - apart["f1_chance"]) < 0.02


def test_a_dictionary_knows_its_rows_and_its_bias():
    rng = np.random.default_rng(1)
    features = np.eye(6, dtype=np.float32)
    bias = rng.standard_normal(6).astype(np.float32)
    dictionary = known_codes.Dictionary.of(3 * features[::-1], features, bias)
    assert dictionary.match.tolist() == [5, 4, 3, 2, 1, 0]
    assert dictionary.mcc == pytest.approx(1)
    codes = np.array([[0, 0.05, 0, 0.7, 0, 1.2]], np.float32)
    found, unconverged = dictionary.codes(codes @ dictionary.rows + bias, "top_k", drop=0.1, k=3)
    np.testing.assert_allclose(found, np.where(codes > 0.1, codes, 0), atol=1e-5)
    assert unconverged == 0
    assert dictionary.codes(codes @ dictionary.rows + bias, "fista", l1_coef=0.01, max_iterations=1)[1] == 1
