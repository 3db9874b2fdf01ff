"""Subsets: every set equally likely, no repeats, rows that do not depend on their number."""

import itertools
import math

import jax
import numpy as np
import pytest

from saejax.errors import UserError
from saejax.lab.codes import subsets


@pytest.mark.parametrize("n_atoms, k", [(5, 2), (4, 3), (6, 1)])
def test_every_subset_is_equally_likely(n_atoms, k):
    draws = 20_000
    rows = np.asarray(subsets.sample(jax.random.key(0), n_atoms, k, draws))
    every = list(itertools.combinations(range(n_atoms), k))
    found, counts = np.unique(rows, axis=0, return_counts=True)
    assert [tuple(row) for row in found] == every
    expected = draws / len(every)
    chi_square = ((counts - expected) ** 2 / expected).sum()
    freedom = len(every) - 1
    # Wilson-Hilferty upper quantile of chi-square at z = 4: exceeded by a uniform sampler 3 times in 100,000.
    bound = freedom * (1 - 2 / (9 * freedom) + 4 * math.sqrt(2 / (9 * freedom))) ** 3
    assert chi_square < bound


def test_floyd_without_its_repair_would_be_caught():
    """The statistic above tells a sampler that favours some sets: a repeat moved to its neighbour is not uniform."""
    rng = np.random.default_rng(0)
    draws = rng.integers(0, [4, 5], size=(20_000, 2))
    draws[:, 1] = np.where(draws[:, 0] == draws[:, 1], (draws[:, 1] + 1) % 5, draws[:, 1])
    _, counts = np.unique(np.sort(draws, axis=1), axis=0, return_counts=True)
    assert ((counts - 2000) ** 2 / 2000).sum() > 40


def test_rows_are_sets_and_do_not_depend_on_how_many_are_drawn():
    few = np.asarray(subsets.sample(jax.random.key(3), 2**20, 256, 2))
    more = np.asarray(subsets.sample(jax.random.key(3), 2**20, 256, 5))
    np.testing.assert_array_equal(few, more[:2])
    assert (np.diff(more, axis=1) > 0).all() and more.min() >= 0 and more.max() < 2**20


def test_indicator_has_k_ones_at_the_subset():
    rows = subsets.sample(jax.random.key(1), 9, 3, 4)
    code = np.asarray(subsets.indicator(rows, 9))
    np.testing.assert_array_equal([np.flatnonzero(row) for row in code], np.asarray(rows))


@pytest.mark.parametrize(
    "sizes, named",
    [((5, 6, 1), "k = 6"), ((0, 1, 1), "n_atoms = 0"), ((5, 2, 0), "b = 0"), ((2**31, 2, 1), "n_atoms = 2147483648")],
)
def test_bad_sizes_are_named(sizes, named):
    with pytest.raises(UserError, match=named):
        subsets.sample(jax.random.key(0), *sizes)
