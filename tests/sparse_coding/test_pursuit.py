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
    solution = infer(exact.y, exact.dictionary, method="omp", k=K)
    right = [support_of(a) == support_of(b) for a, b in zip(solution.dense(), exact.codes, strict=True)]
    assert sum(right) >= 24
    assert np.asarray(solution.iterations)[right].max() == 2
    np.testing.assert_allclose(np.asarray(solution.dense())[right], exact.codes[right], atol=1e-5)


@pytest.mark.parametrize("method", ["mp", "omp", "gradient_pursuit"])
def test_a_signal_that_no_atom_explains_stays_empty(noisy, method):
    """Every correlation is below 0."""
    solution = infer(-np.abs(noisy.y), np.abs(noisy.dictionary), method=method, k=K)
    assert not solution.dense().any() and int(solution.iterations.max()) == 0


@SIGNS
def test_matching_pursuit_loses_the_energy_it_takes(noisy, nonneg):
    """|r_t|^2 = |r_{t+1}|^2 + (d_j^T r_t)^2, with r_t from one run per length."""
    runs = [infer(noisy.y, noisy.dictionary, method="mp", k=k, nonneg=nonneg) for k in (K - 1, K)]
    before, after = (np.asarray(run.residual_norm) ** 2 for run in runs)
    scores = (noisy.y - np.asarray(runs[0].dense()) @ noisy.dictionary) @ noisy.dictionary.T
    taken = (scores if nonneg else np.abs(scores)).max(axis=1)
    assert taken.min() > 0.005
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


def numpy_gradient_pursuit(y: np.ndarray, dictionary: np.ndarray, k: int, nonneg: bool) -> np.ndarray:
    """One signal, float64, as the paper lists it: i = argmax |g_i|, Gamma = Gamma and i, d_Gamma = g_Gamma, c = D d,
    a = <r, c> / |c|^2, x += a d, r -= a c. Non-negative: argmax g_i, and x clipped at 0."""
    support, code, residual = set(), np.zeros(len(dictionary)), y
    for _ in range(k):
        gradient = dictionary @ residual
        scores = gradient if nonneg else np.abs(gradient)
        if scores.max() <= 0:
            break
        support |= {int(scores.argmax())}
        direction = np.where(np.isin(np.arange(len(dictionary)), list(support)), gradient, 0)
        moved = direction @ dictionary
        code = code + direction * (residual @ moved) / (moved @ moved)
        code = np.maximum(code, 0) if nonneg else code
        residual = y - code @ dictionary
    return code


@SIGNS
def test_gradient_pursuit_equals_the_published_loop_in_float64(noisy, nonneg):
    solution = infer(noisy.y, noisy.dictionary, method="gradient_pursuit", k=K, nonneg=nonneg)
    dictionary = noisy.dictionary.astype(float)
    expected = np.stack([numpy_gradient_pursuit(row, dictionary, K, nonneg) for row in noisy.y.astype(float)])
    np.testing.assert_allclose(solution.dense(), expected, atol=2e-5)
    assert (np.asarray(solution.l0()) < K).any(), "no atom was chosen twice"
    for values, indices in zip(np.asarray(solution.values), np.asarray(solution.indices), strict=True):
        assert len(set(indices[values != 0].tolist())) == np.count_nonzero(values)


def test_gradient_pursuit_may_choose_an_atom_again():
    """Ten steps on three atoms and noise take seven, as an independent run of the published rule found."""
    atoms = np.random.default_rng(0).normal(size=(16, 48))
    atoms /= np.linalg.norm(atoms, axis=0)
    code = np.zeros(48)
    code[[3, 17, 31]] = 1, 0.7, 1.4
    y = atoms @ code + 0.01 * np.random.default_rng(1).normal(size=16)
    found = infer(y[None], atoms.T, method="gradient_pursuit", k=10, nonneg=False)
    assert float(found.residual_norm[0]) == pytest.approx(0.0059868, abs=2e-6)  # float32 residual of a signal of norm 2
    assert int(found.l0()[0]) == 7 and int(found.iterations[0]) == 10


def test_orthogonal_pursuit_finds_the_best_subset_of_orthonormal_atoms():
    """All supports of three of eight atoms tried."""
    rng = np.random.default_rng(3)
    dictionary = np.linalg.qr(rng.normal(size=(8, 8)))[0]
    y = rng.normal(size=(16, 8))
    scores = y @ dictionary.T
    best = np.full(16, np.inf)
    for subset in itertools.combinations(range(8), 3):
        weights = np.maximum(scores[:, subset], 0)
        best = np.minimum(best, np.linalg.norm(y - weights @ dictionary[list(subset)], axis=1))
    np.testing.assert_allclose(infer(y, dictionary, method="omp", k=3).residual_norm, best, rtol=1e-4)


def test_blocks_change_nothing():
    """Rows in blocks of 8, the last one padded; an absent argument stays absent."""

    def body(rows, absent, shared):
        assert absent is None and rows.shape[0] in (7, 27)
        return rows @ shared, jnp.sum(rows, axis=1)

    rows, shared = jnp.arange(27.0 * 4).reshape(27, 4), jnp.arange(12.0).reshape(4, 3)
    whole = row_blocks.over_blocks(body, (rows, None), (shared,), 1)
    cut = row_blocks.over_blocks(body, (rows, None), (shared,), 2**30)
    for a, b in zip(whole, cut, strict=True):
        np.testing.assert_array_equal(a, b)


def test_rows_over_devices_give_the_same_codes(noisy):
    """Eight devices take four rows each."""
    whole = infer(noisy.y, noisy.dictionary, method="mp", k=K)
    with jax.set_mesh(jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))):
        cut = infer(noisy.y, noisy.dictionary, method="mp", k=K)
    assert len(cut.values.sharding.device_set) == 8
    np.testing.assert_array_equal(cut.indices, whole.indices)
    np.testing.assert_allclose(cut.values, whole.values, atol=1e-5)


def test_one_compilation_serves_all_signals(noisy):
    infer(noisy.y, noisy.dictionary, method="omp", k=K)
    before = pursuit.omp._cache_size()
    for scale in (2.0, 3.0):
        infer(scale * noisy.y, -noisy.dictionary, method="omp", k=K, tolerance=scale * 1e-5)
    assert pursuit.omp._cache_size() == before


def test_omp_that_cannot_add_its_best_atom_says_so():
    """Two atoms that float32 cannot tell apart: the row ends with one of them, and is not called converged."""
    twins = np.array([[1.0, 0.0, 0.0], [1.0, 2e-3, 0.0]])
    twins /= np.linalg.norm(twins, axis=1, keepdims=True)
    found = infer(np.array([[1.0, 1.0, 0.0], [2.0, 0.0, 0.0]]), twins, k=2, nonneg=False)
    assert found.converged.tolist() == [False, True] and found.iterations.tolist() == [1, 1]
