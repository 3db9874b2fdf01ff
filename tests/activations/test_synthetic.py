"""Synthetic rows have the statistics their config promises, each within five standard errors."""

import dataclasses
import json

import numpy as np
import pytest

from saejax.activations.source import SOURCES
from saejax.activations.synthetic import Kind, Synthetic
from saejax.errors import UserError

N = 40_000
SOURCES_OF_EACH_KIND = pytest.mark.parametrize("kind", list(Kind))


def rows_and_codes(**config) -> tuple[np.ndarray, np.ndarray]:
    return next(Synthetic(heldout_rows=N, **config).heldout_with_codes(N))


def test_features_are_unit_vectors_fixed_by_their_seed():
    features = Synthetic().features()
    assert features.shape == (256, 64) and features.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(features, Synthetic(noise=0.5).features())
    assert (features != Synthetic(feature_seed=1).features()).any()
    # Random directions in 64 dimensions: E cos^2 = 1/64 with standard deviation about sqrt(2)/64 per pair.
    cosines = (features @ features.T)[np.triu_indices(256, 1)]
    assert abs(np.square(cosines).mean() - 1 / 64) < 5 * np.sqrt(2) / 64 / np.sqrt(len(cosines))


def test_one_site_is_the_row():
    source = Synthetic(d_in=32)
    assert source.sites == (32,) and source == Synthetic(d_in=32, sites=(32,)) == Synthetic(d_in=32, sites=source.sites)
    assert dataclasses.replace(source, d_in=16).sites == (16,)
    assert "sites" not in source.fingerprint()  # as before there were sites: runs of then go on


def test_the_data_of_one_site_are_those_of_every_version():
    """Pinned: a resumed run, a published figure and the defaults of the benchmark rest on these bits."""
    source = Synthetic()
    rows, codes = next(source.heldout_with_codes(2))
    assert codes[0].nonzero()[0].tolist() == [66, 126]
    np.testing.assert_allclose(source.features()[0, :3], [0.0138381971, -0.0734874085, -0.0598694123], rtol=1e-6)
    np.testing.assert_allclose(rows[0, :3], [0.0898342356, -0.193783626, 0.0776934847], rtol=1e-5)


def test_several_sites_see_one_code_through_independent_dictionaries():
    source = Synthetic(sites=(64, 24, 64), n_features=256, noise=0.01, heldout_rows=3000)
    assert source.d_in == 152 and source.sites == (64, 24, 64)
    features, parts = source.features(), np.split(source.features(), [64, 88], axis=1)
    assert features.shape == (256, 152)
    np.testing.assert_array_equal(parts[0], Synthetic().features())
    for part in parts:
        np.testing.assert_allclose(np.linalg.norm(part, axis=1), 1, atol=1e-6)
    # Independent directions of 64 dimensions: 256 cosines with mean 0 and standard deviation 1/8.
    cosines = (parts[0] * parts[2]).sum(1)
    assert abs(cosines.mean()) < 5 / 8 / np.sqrt(256)
    assert abs(np.square(cosines).mean() * 64 - 1) < 5 * np.sqrt(2 / 256)
    rows, codes = next(source.heldout_with_codes(3000))
    np.testing.assert_array_equal(codes, next(Synthetic(heldout_rows=3000).heldout_with_codes(3000))[1])
    residual = rows - codes @ features
    assert abs(residual.std() - 0.01) < 5 * 0.01 / np.sqrt(2 * residual.size)
    assert next(source.open(n_lanes=2, block_rows=8, lanes=range(2), seed=0)).shape == (2, 8, 152)
    fingerprint = json.loads(json.dumps(source.fingerprint()))
    del fingerprint["type"]
    assert Synthetic(**fingerprint | {"kind": Kind[fingerprint["kind"]]}) == source


@SOURCES_OF_EACH_KIND
def test_rows_are_codes_times_features_plus_noise(kind):
    source = Synthetic(kind=kind)
    rows, codes = next(source.heldout_with_codes(5000))
    residual = rows - codes @ source.features()
    n = residual.size
    assert abs(residual.mean()) < 5 * 0.01 / np.sqrt(n)
    assert abs(residual.std() - 0.01) < 5 * 0.01 / np.sqrt(2 * n)


@SOURCES_OF_EACH_KIND
def test_firing_rates_and_amplitudes(kind):
    source = Synthetic(kind=kind)
    _, codes = rows_and_codes(kind=kind)
    rates = source.firing_rates()
    z = ((codes > 0).mean(0) - rates) / np.sqrt(rates * (1 - rates) / N)
    assert np.abs(z).max() < 5
    active = codes[codes > 0]
    assert active.min() >= 0.5 and active.max() <= 1.5
    assert abs(active.mean() - 1) < 5 / np.sqrt(12 * len(active))
    expected_l0 = 4 if kind is Kind.iid else 32 * 0.06 * 1.7
    np.testing.assert_allclose(rates.sum(), expected_l0)


def test_iid_features_fire_independently():
    _, codes = rows_and_codes()
    fires = codes > 0
    p = 4 / 256
    l0 = fires.sum(1)
    # The number of firing features is binomial, variance 256 p (1 - p), known to about sqrt(2/N) of itself.
    assert abs(l0.var() / (256 * p * (1 - p)) - 1) < 5 * np.sqrt(2 / N) * 1.1
    together = (fires[:, :-1] & fires[:, 1:]).sum()  # neighbours in the order of drawing
    expected = N * 255 * p * p
    assert abs(together - expected) < 5 * np.sqrt(expected)
    across = (fires[:-1] & fires[1:]).sum()  # the same feature in consecutive rows
    assert abs(across - (N - 1) * 256 * p * p) < 5 * np.sqrt(expected)


def test_hierarchy_one_child_at_most_and_never_without_its_parent():
    source = Synthetic(kind=Kind.hierarchical)
    _, codes = rows_and_codes(kind=Kind.hierarchical)
    parents = source.parents()
    assert (parents[:32] == -1).all() and (np.bincount(parents[32:]) == 7).all()
    fires = codes > 0
    for parent in range(32):
        children = fires[:, parents == parent]
        assert children.sum(1).max() == 1
        assert not (children.any(1) & ~fires[:, parent]).any()
    n_parents = fires[:, :32].sum()
    share = fires[:, 32:].sum() / n_parents
    assert abs(share - 0.7) < 5 * np.sqrt(0.7 * 0.3 / n_parents)


def test_dense_firing_reaches_every_cell():
    """The gaps between events are one step long when nearly everything fires."""
    _, codes = rows_and_codes(d_in=4, n_features=8, firing_rate=0.99)
    rate = (codes > 0).mean()
    assert abs(rate - 0.99) < 5 * np.sqrt(0.99 * 0.01 / codes.size)


def test_the_first_cell_of_a_block_fires_like_any_other():
    """With one feature, one row a block and no noise, a row is zero exactly where the feature is silent."""
    source = Synthetic(d_in=1, n_features=1, firing_rate=0.5, noise=0.0)
    stream = source.open(n_lanes=100, block_rows=1, lanes=range(100), seed=0, prefetch=0)
    fires = np.stack([next(stream) for _ in range(30)]) != 0
    assert abs(fires.mean() - 0.5) < 5 * 0.5 / np.sqrt(3000)


def test_lanes_blocks_seeds_and_heldout_rows_are_different_draws():
    source = Synthetic(d_in=32, n_features=64, firing_rate=0.1)
    streams = [source.open(n_lanes=4, block_rows=500, lanes=range(4), seed=seed) for seed in (0, 1)]
    blocks = [block for stream in streams for _ in range(3) for block in next(stream)]
    blocks.append(next(source.heldout(500)))
    # Codes are non-negative, so all rows share a mean; without it rows at equal places are uncorrelated.
    centred = np.stack([(block - block.mean(0)).ravel() for block in blocks])
    centred /= np.linalg.norm(centred, axis=1, keepdims=True)
    correlations = (centred @ centred.T)[np.triu_indices(len(blocks), 1)]
    # Rows have an effective dimension of at least 10: a correlation deviates by less than 1/sqrt(500 * 10).
    assert np.abs(correlations).max() < 6 / np.sqrt(500 * 10)


def test_heldout_rows_do_not_depend_on_the_batch():
    source = Synthetic(heldout_rows=3000)
    whole = np.concatenate(list(source.heldout(3000)))
    assert whole.shape == (3000, 64)
    pieces = list(source.heldout(700))
    assert [len(piece) for piece in pieces] == [700, 700, 700, 700, 200]
    np.testing.assert_array_equal(np.concatenate(pieces), whole)
    np.testing.assert_array_equal(np.concatenate(list(source.heldout(999, max_rows=1500))), whole[:1500])


def test_config_is_its_own_fingerprint():
    fingerprint = json.loads(json.dumps(Synthetic(noise=0.2).fingerprint()))
    assert SOURCES[fingerprint.pop("type")] is Synthetic
    fingerprint["kind"] = Kind[fingerprint["kind"]]
    assert Synthetic(**fingerprint) == Synthetic(noise=0.2)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"d_in": 0}, "source.d_in = 0"),
        ({"sites": (8, 0)}, r"source.sites = \[8, 0\]: at least 1"),
        ({"firing_rate": 1.0}, r"source.firing_rate = 1.0: a probability inside \(0, 1\)"),
        ({"child_rate": 1.1}, "source.child_rate = 1.1"),
        ({"amplitude_low": 2.0}, "source.amplitude_low = 2.0, amplitude_high = 1.5"),
        ({"noise": -1.0}, "source.noise = -1.0"),
        ({"kind": Kind.hierarchical, "n_groups": 33}, "source.n_groups = 33"),
    ],
)
def test_impossible_numbers_are_refused(config, message):
    with pytest.raises(UserError, match=message):
        Synthetic(**config)
