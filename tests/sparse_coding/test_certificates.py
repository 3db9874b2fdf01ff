"""What a solver certifies is true: on dictionaries that do not span the space, signals of any scale, and NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax.sparse_coding import METHODS, infer, refit
from saejax.sparse_coding.basis_pursuit import pseudo_inverse
from saejax.sparse_coding.infer import run_method

SIGNS = pytest.mark.parametrize("nonneg", [True, False])
OPTIONS = {"k": 4, "l1_coef": 0.1, "threshold": 0.5}


def unit(rows) -> np.ndarray:
    """Rows at norm 1, as they are where they are 0."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1)


def low_rank() -> np.ndarray:
    """20 atoms that span ten of 20 dimensions."""
    rng = np.random.default_rng(0)
    return unit(rng.normal(size=(20, 10)) @ rng.normal(size=(10, 20)))


def full(n: int = 20) -> np.ndarray:
    """n atoms in 12 dimensions."""
    return unit(np.random.default_rng(1).normal(size=(n, 12)))


SPANS = {
    "rank": low_rank(),
    "twins": np.concatenate([low_rank(), low_rank()[:5]]),
    "mirrored twins": np.concatenate([low_rank(), -low_rank()[:5]]),
    "zeros": np.concatenate([full(), np.zeros((4, 12))]),
    "zeros, few": np.concatenate([full(6), np.zeros((4, 12))]),
    "fewer than d": full(6),
    "one": full(1),
    "square": full(12),
    "nearly dependent": unit(np.concatenate([full(11), full(11)[:1] + 0.03 * full(12)[11:]])),
}


@SIGNS
@pytest.mark.parametrize("name", SPANS)
def test_basis_pursuit_finds_the_least_norm_in_any_span(name, nonneg):
    """Against a linear program. Signals of one, two and three atoms, so that non-negative codes exist."""
    optimize = pytest.importorskip("scipy.optimize")
    dictionary = SPANS[name]
    codes = np.zeros((3, len(dictionary)))
    for row, (chosen, values) in enumerate(
        [([0], [2.0]), ([0, -1], [1.0, 0.5]), ([0, len(codes.T) // 2, -1], [1.0] * 3)]
    ):
        codes[row, chosen] += values
    y = codes @ dictionary
    solution = run_method(jnp.float32(y), jnp.float32(dictionary), "basis_pursuit", nonneg, 1e-5, {})
    assert bool(solution.converged.all()) and float(solution.gap.max()) <= 1e-5
    atoms = dictionary.T if nonneg else np.hstack([dictionary.T, -dictionary.T])
    for found, signal in zip(np.asarray(solution.latents, float), y, strict=True):
        program = optimize.linprog(np.ones(atoms.shape[1]), A_eq=atoms, b_eq=signal, bounds=(0, None), method="highs")
        assert np.abs(found).sum() == pytest.approx(program.fun, rel=2e-4)  # as in full dictionaries: 1e-5 of the gap
        assert np.linalg.norm(found @ dictionary - signal) <= 1e-3 * np.linalg.norm(signal)


@SIGNS
def test_a_dictionary_of_half_the_rank_has_its_exact_code(nonneg):
    dictionary = low_rank()
    solution = infer(dictionary[3:4] + 0.5 * dictionary[7:8], dictionary, method="basis_pursuit", nonneg=nonneg)
    assert float(jnp.abs(solution.latents).sum()) == pytest.approx(1.5, abs=1e-4)
    assert float(solution.residual_norm[0]) < 1e-4 and bool(solution.converged[0])


@SIGNS
@pytest.mark.parametrize("name", ["rank", "twins", "fewer than d", "one"])
def test_a_signal_outside_the_span_is_not_called_solved(name, nonneg):
    """Its residual is the distance to the span, its gap infinite; a signal inside, in the same call, is solved."""
    dictionary = SPANS[name]
    inside = dictionary[0]
    basis = np.linalg.svd(dictionary)[2][: np.linalg.matrix_rank(dictionary)]
    outside = np.random.default_rng(2).normal(size=dictionary.shape[1])
    outside -= basis.T @ (basis @ outside)
    y = np.stack([inside, inside + outside, outside])
    solution = infer(y, dictionary, method="basis_pursuit", nonneg=nonneg, tolerance=1e-4)
    assert solution.converged.tolist() == [True, False, False]
    assert np.isinf(solution.gap).tolist() == [False, True, True]
    distance = np.linalg.norm(outside)
    np.testing.assert_allclose(solution.residual_norm[1:], distance, rtol=1e-3)


@pytest.mark.parametrize("name", SPANS)
def test_pseudo_inverse(name):
    """P D P = P and D P D = D, P D and D P symmetric: Penrose's four conditions, to the rounding of 1 / smallest."""
    dictionary = SPANS[name]
    inverse = np.asarray(jax.jit(pseudo_inverse)(jnp.float32(dictionary)), float)
    values = np.linalg.svd(dictionary)[1]
    condition = values[0] / values[np.linalg.matrix_rank(dictionary) - 1]
    atol = 20 * np.finfo(np.float32).eps * condition
    np.testing.assert_allclose(dictionary @ inverse @ dictionary, dictionary, atol=atol)
    np.testing.assert_allclose(dictionary @ inverse, (dictionary @ inverse).T, atol=atol)
    np.testing.assert_allclose(inverse @ dictionary, (inverse @ dictionary).T, atol=atol)
    np.testing.assert_allclose(inverse @ dictionary @ inverse, inverse, atol=atol * np.abs(inverse).max())


@SIGNS
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nothing_certifies_a_signal_that_is_not_finite(noisy, method, nonneg, bad):
    """Under a trace, where values cannot be refused: that row did not converge, the others did as without it."""
    needs = METHODS[method].needs
    options = {needs: OPTIONS[needs]} if needs else {}
    y = noisy.y[:4].copy()

    @jax.jit
    def solve(rows):
        return infer(rows, noisy.dictionary, method=method, nonneg=nonneg, **options)

    spoilt = y.copy()
    spoilt[1, 3] = bad
    clean, found = solve(y), solve(spoilt)
    assert found.converged.tolist() == [True, False, True, True] and bool(clean.converged.all())
    np.testing.assert_allclose(found.dense()[jnp.array([0, 2, 3])], clean.dense()[jnp.array([0, 2, 3])], atol=1e-6)


@SIGNS
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [2.0**-80, 2.0**80])
def test_codes_scale_with_their_signals(noisy, exact, method, nonneg, scale):
    """By a power of two, whose square float32 does not hold: the same code, times that, and the same account."""
    needs = METHODS[method].needs
    options = {needs: OPTIONS[needs]} if needs else {}
    scaled = {name: value if name == "k" else value * scale for name, value in options.items()}
    problem = exact if method == "basis_pursuit" else noisy
    plain = infer(problem.y, problem.dictionary, method=method, nonneg=nonneg, **options)
    moved = infer(problem.y * np.float32(scale), problem.dictionary, method=method, nonneg=nonneg, **scaled)
    assert moved.converged.tolist() == plain.converged.tolist() and bool(plain.converged.all())
    # Iterations stop at a gap of 1e-5; where momentum starts anew may differ.
    atol = 2e-2 if method in ("ista", "fista") else 1e-4
    np.testing.assert_allclose(np.asarray(moved.dense()) / np.float32(scale), plain.dense(), atol=atol)
    np.testing.assert_allclose(np.asarray(moved.residual_norm) / np.float32(scale), plain.residual_norm, atol=atol)


@SIGNS
@pytest.mark.parametrize("count", [2, 3, 5])
def test_refit_of_atoms_that_depend_on_each_other_is_flagged(count, nonneg):
    """The last atom is a sum of the others up to rounding, with weights of both signs: no weights are the only ones."""
    rng = np.random.default_rng(count)
    free = rng.normal(size=(count, 9))
    atoms = unit(np.concatenate([free, (np.arange(1, count + 1) * free.T).sum(axis=1)[None]]))
    y = rng.normal(size=(1, 9)) + 3 * atoms.sum(axis=0)
    given = infer(y, atoms, method="top_k", k=count + 1, nonneg=False)
    assert int(given.l0()[0]) == count + 1
    fitted = refit(y, atoms, given, nonneg=nonneg)
    if not nonneg:  # else the bound may leave out an atom, and with it the doubt
        assert not fitted.converged.any()
        np.testing.assert_array_equal(fitted.dense(), given.dense())
    if bool(fitted.converged[0]):
        correlation = (y - np.asarray(fitted.dense(), float) @ atoms) @ atoms.T
        assert correlation.max() < 1e-4
