"""Scenes and their two bindings, and what the dimension check may and may not say."""

import numpy as np
import pytest

from saejax.errors import UserError
from saejax.lab.experiments import binding, dimensionality


def test_a_swap_keeps_the_parts_and_changes_the_pairs():
    scenes = binding.draw(np.random.default_rng(0), 500, 4, 3)
    other = scenes.swapped()
    assert (scenes.roles[:, 0] != scenes.roles[:, 1]).all() and (scenes.fillers[:, 0] != scenes.fillers[:, 1]).all()
    np.testing.assert_array_equal(np.sort(scenes.fillers), np.sort(other.fillers))
    np.testing.assert_array_equal(scenes.roles, other.roles)
    assert (scenes.fillers != other.fillers).all()
    counts = np.bincount(scenes.roles.ravel(), minlength=4)
    assert counts.min() > 0.7 * counts.max()


def test_codes_of_one_scene_by_hand():
    parts = binding.Parts(roles=np.eye(3)[:2], fillers=np.eye(3)[1:])
    scene = binding.Scenes(np.array([[0, 1]]), np.array([[1, 0]]))
    np.testing.assert_array_equal(parts.summed(scene), [[1, 2, 1]])
    expected = np.zeros((3, 3))
    expected[0, 2] = expected[1, 1] = 1
    np.testing.assert_array_equal(parts.bound(scene), expected.reshape(1, 9))
    crossed = binding.Parts(roles=np.array([[1.0], [-1.0]]), fillers=np.array([[2.0], [-0.5]]))
    assert crossed.rectified(binding.Scenes(np.array([[0, 1]]), np.array([[0, 1]])))[0, 0] == 3.0
    assert crossed.rectified(binding.Scenes(np.array([[0, 1]]), np.array([[1, 0]])))[0, 0] == 1.5


def test_the_experiment_passes_and_orthogonal_parts_are_exact():
    outcome = binding.TensorProduct(rows=300).run()
    assert outcome.passed and outcome.values["sum"]["binding_distance"] == 0
    assert outcome.values["sum"]["binding_distance_rms_shuffled"] > 1
    assert 0.1 < outcome.values["sum of ReLU"]["binding_distance"] < outcome.values["role-filler"]["binding_distance"]


def test_too_few_parts_are_refused():
    with pytest.raises(UserError, match="n_roles=1"):
        binding.TensorProduct(n_roles=1)


def test_dimension_verdicts_warn_and_never_prove():
    texts = {
        (margin, superposed): dimensionality.verdict(margin, superposed=superposed)
        for margin in (0.1, 0.999, 1.0, 50.0)
        for superposed in (True, False)
    }
    assert {key for key, text in texts.items() if "warning" in text} == {(0.1, True), (0.999, True)}
    assert len({texts[margin, False] for margin in (0.1, 0.999, 1.0, 50.0)}) == 1
    assert not any("violated" in text or "proves" in text for text in texts.values())


def test_dimension_check_passes_on_known_data():
    outcome = dimensionality.Dimensionality(rows=500).run()
    assert outcome.passed
    dense, free = outcome.values["dense"], outcome.values["not superposed"]
    assert dense["K"] > 1.2 * dense["K_true"]  # below its own limit the solver cannot even count
    assert free["margins"]["margin_top_k"] < 1 and set(free["verdicts"].values()) == {"no superposition needed"}
