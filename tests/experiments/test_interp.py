"""Interpretability scores put units of known meaning into their known order, and the table says what chance is."""

import json

import numpy as np
import pytest

from saejax.errors import UserError
from saejax.lab.experiments import harness, interp

TINY = interp.IntruderMIS(n_items=3600, n_units=8, n_trials=4, n_steps=4)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    folder = tmp_path_factory.mktemp("interp")
    result = harness.run_experiment(TINY, folder, echo=False)
    assert (folder / "figure.png").stat().st_size and json.loads((folder / "metrics.json").read_text())["values"]
    return result


@pytest.mark.parametrize("score", ["mis", "intruder"])
def test_units_stand_in_their_order(outcome, score):
    means = {name: scores[score] for name, scores in outcome.values["described_by_labels"].items()}
    falling = ["true latents", "sum of 2 latents", "sum of 8 latents", "noise"]
    assert means["true latents"] > 0.85
    assert sorted(falling, key=means.__getitem__, reverse=True) == falling
    # 8 units x (4 trials of sd .1, 50 of sd .4): standard errors of .02, four of them.
    assert abs(means["noise"] - {"mis": 0.5, "intruder": 0.2}[score]) < 0.08
    assert abs(means["neurons"] - means["random directions"]) < 0.1 < means["true latents"] - means["neurons"]


def test_an_untrained_sae_fails_where_the_true_latents_pass(outcome):
    verdicts = {check.quantity: check.verdict for check in outcome.checks}
    assert verdicts["true latents: 2AFC (chance 0.5)"] == "pass"
    assert verdicts["SAE latents: intruder (chance 0.2)"] == "FAIL"
    assert not outcome.passed


def test_the_traps_are_in_the_table(outcome):
    traps = [check for check in outcome.checks if check.quantity.startswith("trap")]
    assert [check.quantity[:6] for check in traps] == [f"trap {i}" for i in (1, 2, 3, 4)]
    assert [check.verdict for check in traps[1:]] == ["pass", "pass", "-"]
    rectified = outcome.values["described_by_labels"]["neurons"]["mis"]
    assert traps[3].measured - rectified > 0.05  # a low end that means something raises the score


def test_ties_called_by_place_never_find_the_last():
    assert interp._ties_by_place(np.zeros((10, 3), np.float32), seed=0) == 0.0
    without_ties = np.random.default_rng(0).standard_normal((500, 20)).astype(np.float32)
    assert abs(interp._ties_by_place(without_ties, seed=0) - 0.2) < 4 * (0.2 * 0.8 / 4000) ** 0.5


@pytest.mark.parametrize("wrong", [{"n_units": 65}, {"n_units": 0}, {"n_items": 100}, {"n_trials": 0}])
def test_sizes_are_checked(wrong):
    with pytest.raises(UserError, match=r"n_(units|items|trials)"):
        interp.IntruderMIS(**wrong)
