"""Absorption is 0 where parents are told apart, 1 where children swallow them; sparsity follows the data."""

import pytest

from saejax.activations.synthetic import Kind, Synthetic
from saejax.errors import UserError
from saejax.lab.experiments import hierarchy
from saejax.lab.experiments.calibration import Calibration
from saejax.lab.experiments.known_codes import Dictionary


def test_absorption_of_hand_made_codes():
    source = Synthetic(kind=Kind.hierarchical, d_in=32, n_features=16, n_groups=4, parent_rate=0.3)
    rows, codes = next(source.heldout_with_codes(1000, 1000))
    features = source.features()
    perfect = hierarchy._scored(source, codes, codes, Dictionary.of(features, features))
    assert perfect["absorption"] == perfect["missed_alone"] == 0
    assert perfect["recovered_features"] == 1
    swallowed = codes.copy()
    child_on = (codes[:, 4:].reshape(1000, 4, 3) > 0).any(axis=2)
    swallowed[:, :4][child_on] = 0
    absorbed = hierarchy._scored(source, codes, swallowed, Dictionary.of(features, features))
    assert absorbed["absorption"] == 1
    assert absorbed["missed_alone"] == 0
    assert absorbed["f1"] < 1


def test_the_table_judges_matryoshka_against_topk():
    arm = {"absorption": 0.3, "missed_alone": 0.2, "recovered_features": 0.5, "f1": 0.6, "l0": 3.0}
    arms = {name: arm for name in ("true, matched filter", "true, OMP", "TopK")}
    better = arm | {"absorption": 0.17, "recovered_features": 0.71}
    wanted = {"absorption, Matryoshka - TopK": "pass", "recovered features, Matryoshka - TopK": "pass"}
    verdicts = {check.quantity: check.verdict for check in hierarchy._checks(arms | {"Matryoshka": better})}
    assert verdicts["absorption, true dictionary, matched filter"] == "pass"
    assert verdicts["absorption, true dictionary, OMP"] == verdicts["absorption, TopK"] == "FAIL"
    assert wanted.items() <= verdicts.items()
    verdicts = {check.quantity: check.verdict for check in hierarchy._checks(arms | {"Matryoshka": arm})}
    assert {verdicts[name] for name in wanted} == {"FAIL"}
    labels = [label.get_text() for label in hierarchy._figure(arms).axes[0].get_xticklabels()]
    assert labels[1:] == ["true\nOMP\nL0 3.0", "TopK\nL0 3.0"]


def test_sparsity_rises_with_the_features_that_fire():
    outcome = Calibration(firing=(1.0, 3.0, 6.0), n_learning_steps=100, n_test=500).run()
    points = outcome.values["points"]
    assert outcome.values["spearman"] == pytest.approx(1)
    wanted = {check.quantity: check.verdict for check in outcome.checks}
    assert wanted["FVU reached, largest distance from the target"] == "pass"
    assert all(p["unconverged"] == 0 for p in points)
    assert points[0]["components"] == pytest.approx(points[-1]["components"], rel=0.1)


@pytest.mark.parametrize("change", [{"firing": (1.0, 2.0)}, {"firing": (2.0, 1.0, 3.0)}, {"fvu": 1.0}])
def test_bad_fields_are_named(change):
    with pytest.raises(UserError, match=next(iter(change))):
        Calibration(**change)
