"""|cos| in blocks and the best matching, against all permutations."""

import itertools

import numpy as np
import pytest

from saejax.errors import UserError
from saejax.evals import matching
from saejax.lab.metrics import absorption, additivity, normaliser
from saejax.lab.metrics.over import over


def test_blocks_do_not_show():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((23, 6)), 7 * rng.standard_normal((17, 6))
    a[4] = 0
    wanted = np.abs(a @ b.T) / np.maximum(np.outer(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)), 1e-9)
    for block in (1, 5, 100):
        np.testing.assert_allclose(matching.abs_cos(a, b, block=block), wanted, atol=3e-7)
    assert matching.abs_cos(a, a).max() <= 1.0


@pytest.mark.parametrize("shape", [(5, 5), (6, 4), (4, 6)])
def test_the_matching_is_the_best_of_all(shape):
    similarity = np.random.default_rng(1).random(shape).astype(np.float32)
    match = matching.matched(similarity)
    found = np.flatnonzero(match >= 0)
    assert len(found) == min(shape) == len(set(match[found]))
    wide = similarity if shape[0] >= shape[1] else similarity.T
    best = max(
        sum(float(wide[r, c]) for c, r in enumerate(rows))
        for rows in itertools.permutations(range(len(wide)), wide.shape[1])
    )
    assert similarity[match[found], found].sum() == pytest.approx(best, rel=1e-6)
    assert matching.matched_mean(similarity) == pytest.approx(best / min(shape), rel=1e-6)


def test_the_similarity_is_left_as_it_was():
    similarity = np.random.default_rng(2).random((4, 4))
    before = similarity.copy()
    matching.matched(similarity)
    np.testing.assert_array_equal(similarity, before)


def test_bad_dictionaries_are_named():
    with pytest.raises(UserError, match="same width, got 3 and 4"):
        matching.abs_cos(np.eye(3), np.eye(4))
    with pytest.raises(UserError, match="b must be finite"):
        matching.abs_cos(np.eye(3), np.full((2, 3), np.nan))
    with pytest.raises(UserError, match=r"a must be \[n, d\]"):
        matching.abs_cos(np.zeros((0, 3)), np.eye(3))


@pytest.mark.parametrize(
    ("batch", "options", "named"),
    [
        (dict(x=np.ones((3, 4)), returned=np.ones((3, 1))), {}, "x and returned must have the same width"),
        (dict(x=np.ones((3, 4)), returned=np.full((3, 4), np.nan)), {}, "returned must be finite"),
        (dict(x=np.ones((3, 4)), returned=np.ones((3, 4))), {"rows": 0}, "rows must be at least 1"),
        (dict(x=np.ones((0, 4)), returned=np.ones((0, 4))), {}, "no rows"),
    ],
)
def test_arrays_that_a_metric_cannot_take_are_named(batch, options, named):
    with pytest.raises(UserError, match=named):
        over(normaliser.RoundTrip(), normaliser.RoundTripBatch(**batch), **options)


def test_misfits_inside_a_metric_name_the_arrays():
    """A probe of another width than the activations, and a blank that is not finite."""
    batch = absorption.ProbeBatch(
        x=np.ones((3, 4)), latents=np.ones((3, 2)), W_dec=np.ones((2, 4)), probe=np.ones(5), main=np.zeros(2, bool)
    )
    with pytest.raises(UserError, match=r"arrays of probe_absorption must fit each other, .*'probe': \[\[5\]\]"):
        over(absorption.ProbeAbsorption(), batch)
    with pytest.raises(UserError, match="f_blank must be finite"):
        additivity.additivity(*[np.ones((3, 4))] * 3, np.full(4, np.nan))
