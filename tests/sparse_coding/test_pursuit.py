"""Greedy pursuits against independent NumPy loops, scikit-learn, and the invariants of each method."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax.sparse_coding import infer, pursuit, row_blocks

K = 16  # many enough that some weights of a non-negative fit end at 0
SIGNS = pytest.mark.parametrize("nonneg", [True, False])


def support_of(row: np.ndarray) -> set[int]:
    """Indices of the entries that are not 0."""
    return set(np.flatnonzero(row).tolist())


def numpy_omp(y: np.ndarray, dictionary: np.ndarray, k: int, nonneg: bool) -> np.ndarray:
    """One signal, float64, a fresh least-squares problem after each choice."""
    nnls = pytest.importorskip("scipy.optimize").nnls
    chosen, weights, residual = [], np.zeros(0), y
    for _ in range(k):
        scores = dictionary @ residual
        scores = scores if nonneg else np.abs(scores)
        scores[chosen] = -1
        if scores.max() <= 0:
            break
        chosen.append(int(scores.argmax()))
        atoms = dictionary[chosen].T
        weights = nnls(atoms, y)[0] if nonneg else np.linalg.lstsq(atoms, y)[0]
        residual = y - atoms @ weights
    code = np.zeros(len(dictionary))
    code[chosen] = weights
    return code


@SIGNS
def test_omp_equals_a_loop_in_float64(noisy, nonneg):
    solution = infer(noisy.y, noisy.dictionary, method="omp", k=K, nonneg=nonneg)
    y, dictionary = noisy.y.astype(float), noisy.dictionary.astype(float)
    expected = np.stack([numpy_omp(row, dictionary, K, nonneg) for row in y])
    np.testing.assert_allclose(solution.dense(), expected, atol=2e-5)
    assert bool(solution.converged.all())
    if nonneg:
        assert float(solution.values.min()) >= 0
        assert (np.count_nonzero(expected, axis=1) < K).any(), "no signal exercises the bound"


def test_omp_equals_scikit_learn(noisy):
    linear_model = pytest.importorskip("sklearn.linear_model")
    y, dictionary = noisy.y.astype(float), noisy.dictionary.astype(float)
    expected = linear_model.orthogonal_mp_gram(dictionary @ dictionary.T, dictionary @ y.T, n_nonzero_coefs=K).T
    solution = infer(noisy.y, noisy.dictionary, method="omp", k=K, nonneg=False)
    np.testing.assert_allclose(solution.dense(), expected, atol=2e-5)


@SIGNS
def test_omp_leaves_nothing_on_its_support_and_never_chooses_twice(noisy, nonneg):
    """The normal equations hold on the atoms in use."""
    solution = infer(noisy.y, noisy.dictionary, method="omp", k=K, nonneg=nonneg)
    codes = np.asarray(solution.dense(), float)
    residual = noisy.y - codes @ noisy.dictionary
    correlation = np.abs(residual @ noisy.dictionary.T)
    assert correlation[codes != 0].max() <= 1e-5
    np.testing.assert_allclose(solution.residual_norm, np.linalg.norm(residual, axis=1), atol=1e-5)
    for values, indices in zip(np.asarray(solution.values), np.asarray(solution.indices), strict=True):
        used = indices[values != 0]
        assert len(set(used.tolist())) == len(used)


def test_omp_stops_when_the_signal_is_explained(exact):
    solution = infer(exact.y, exact.dictionary, method="omp", k=16)
    right = [support_of(a) == support_of(b) for a, b in zip(solution.dense(), exact.codes, strict=True)]
    assert sum(right) >= 6
    assert np.asarray(solution.iterations)[right].max() == 3
    np.testing.assert_allclose(np.asarray(solution.dense())[right], exact.codes[right], atol=1e-5)


def test_a_signal_that_no_atom_explains_stays_empty():
    """Non-negative codes of minus an atom of an orthonormal dictionary: no correlation is above 0."""
    for method in ("mp", "omp", "gradient_pursuit"):
        solution = infer(-np.eye(4)[:1] - np.eye(4)[1:2], np.eye(4), method=method, k=3)
        assert not solution.dense().any() and int(solution.iterations[0]) == 0, method


@SIGNS
def test_matching_pursuit_loses_the_energy_it_takes(noisy, nonneg):
    """|r_t|^2 = |r_{t+1}|^2 + (d_j^T r_t)^2, with r_t from one run per length."""
    runs = [infer(noisy.y, noisy.dictionary, method="mp", k=k, nonneg=nonneg) for k in (8, 9)]
    before, after = (np.asarray(run.residual_norm) ** 2 for run in runs)
    scores = (noisy.y - np.asarray(runs[0].dense()) @ noisy.dictionary) @ noisy.dictionary.T
    taken = (scores if nonneg else np.abs(scores)).max(axis=1)
    assert taken.min() > 0.01
    np.testing.assert_allclose(before - after, taken**2, atol=1e-5)


def test_matching_pursuit_adds_to_an_atom_it_meets_again():
    """Two atoms at 60 degrees: a zigzag that returns to each, with one slot per atom."""
    dictionary = np.eye(8)
    dictionary[1, :2] = [0.5, 3**0.5 / 2]
    y = np.eye(8)[:1] + np.eye(8)[1:2]
    solution = infer(y, dictionary, method="mp", k=6, nonneg=False)
    used = np.asarray(solution.indices)[np.asarray(solution.values) != 0]
    assert sorted(used.tolist()) == [0, 1] and int(solution.iterations[0]) == 6
    np.testing.assert_allclose(solution.dense()[0], np.linalg.solve(dictionary.T, y[0]), atol=0.5**5)


@SIGNS
def test_gradient_pursuit_takes_the_best_step_along_the_gradient(noisy, nonneg):
    """First step: that of matching pursuit. Signed: every residual is orthogonal to the step that led to it."""
    first = [infer(noisy.y, noisy.dictionary, method=m, k=1, nonneg=nonneg).dense() for m in ("mp", "gradient_pursuit")]
    np.testing.assert_allclose(first[0], first[1], atol=1e-5)
    codes = [infer(noisy.y, noisy.dictionary, method="gradient_pursuit", k=k, nonneg=nonneg).dense() for k in (5, 6)]
    residuals = [noisy.y - np.asarray(code) @ noisy.dictionary for code in codes]
    assert (np.linalg.norm(residuals[1], axis=1) <= np.linalg.norm(residuals[0], axis=1) + 1e-6).mean() > 0.9
    if not nonneg:
        assert np.abs(np.sum((residuals[0] - residuals[1]) * residuals[1], axis=1)).max() < 1e-5


def test_no_pursuit_beats_the_best_subset():
    """Tiny problems, all supports tried; orthogonal pursuit finds the best of them on an easy dictionary."""
    rng = np.random.default_rng(3)
    dictionary = np.linalg.qr(rng.normal(size=(8, 8)))[0]
    y = rng.normal(size=(16, 8))
    scores = y @ dictionary.T
    for nonneg in (True, False):
        best = np.full(16, np.inf)
        for subset in itertools.combinations(range(8), 3):
            weights = np.maximum(scores[:, subset], 0) if nonneg else scores[:, subset]
            best = np.minimum(best, np.linalg.norm(y - weights @ dictionary[list(subset)], axis=1))
        for method in ("top_k", "omp"):
            found = infer(y, dictionary, method=method, k=3, nonneg=nonneg)
            np.testing.assert_allclose(found.residual_norm, best, rtol=1e-4, err_msg=method)


def test_blocks_change_nothing(noisy, monkeypatch):
    """Rows in blocks of 8 with a last block that is padded, against all at once."""
    whole = pursuit.omp(jnp.asarray(noisy.y[:27]), jnp.asarray(noisy.dictionary), 5)
    monkeypatch.setattr(row_blocks, "_CPU_ELEMENTS", 1)
    jax.clear_caches()
    cut = pursuit.omp(jnp.asarray(noisy.y[:27]), jnp.asarray(noisy.dictionary), 5)
    np.testing.assert_array_equal(cut.indices, whole.indices)
    np.testing.assert_allclose(cut.values, whole.values, atol=1e-5)


def test_rows_over_devices_give_the_same_codes(noisy):
    """Eight devices take four rows each."""
    whole = infer(noisy.y, noisy.dictionary, method="omp", k=5)
    with jax.set_mesh(jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))):
        cut = infer(noisy.y, noisy.dictionary, method="omp", k=5)
    np.testing.assert_array_equal(cut.indices, whole.indices)
    np.testing.assert_allclose(cut.values, whole.values, atol=1e-5)


def test_one_compilation_serves_all_signals(noisy):
    before = pursuit.omp._cache_size()
    for scale in (1.0, 2.0, 3.0):
        infer(scale * noisy.y[:5], noisy.dictionary, method="omp", k=4, tolerance=scale * 1e-5)
    assert pursuit.omp._cache_size() == before + 1
