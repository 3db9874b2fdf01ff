"""The door: what it refuses, one-step codes, refitting, and solvers in place of an SAE's encoder."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax.errors import UserError
from saejax.sae import L1, SAE, AbsTopK, TopK
from saejax.sparse_coding import METHODS, Solution, encode, infer, inference_time, pursuit, refit

EYE, Y = np.eye(4), np.ones((2, 4))
OPTIONS = {"k": 16, "l1_coef": 0.1, "threshold": 0.5}
ZERO_ROW = EYE * np.array([[1], [1], [0], [1]])

BAD = [
    ("dictionary", dict(dictionary=2 * EYE)),
    ("dictionary", dict(dictionary=EYE * (1 + 2e-3))),
    ("dictionary", dict(dictionary=ZERO_ROW)),
    ("dictionary", dict(dictionary=EYE * np.nan)),
    ("dictionary", dict(dictionary=EYE[0])),
    ("dictionary", dict(dictionary=EYE[:0])),
    ("dictionary", dict(dictionary=EYE * 1j)),
    ("y", dict(y=Y * np.nan)),
    ("y", dict(y=Y * np.inf)),
    ("y", dict(y=Y[:0])),
    ("y", dict(y=Y[0])),
    ("y", dict(y=Y[:, :3])),
    ("k", dict(k=None)),
    ("k", dict(k=0)),
    ("k", dict(k=1.5)),
    ("k", dict(k=5, method="top_k")),
    ("k", dict(k=5, dictionary=np.vstack([EYE, EYE]), method="omp")),
    *(("k", dict(k=2**31, method=m)) for m in ("top_k", "mp", "omp", "gradient_pursuit")),
    ("k", dict(l1_coef=0.1, method="fista")),
    ("l1_coef", dict(l1_coef=0.1)),
    ("l1_coef", dict(k=None, method="ista")),
    ("l1_coef", dict(k=None, l1_coef=-1.0, method="fista")),
    ("l1_coef", dict(k=None, l1_coef=np.nan, method="fista")),
    ("threshold", dict(k=None, method="threshold")),
    ("threshold", dict(k=None, threshold=-0.1, method="threshold")),
    ("warm_start", dict(warm_start=Y)),
    ("warm_start", dict(k=None, l1_coef=0.1, warm_start=Y[:, :3], method="fista")),
    ("warm_start", dict(k=None, l1_coef=0.1, warm_start=Y * np.nan, method="fista")),
    ("l1_coef", dict(k=None, l1_coef="much", method="fista")),
    ("max_iterations", dict(k=None, l1_coef=0.1, max_iterations=0, method="fista")),
    ("tolerance", dict(tolerance=0.0)),
    ("tolerance", dict(tolerance=None)),
    ("bias", dict(bias=np.ones(3))),
    ("bias", dict(bias=np.full(4, np.inf))),
    ("method", dict(method="magic")),
]


@pytest.mark.parametrize(("name", "change"), BAD)
def test_bad_input_is_named(name, change):
    arguments = dict(y=Y, dictionary=EYE, k=2) | change
    y, dictionary = arguments.pop("y"), arguments.pop("dictionary")
    with pytest.raises(UserError, match=rf"^{name} ") as error:
        infer(y, dictionary, **arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_the_contract(method, noisy):
    """Shapes, dtypes, a truthful residual, no negative code, a row of zeros, a bias."""
    needs = METHODS[method].needs
    options = {needs: OPTIONS[needs]} if needs else {}
    y = noisy.y.copy()
    y[3] = 0
    bias = np.linspace(-1, 1, y.shape[1]).astype(np.float32)
    solution = infer(y + bias, noisy.dictionary, method=method, bias=bias, **options)
    codes = np.asarray(solution.dense())
    assert codes.shape == (32, 96) and codes.dtype == np.float32 and codes.min() >= 0
    assert [a.shape for a in (solution.residual_norm, solution.iterations, solution.converged, solution.gap)] == [
        (32,)
    ] * 4
    np.testing.assert_allclose(solution.residual_norm, np.linalg.norm(y - codes @ noisy.dictionary, axis=1), atol=1e-4)
    assert np.abs(codes[3]).max() < 1e-5 and np.abs(codes).max() > 0.1


@pytest.mark.parametrize(("method", "k"), [("top_k", 24), ("mp", 24), ("mp", 100), ("gradient_pursuit", 100)])
def test_k_may_exceed_the_dimensions_where_no_independent_atoms_are_needed(method, k):
    """Of 12 dimensions and 30 atoms; steps may even outnumber the atoms. What is reported is what the code leaves."""
    rng = np.random.default_rng(0)
    dictionary = rng.normal(size=(30, 12))
    dictionary /= np.linalg.norm(dictionary, axis=1, keepdims=True)
    y = rng.normal(size=(5, 12))
    found = infer(y, dictionary, method=method, k=k, nonneg=False, tolerance=1e-7)
    left = np.linalg.norm(y - np.asarray(found.dense(), float) @ dictionary, axis=1)
    np.testing.assert_allclose(found.residual_norm, left, atol=2e-5)
    assert found.values.shape == (5, min(k, 30)) and int(found.l0().max()) > 12


def test_infer_works_under_jit(noisy):
    traced = jax.jit(lambda y: infer(y, noisy.dictionary, method="top_k", k=16).dense())(noisy.y)
    np.testing.assert_allclose(traced, infer(noisy.y, noisy.dictionary, method="top_k", k=16).dense(), atol=1e-5)


def test_one_step_codes():
    y, dictionary = np.array([[3.0, -2.0, 1.0]]), np.eye(3)
    found = {nonneg: infer(y, dictionary, method="threshold", threshold=1.5, nonneg=nonneg) for nonneg in (True, False)}
    assert found[True].dense().tolist() == [[3, 0, 0]] and found[False].dense().tolist() == [[3, -2, 0]]
    assert infer(y, dictionary, method="top_k", k=3).dense().tolist() == [[3, 0, 1]]
    assert infer(y, dictionary, method="top_k", k=2, nonneg=False).dense().tolist() == [[3, -2, 0]]


@pytest.mark.parametrize("nonneg", [True, False])
def test_refit_is_least_squares_on_the_support(noisy, nonneg):
    """A k-sparse solution whose signs need not fit, and a dense one."""
    optimize = pytest.importorskip("scipy.optimize")
    options = dict(method="top_k", k=16, nonneg=False) if nonneg else dict(method="fista", l1_coef=0.1)
    solution = infer(noisy.y, noisy.dictionary, **options)
    fitted = refit(noisy.y, noisy.dictionary, solution, nonneg=nonneg)
    bounded = 0
    for y, old, new in zip(noisy.y, np.asarray(solution.dense()), np.asarray(fitted.dense()), strict=True):
        support = np.flatnonzero(old)
        atoms = noisy.dictionary[support].T.astype(float)
        expected = optimize.nnls(atoms, y)[0] if nonneg else np.linalg.lstsq(atoms, y)[0]
        bounded += np.sum(expected == 0)
        np.testing.assert_allclose(new[support], expected, atol=5e-5)
        assert np.abs(np.delete(new, support)).max() == 0
    assert bool(fitted.converged.all()) and (bounded > 0) == nonneg


def test_refit_refuses_more_atoms_than_dimensions(noisy):
    full = infer(noisy.y, noisy.dictionary, method="threshold", threshold=0.0, nonneg=False)
    with pytest.raises(UserError, match="^solution must have at most d=32"):
        refit(noisy.y, noisy.dictionary, full)


@pytest.mark.parametrize(
    ("name", "y", "dictionary"),
    [("y", Y * np.nan, EYE), ("y", Y[:, :3], EYE), ("solution", Y[:1], EYE), ("solution", Y, EYE[:3])],
)
def test_refit_names_what_does_not_fit(name, y, dictionary):
    solution = infer(Y, EYE, k=np.int64(2))  # whole numbers of NumPy are whole numbers
    with pytest.raises(UserError, match=rf"^{name} must"):
        refit(y, dictionary, solution)


@pytest.fixture(scope="module")
def sae(noisy) -> SAE:
    """A TopK SAE whose decoder is the true dictionary at other norms, with a bias and one dead row."""
    config = TopK(d_in=32, d_sae=96, k=16)
    norms = np.linspace(0.5, 2, 96, dtype=np.float32)
    norms[7] = 0
    W_dec = noisy.dictionary * norms[:, None]
    params = dataclasses.replace(config.init(jax.random.key(0)), W_dec=jnp.asarray(W_dec), b_dec=jnp.full(32, 0.3))
    return SAE(config, dataclasses.replace(params, W_enc=params.W_dec.T))


def test_encode_gives_latents_that_decode(sae, noisy):
    """Same codes as the solver on unit atoms, in the decoder's norms; leading dimensions stay."""
    x = (noisy.y + 0.3).reshape(4, 8, 32)
    latents = encode(sae, x)
    assert latents.shape == (4, 8, 96) and int(jnp.max(jnp.sum(latents > 0, axis=-1))) <= 16
    assert not latents[..., 7].any()
    without = noisy.dictionary * (np.arange(96) != 7)[:, None]
    direct = pursuit.omp(jnp.asarray(noisy.y), jnp.asarray(without), 16, nonneg=True, tolerance=1e-5)
    np.testing.assert_allclose(
        jnp.linalg.norm(sae.decode(latents) - x, axis=-1).reshape(-1), direct.residual_norm, atol=1e-5
    )
    errors = [float(jnp.mean((sae.decode(z) - x) ** 2)) for z in (latents, sae.encode(x))]
    assert errors[0] < 0.5 * errors[1]


def test_encode_warms_and_warns(sae, noisy):
    """Convex methods start from the encoder; a run that is cut short is not silent."""
    x = noisy.y + 0.3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = encode(sae, x, method="fista", l1_coef=0.1)
    with pytest.warns(RuntimeWarning, match="fista: 32 of 32 rows did not converge"):
        encode(sae, x, method="fista", l1_coef=0.1, max_iterations=1)
    cold = inference_time.solve(sae, x, method="fista", l1_coef=0.1, warm_start=False)
    assert isinstance(cold, Solution) and bool(cold.converged.all())
    np.testing.assert_allclose(cold.dense(), whole, atol=2e-2)


def test_encode_asks_for_what_the_sae_does_not_have(noisy):
    config = L1(d_in=32, d_sae=96)
    plain = SAE(config, config.init(jax.random.key(0)))
    with pytest.raises(UserError, match="^k must be given"):
        encode(plain, noisy.y)
    with pytest.raises(UserError, match="^x must have d_in=32"):
        encode(plain, noisy.y[:, :5], k=3)


def test_encode_takes_the_sign_of_the_sae(noisy):
    """Latents of an SAE whose own may be negative are so too, unless asked otherwise."""
    config = AbsTopK(d_in=32, d_sae=96, k=16)
    signed = SAE(config, config.init(jax.random.key(0)))
    assert float(encode(signed, noisy.y).min()) < 0 <= float(encode(signed, noisy.y, nonneg=True).min())


def test_refit_of_dependent_atoms_is_flagged():
    """The same atom twice: no unique weights, the row stays as it was."""
    twice = np.eye(3)[[0, 0, 1]]
    given = infer(np.ones((1, 3)), twice, method="top_k", k=3)
    fitted = refit(np.ones((1, 3)), twice, given, nonneg=False)
    assert not fitted.converged.any()
    np.testing.assert_array_equal(fitted.dense(), given.dense())
