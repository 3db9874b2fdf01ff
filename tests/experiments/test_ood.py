"""Familiar and new combinations never mix, and the experiment runs end to end at a tiny size."""

import numpy as np
import pytest

from saejax.errors import UserError
from saejax.lab.experiments import ood
from saejax.lab.experiments.ood import Compositional


def test_splits_hold_the_combinations_they_claim():
    config = Compositional(n_features=20, k=4)
    rng = np.random.default_rng(0)
    familiar, new = ood.draw_id(config, rng, 4000) > 0, ood.draw_ood(config, rng, 1000) > 0
    assert (familiar.sum(axis=1) == 4).all() and (new.sum(axis=1) == 4).all()
    with_first = familiar[:, 0]
    assert abs(with_first.mean() - 0.5) < 0.03  # 4 standard errors
    assert not familiar[with_first][:, 10:].any()  # feature 0 never meets the second half ...
    assert familiar[~with_first][:, 10:].any(axis=0).all()  # ... whose features all occur
    assert new[:, 0].all() and not new[:, 1:10].any()
    rate = familiar[~with_first].mean(axis=0)
    np.testing.assert_allclose(rate[1:], 4 / 19, atol=0.05)  # uniform k-subsets of the other 19


def test_the_dimension_is_that_of_the_paper():
    assert Compositional().d == 47
    assert Compositional(n_features=50).d == 33
    with pytest.raises(UserError, match=r"k must be in \[1, n_features / 2\]"):
        Compositional(n_features=10, k=6)


def test_one_matching_serves_both_splits():
    rng = np.random.default_rng(0)
    true = tuple((rng.random((600, 5)) < 0.4) * rng.random((600, 5), np.float32) for _ in range(2))
    swapped = true[1][:, [1, 0, 2, 3, 4]]
    scores = ood._scored(true, [true[0], swapped])
    assert scores["mcc_id"] == pytest.approx(1, abs=1e-4)
    assert scores["mcc_ood"] == pytest.approx(3 / 5, abs=0.05)  # two of five read the wrong feature
    assert scores["ood_gap"] == pytest.approx(0.4, abs=0.05)


def test_end_to_end_at_a_tiny_size():
    config = Compositional(
        n_features=30, k=3, n_train=512, n_test=512, n_epochs=4, n_learning_steps=200, n_restarts=1, n_seeds=1
    )
    outcome = config.run()
    arms = outcome.values["arms"]
    assert min(arms["oracle"]["mcc_id"], arms["oracle"]["mcc_ood"]) > 0.9
    assert arms["dictionary learning"]["mcc_id"] > arms["linear probe"]["mcc_ood"] > arms["oracle"]["mcc_chance"]
    assert len(outcome.figure.axes[0].containers) >= 2
