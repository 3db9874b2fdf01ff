"""Interpretability proxies: units whose meaning is known, noise, ties, and orders that must not matter."""

import numpy as np
import pytest

from saejax.errors import UserError
from saejax.lab.metrics import interpretability, over

N, LABELS = 3000, 40


def sparse_codes(seed=0):
    """Nonnegative codes, each feature on 5 % of the rows, and the labels that say which are on."""
    rng = np.random.default_rng(seed)
    z = (rng.random((N, LABELS)) < 0.05) * rng.uniform(0.5, 1.5, (N, LABELS))
    return z, (z > 0).astype(np.float32)


def measured(m, latents, descriptor, row_id=None):
    row_id = np.arange(len(latents)) if row_id is None else row_id
    return over.over(m, interpretability.DescribedBatch(latents=latents, descriptor=descriptor, row_id=row_id))


def test_monosemantic_beats_polysemantic_beats_noise():
    z, labels = sparse_codes()
    mixed = np.sum([np.roll(z, 4 * i, axis=1)[:, :10] for i in range(10)], axis=0)
    noise = np.random.default_rng(1).standard_normal((N, 10))
    # 10 units of 50 trials at rate .2: standard error .018 if units were independent; they share rows, so three times.
    intruder = [measured(interpretability.Intruder(), u, labels) for u in (z[:, :10], mixed, noise)]
    assert intruder[0]["intruder_accuracy"] > 0.95 > 0.85 > intruder[1]["intruder_accuracy"] > 0.4
    assert (
        intruder[2]["intruder_accuracy"] == pytest.approx(0.2, abs=0.055)
        and 0.2 == intruder[2]["intruder_accuracy_chance"]
    )
    mis = [
        measured(interpretability.TwoAlternatives(references=4, trials=10), u, labels)
        for u in (z[:, :10], mixed, noise)
    ]
    assert mis[0]["mis"] > mis[1]["mis"] + 0.05 > mis[2]["mis"] + 0.1
    assert mis[0]["mis_accuracy"] > 0.97
    # 100 trials: standard errors .05 of the rate; the soft score is narrower.
    assert mis[2]["mis"] == pytest.approx(0.5, abs=0.06) and mis[2]["mis_accuracy"] == pytest.approx(0.5, abs=0.15)


def test_ties_are_chance_exactly():
    """A descriptor that says nothing: every comparison ties."""
    z, _ = sparse_codes()
    for m in (interpretability.Intruder(n_top=3), interpretability.TwoAlternatives(references=3, trials=5)):
        for descriptor in (np.ones((N, 2)), np.zeros((N, 2))):
            result = measured(m, z[:, :3], descriptor)
            for key in result:
                if f"{key}_chance" in result:
                    assert result[key] == pytest.approx(result[f"{key}_chance"], abs=1e-6), key


def test_a_constant_unit_is_no_oracle_of_row_order():
    """Without random tie-breaking, the rows that come first would be 'top' and describe themselves."""
    descriptor = np.repeat(np.eye(30), 100, axis=0)
    constant = np.ones((N, 20))
    result = measured(interpretability.Intruder(), constant, descriptor)
    assert result["intruder_accuracy"] == pytest.approx(0.2, abs=0.06)
    units = np.tile((np.arange(N) == 0)[:, None], (1, 20)).astype(float)
    assert measured(interpretability.TwoAlternatives(), units, descriptor)["mis"] == pytest.approx(0.5, abs=0.06)


def test_zeros_at_the_bottom_are_sampled():
    """Rows on which a sparse unit is silent are half and half of two kinds: the order of the file does not choose."""
    unit = np.zeros((N, 1))
    unit[:200, 0] = np.linspace(1, 2, 200)
    kind = np.zeros(N)
    kind[200:] = np.arange(N - 200) >= (N - 200) // 2
    descriptor = np.eye(2)[kind.astype(int)]
    m = interpretability.TwoAlternatives(references=9, trials=20)
    # Top rows are all of kind 0; were the bottom the first zeros, all would be alike and the score chance.
    bottom_sampled = measured(m, unit, descriptor)["mis"]
    assert bottom_sampled > 0.55


def test_two_alternatives_by_hand():
    """Two references and two trials, descriptors are positions on a circle; ranks dealt out by hand."""
    activation = np.arange(12)[::-1].astype(float)[:, None]
    angle = np.random.default_rng(3).uniform(0, 2 * np.pi, 12)
    descriptor = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    expected = []
    for t in range(2):
        top, bottom = [t, t + 2, t + 4], [11 - t, 9 - t, 7 - t]
        s = np.cos(angle[top[1:] + bottom[1:]][:, None] - angle[[top[0], bottom[0]]][None, :])
        s = (s - s.mean()) / s.std()
        right = s[:2, 0].mean() + s[2:, 1].mean()
        swapped = s[:2, 1].mean() + s[2:, 0].mean()
        expected.append(np.exp(right) / (np.exp(right) + np.exp(swapped)))
    m = interpretability.TwoAlternatives(references=2, trials=2)
    assert measured(m, activation, descriptor)["mis"] == pytest.approx(np.mean(expected), rel=1e-9)
    with pytest.raises(UserError, match="at least"):
        measured(m, activation[1:], descriptor[1:])


def test_dead_units_are_left_out():
    z, labels = sparse_codes()
    units = np.concatenate([z[:, :1], np.zeros((N, 1))], axis=1)
    result = measured(interpretability.Intruder(), units, labels)
    assert result["intruder_units"] == 1 and np.isnan(result.arrays["intruder_per_unit"][1])
    result = measured(interpretability.TwoAlternatives(), units, labels)
    assert result["mis_units"] == 1 and np.isnan(result.arrays["mis_per_unit"][1])


def test_contrast_covers_the_difference():
    rng = np.random.default_rng(0)
    scores = {
        "latents": rng.normal(0.9, 0.1, 80),
        "neurons": rng.normal(0.6, 0.1, 60),
        "none": rng.normal(0.6, 0.1, 60),
    }
    scores["latents"][:3] = np.nan
    result = interpretability.contrast(scores, "neurons")
    assert result["units"] == 60
    assert result["latents_minus_neurons"] == pytest.approx(0.3, abs=0.06)
    width = result["latents_minus_neurons_high"] - result["latents_minus_neurons_low"]
    assert width == pytest.approx(2 * 1.96 * 0.1 * (2 / 60) ** 0.5, rel=0.25)
    assert result["none_minus_neurons_low"] < 0 < result["none_minus_neurons_high"]
    with pytest.raises(UserError, match="against"):
        interpretability.contrast(scores, "heads")
