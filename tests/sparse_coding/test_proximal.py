"""ISTA and FISTA against optimality conditions, closed forms, scikit-learn; basis pursuit against linear programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax.sparse_coding import infer, proximal, working_set

SIGNS = pytest.mark.parametrize("nonneg", [True, False])
L1 = 0.1
TIGHT = 2e-6  # float32 reaches 1e-6 on these problems


def objective(problem, codes) -> np.ndarray:
    """The Lasso in float64."""
    codes = np.asarray(codes, float)
    return 0.5 * np.sum((problem.y - codes @ problem.dictionary) ** 2, axis=1) + L1 * np.abs(codes).sum(axis=1)


@SIGNS
@pytest.mark.parametrize("method", ["ista", "fista"])
def test_optimality_conditions(noisy, method, nonneg):
    """|d_j^T r| <= l1 everywhere, equal to l1 sign(z_j) on the support."""
    solution = infer(noisy.y, noisy.dictionary, method=method, l1_coef=L1, nonneg=nonneg, tolerance=TIGHT)
    assert bool(solution.converged.all()) and float(solution.gap.max()) <= TIGHT
    codes = np.asarray(solution.latents, float)
    correlation = (noisy.y - codes @ noisy.dictionary) @ noisy.dictionary.T
    # A gap g bounds the squared distance of the residual from the dual optimum by 2 g.
    slack = 2 * np.sqrt(2 * TIGHT * 0.5 * np.sum(noisy.y**2, axis=1)).max()
    assert (correlation if nonneg else np.abs(correlation)).max() <= L1 + slack
    clear = np.abs(codes) > 1e-3
    np.testing.assert_allclose(correlation[clear], L1 * np.sign(codes[clear]), atol=slack)
    assert not nonneg or codes.min() >= 0


@SIGNS
def test_equals_scikit_learn(noisy, nonneg):
    """Its objective is divided by the number of rows of the design, d."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    d = noisy.y.shape[1]
    lasso = linear_model.Lasso(alpha=L1 / d, fit_intercept=False, positive=nonneg, tol=1e-8, max_iter=100_000)
    expected = lasso.fit(noisy.dictionary.T.astype(float), noisy.y.T.astype(float)).coef_
    solution = infer(noisy.y, noisy.dictionary, method="fista", l1_coef=L1, nonneg=nonneg, tolerance=TIGHT)
    np.testing.assert_allclose(objective(noisy, solution.latents), objective(noisy, expected), rtol=5e-5)
    np.testing.assert_allclose(solution.latents, expected, atol=1e-2)


@SIGNS
def test_the_gap_bounds_the_distance_from_the_optimum(noisy, nonneg):
    """Stopped after 5 steps: the reported gap is at least the true one, and `converged` says no."""
    best = infer(noisy.y, noisy.dictionary, method="fista", l1_coef=L1, nonneg=nonneg, tolerance=TIGHT)
    early = infer(noisy.y, noisy.dictionary, method="fista", l1_coef=L1, nonneg=nonneg, max_iterations=5)
    true = (objective(noisy, early.latents) - objective(noisy, best.latents)) / (0.5 * np.sum(noisy.y**2, axis=1))
    assert (np.asarray(early.gap) >= true - 1e-6).all() and true.min() > 0
    assert not early.converged.any() and (np.asarray(early.iterations) == 5).all()


@pytest.mark.parametrize(("method", "nonneg"), [("ista", True), ("fista", False)])
def test_orthonormal_dictionary_is_a_soft_threshold(method, nonneg):
    rng = np.random.default_rng(0)
    dictionary = np.linalg.qr(rng.normal(size=(16, 16)))[0]
    y = rng.normal(size=(8, 16)).astype(np.float32)
    scores = y @ dictionary.T
    expected = np.maximum(scores - 0.3, 0) if nonneg else np.sign(scores) * np.maximum(np.abs(scores) - 0.3, 0)
    codes = infer(y, dictionary, method=method, l1_coef=0.3, nonneg=nonneg, tolerance=TIGHT).latents
    # The l1 ball is met up to the gap: strong convexity gives |z - z*|^2 <= 2 gap.
    np.testing.assert_allclose(codes, expected, atol=np.sqrt(2 * TIGHT * 0.5 * np.sum(y**2, axis=1).max()))


def test_a_large_penalty_gives_zero_at_once(noisy):
    l1_coef = float(np.abs(noisy.y @ noisy.dictionary.T).max()) * 1.001
    solution = infer(noisy.y, noisy.dictionary, method="fista", l1_coef=l1_coef)
    assert not solution.latents.any() and bool(solution.converged.all())


def test_warm_start_from_the_solution_takes_no_step(noisy):
    cold = infer(noisy.y, noisy.dictionary, method="fista", l1_coef=L1, tolerance=TIGHT)
    warm = infer(noisy.y, noisy.dictionary, method="fista", l1_coef=L1, tolerance=2 * TIGHT, warm_start=cold)
    assert int(cold.iterations.min()) > 0 and int(warm.iterations.max()) == 0
    np.testing.assert_array_equal(warm.latents, cold.latents)


def test_step_size_is_safe():
    """Flat spectra are the hard case of power iteration: the estimate must not fall below the truth."""
    rng = np.random.default_rng(1)
    for n, d in ((300, 100), (100, 100)):
        dictionary = rng.normal(size=(n, d))
        true = np.linalg.norm(dictionary, 2) ** 2
        assert true <= float(jax.jit(proximal.lipschitz)(jnp.asarray(dictionary, jnp.float32))) <= 1.02 * true


@SIGNS
def test_basis_pursuit_solves_the_linear_program(exact, nonneg):
    optimize = pytest.importorskip("scipy.optimize")
    dictionary = exact.dictionary.astype(float)
    n = len(dictionary)
    atoms = dictionary.T if nonneg else np.hstack([dictionary.T, -dictionary.T])
    solution = infer(exact.y, exact.dictionary, method="basis_pursuit", nonneg=nonneg)
    assert bool(solution.converged.all())
    for code, y in zip(np.asarray(solution.latents)[:8], exact.y[:8].astype(float), strict=True):
        program = optimize.linprog(np.ones(atoms.shape[1]), A_eq=atoms, b_eq=y, bounds=(0, None), method="highs")
        expected = program.x if nonneg else program.x[:n] - program.x[n:]
        assert abs(np.abs(code).sum() - program.fun) <= 2e-4 * program.fun
        np.testing.assert_allclose(code, expected, atol=1e-3)
    assert not nonneg or float(solution.latents.min()) >= 0


def test_basis_pursuit_says_that_it_failed(noisy):
    """Out of steps; and constraints that no code meets, from atoms that span a plane only."""
    assert not infer(noisy.y, noisy.dictionary, method="basis_pursuit", max_iterations=10).converged.any()
    flat = np.eye(3)[[0, 1, 0, 1]]
    solution = infer(np.ones((1, 3)), flat, method="basis_pursuit", max_iterations=500)
    assert not solution.converged.any() and float(solution.residual_norm[0]) == pytest.approx(1, abs=1e-2)


@SIGNS
@pytest.mark.parametrize(("l1_coef", "fits"), [(0.7, True), (0.1, False)])
def test_working_sets_change_the_way_not_the_result(nonneg, l1_coef, fits):
    """512 atoms in 32 dimensions, working sets of 16: enough for a large penalty, too few for a small one."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(0)
    dictionary = rng.normal(size=(512, 32))
    dictionary /= np.linalg.norm(dictionary, axis=1, keepdims=True)
    y = rng.normal(size=(6, 32)) / 3
    assert working_set.size(*dictionary.shape) == 16
    lasso = linear_model.Lasso(alpha=l1_coef / 32, fit_intercept=False, positive=nonneg, tol=1e-7, max_iter=100_000)
    expected = lasso.fit(dictionary.T, y.T).coef_
    assert ((np.count_nonzero(expected, axis=1) <= 16).all()) == fits
    solution = infer(y, dictionary, method="fista", l1_coef=l1_coef, nonneg=nonneg)
    assert bool(solution.converged.all())
    assert (np.asarray(solution.iterations).max() <= 8 * working_set.STEPS) or not fits
    values = [
        0.5 * np.sum((y - code @ dictionary) ** 2, axis=1) + l1_coef * np.abs(code).sum(axis=1)
        for code in (np.asarray(solution.latents, float), expected)
    ]
    np.testing.assert_array_less(values[0] - values[1], 1.1e-5 * 0.5 * np.sum(y**2, axis=1))
