"""Canvases with known contents, controls that must be exact, and the table's own arithmetic."""

import jax
import numpy as np
import pytest

from saejax.lab.experiments import additivity, classifier


@pytest.fixture(scope="module")
def digits():
    pytest.importorskip("sklearn")
    return additivity.Digits.load(np.random.default_rng(0))


def test_pairs_hold_two_heldout_digits_in_different_slots(digits):
    pairs = digits.pairs(np.random.default_rng(1), 200)
    filled = [(p.reshape(200, 8, 3, 8) > 0).any(axis=(1, 3)) for p in (pairs.a, pairs.b)]
    assert (filled[0].sum(axis=1) == 1).all() and (filled[1].sum(axis=1) == 1).all()
    assert not (filled[0] & filled[1]).any()
    assert not set(digits.train) & set(digits.heldout)
    heldout = {digits.images[i].tobytes() for i in digits.heldout}
    for canvas, where in zip(pairs.a[:20].reshape(-1, 8, 3, 8), filled[0].argmax(axis=1), strict=False):
        assert np.ascontiguousarray(canvas[:, where]).tobytes() in heldout
    assert 0 <= pairs.a.min() and pairs.a.max() == 1


def test_training_canvases_name_their_digits(digits):
    canvas, present = digits.training(np.random.default_rng(1), 400)
    slots = (canvas.reshape(400, 8, 3, 8) > 0).any(axis=(1, 3)).sum(axis=1)
    assert set(slots) == {1, 2} and 0.4 < (slots == 2).mean() < 0.6
    named = present.sum(axis=1)
    assert ((named == slots) | ((slots == 2) & (named == 1))).all()  # two of the same digit are named once
    assert (named[slots == 2] == 2).mean() > 0.8


def test_affine_maps_add_exactly_and_saturation_does_not(digits):
    pairs = digits.pairs(np.random.default_rng(1), 200)
    rng = np.random.default_rng(2)
    W, b = rng.standard_normal((192, 16)), rng.standard_normal((1, 16))
    affine = additivity.report(lambda x: x @ W + b, pairs)
    assert affine["additivity_cos_blank_centred"] == pytest.approx(1, abs=1e-5)
    assert affine["additivity_r2"] == pytest.approx(1, abs=1e-5)
    assert affine["additivity_retrieval"] == 1
    saturated = additivity.report(lambda x: np.tanh(3 * (x @ W)), pairs)
    assert saturated["additivity_r2"] < 0.7


def test_networks_differ_by_their_seed_and_stay_affine_before_the_first_relu(digits):
    rng = np.random.default_rng(0)
    pairs, data = digits.pairs(rng, 50), digits.training(rng, 300)
    found = additivity.DigitPairs(n_networks=2, n_steps=5).networks((16,), data, pairs)
    assert set(found) == {"untrained 16", "trained 16", "trained 16, affine"}
    for rows in found.values():
        assert abs(rows[0]["additivity_cos_raw_shuffled"] - rows[1]["additivity_cos_raw_shuffled"]) > 1e-3
    for affine, rectified in zip(found["trained 16, affine"], found["trained 16"], strict=True):
        assert affine["additivity_r2"] == pytest.approx(1, abs=1e-4)
        assert rectified["additivity_r2"] < 0.95


def test_a_network_starts_as_its_config_says():
    for glorot, bound in ((True, (6 / 320) ** 0.5), (False, 192**-0.5)):
        layer = classifier.MLP(widths=(192, 128), glorot=glorot).init(jax.random.key(0))[0]
        assert 0.97 * bound < np.abs(layer["W"]).max() < bound
        assert 0.9 * bound < np.abs(layer["b"]).max() < bound


def test_every_cell_of_the_reference_is_checked():
    values = {
        layer: {column: {"mean": target, "sd": 0.0} for column, target in zip(additivity.COLUMNS, row, strict=True)}
        for layer, row in additivity.REFERENCE.items()
    }
    checks = additivity._checks(values, 8)
    assert len(checks) == 42 and all(check.passed for check in checks)
    values["pixels"]["R2"]["mean"] = 0.96
    values["trained 128"]["raw cos"]["mean"] = 0.93
    failed = [check.quantity for check in additivity._checks(values, 8) if not check.passed]
    assert failed == ["R2, pixels", "raw cos, trained 128"]


def test_a_right_installation_passes_and_a_wrong_network_does_not():
    """The means that seed 0 measured (docs/theory.md before): all within two standard deviations of what draws differ
    by, whose difference from one draw has the variance s^2 (1 + 1/n); three times as far is outside."""
    measured = {"untrained 128": 0.6447, "trained 128": 0.3714, "trained 256-128": -0.2783}
    measured |= {"trained 256-128, logits": -0.0809}
    r2 = list(additivity.COLUMNS).index("R2")
    for layer, mean in measured.items():
        for n in (4, 8):
            within = additivity.tolerance(layer, "R2", n)
            assert 0.03 < abs(mean - additivity.REFERENCE[layer][r2]) < within < 0.35
    rng = np.random.default_rng(0)
    for n in (1, 4, 8):
        draws = rng.normal(0, 0.03, (2, 200_000))  # of the digits: one for the reference, one for all n networks
        ours = draws[0] + rng.normal(0, 0.069 / n**0.5, 200_000)
        difference = ours - draws[1] - rng.normal(0, 0.069, 200_000)
        assert additivity.tolerance("trained 256-128, logits", "R2", n) == pytest.approx(2 * difference.std(), rel=0.01)
