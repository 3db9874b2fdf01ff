"""Dictionary learning finds a known dictionary, its updates are the optimal ones, and bad input is named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax.errors import UserError
from saejax.evals.recovery import dictionary_recovery
from saejax.sparse_coding import learning

N_ATOMS, D = 32, 25


@pytest.fixture(scope="module")
def known():
    """A dictionary of unit rows, and signals of about two of its atoms each with a little noise."""
    rng = np.random.default_rng(3)
    truth = rng.standard_normal((N_ATOMS, D)) * (np.arange(D) < D - 1)  # nothing happens in the last dimension
    truth /= np.linalg.norm(truth, axis=1, keepdims=True)
    codes = (rng.random((12_000, N_ATOMS)) < 2 / N_ATOMS) * rng.uniform(0.5, 1.5, (12_000, N_ATOMS))
    y = codes @ truth + 0.01 * rng.standard_normal((12_000, D)) * (np.arange(D) < D - 1)
    return truth.astype(np.float32), codes, y.astype(np.float32)


def recovery(dictionary, truth) -> float:
    """Mean |cos| of the best one-to-one matching."""
    score = dictionary_recovery(np.asarray(dictionary), truth)["mcc"]
    assert isinstance(score, float)
    return score


@pytest.mark.parametrize("method", learning.METHODS)
def test_finds_the_dictionary_that_made_the_signals(known, method):
    truth, _, y = known
    found = learning.learn(y, N_ATOMS, method=method, l1_coef=0.1, batch=256, n_steps=120)
    assert recovery(found.dictionary, truth) > 0.99  # chance: 0.45
    np.testing.assert_allclose(np.linalg.norm(found.dictionary, axis=1), 1, atol=1e-5)
    assert found.history["objective"].shape == (120,)
    # The codes of the true dictionary, no smaller than optimal, bound what a perfect one would cost on average.
    truth_cost = learning.learn(y, N_ATOMS, l1_coef=0.1, batch=2048, n_steps=1, n_iterations=400, initial=truth)
    assert found.history["objective"][-20:].mean() < 1.02 * truth_cost.history["objective"][0]


def test_signed_codes(known):
    truth, codes, _ = known
    signs = np.random.default_rng(0).choice([-1.0, 1.0], codes.shape)
    y = (codes * signs) @ truth
    found = learning.learn(y, N_ATOMS, l1_coef=0.1, nonneg=False, batch=256, n_steps=120)
    assert recovery(found.dictionary, truth) > 0.99


def test_more_iterations_meet_the_optimality_conditions(known):
    truth, _, y = known
    rough, fine = (
        learning.learn(y, N_ATOMS, l1_coef=0.1, batch=2048, n_steps=1, n_iterations=n, initial=truth).history
        for n in (5, 400)
    )
    assert fine["kkt"][0] < 1e-3 < rough["kkt"][0]
    assert fine["objective"][0] < rough["objective"][0]


def test_one_pass_never_raises_the_surrogate_and_mod_solves_it():
    # With the averages fixed, the cost of a dictionary is tr(A D D^T) / 2 - tr(B D^T).
    rng = np.random.default_rng(0)
    codes, rows = rng.random((64, 6)), rng.standard_normal((64, 9))
    A, B = codes.T @ codes / 64, codes.T @ rows / 64
    start = rng.standard_normal((6, 9))
    start /= np.linalg.norm(start, axis=1, keepdims=True)
    arrays = (jnp.asarray(x, jnp.float32) for x in (start, A, B))
    state = learning._State(*arrays, unused=jnp.zeros(6, jnp.int32))

    def cost(D):
        return np.trace(A @ D @ D.T) / 2 - np.trace(B @ D.T)

    costs = [cost(start)]
    one_pass = jax.jit(learning._one_by_one)
    for _ in range(30):
        state = state._replace(dictionary=one_pass(state))
        costs.append(cost(np.asarray(state.dictionary, np.float64)))
    assert (np.diff(costs) < 1e-6).all()
    assert costs[-1] < costs[0] - 0.1
    # Where it stopped, the gradient has no part across any row: each atom is optimal given the others.
    D = np.asarray(state.dictionary, np.float64)
    gradient = A @ D - B
    across = gradient - np.sum(gradient * D, axis=1, keepdims=True) * D
    assert np.abs(across).max() < 2e-3
    least_squares = np.linalg.solve(A, B)
    least_squares /= np.linalg.norm(least_squares, axis=1, keepdims=True)
    mod = np.asarray(learning._all_at_once(state))
    assert (np.sum(mod * least_squares, axis=1) > 0.999).all()  # a ridge of 1e-4 of the mean use stays


def test_unused_atoms_start_anew(known):
    truth, _, y = known
    lost = truth.copy()
    lost[:4] = np.eye(D)[-1]
    settings = {"l1_coef": 0.1, "batch": 256, "n_steps": 120, "initial": lost, "twin_cos": 1.0}
    found = learning.learn(y, N_ATOMS, **settings, patience=5)
    assert np.flatnonzero(found.history["reseeded"])[0] == 4
    assert recovery(found.dictionary, truth) > 0.99
    kept = learning.learn(y, N_ATOMS, **settings, patience=1000)
    assert kept.history["reseeded"].sum() == 0
    assert recovery(kept.dictionary, truth) < 0.95


def test_the_less_used_of_two_twins_is_given_up():
    atoms = np.eye(4, dtype=np.float32)[[0, 1, 1, 2]] * np.array([1, 1, -1, 1], np.float32)[:, None]
    state = learning._State(
        jnp.asarray(atoms), jnp.diag(jnp.array([1.0, 1.0, 2.0, 3.0])), jnp.zeros((4, 4)), jnp.zeros(4)
    )
    assert learning._twins(state, False, 0.98).tolist() == [False, True, False, False]
    assert learning._twins(state, True, 0.98).tolist() == [False] * 4  # opposite atoms are two without negative codes
    assert learning._twins(state, False, 1.0).tolist() == [False] * 4


def test_agrees_with_scikit_learn(known):
    decomposition = pytest.importorskip("sklearn.decomposition")
    truth, _, y = known
    theirs = decomposition.MiniBatchDictionaryLearning(
        N_ATOMS, alpha=0.1, max_iter=2, batch_size=256, positive_code=True, fit_algorithm="cd", random_state=0,
        transform_algorithm="lasso_cd", max_no_improvement=None, tol=0.0, dict_init=np.array(y[:N_ATOMS], float),
    ).fit(np.array(y[:4000], float))  # fmt: skip
    score = {}
    for name, dictionary in (("theirs", theirs.components_), ("ours", None)):
        if dictionary is None:
            dictionary = learning.learn(y[:4000], N_ATOMS, l1_coef=0.1, batch=256, n_steps=120).dictionary
        one = learning.learn(y, N_ATOMS, l1_coef=0.1, batch=2048, n_steps=1, n_iterations=400, initial=dictionary)
        score[name] = float(one.history["objective"][0])
    assert score["ours"] < 1.03 * score["theirs"]


def test_a_seed_fixes_the_result(known):
    _, _, y = known
    a, b, c = (
        learning.learn(y, N_ATOMS, l1_coef=0.2, batch=256, n_steps=120, seed=seed).dictionary for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)


GOOD = {"y": np.eye(6, 4) + 1, "n_atoms": 3, "l1_coef": 0.1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": np.ones(4)}, "y must be a non-empty matrix"),
        ({"y": np.ones((0, 4))}, "y must be a non-empty matrix"),
        ({"y": np.full((6, 4), np.nan)}, "y must be finite, got 24 entries"),
        ({"n_atoms": 7}, "at least n_atoms=7 rows that are not zero, got 6"),
        ({"y": np.zeros((6, 4))}, "rows that are not zero, got 0"),
        ({"n_atoms": 0}, "n_atoms must be at least 1"),
        ({"method": "ksvd"}, "method must be one of online, mod, got 'ksvd'"),
        ({"l1_coef": 0.0}, "l1_coef must be a finite number above 0"),
        ({"decay": -1.0}, "decay must be"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"twin_cos": 0.0}, "twin_cos must lie in"),
        ({"initial": np.ones((2, 4))}, r"initial must have shape \(3, 4\), got \(2, 4\)"),
        ({"initial": np.zeros((3, 4))}, "initial must have finite rows"),
        ({"y": np.full((6, 4), 1e25)}, "y must be of a size that can be squared in float32, got entries up to 1e[+]25"),
        *(({"l1_coef": bad}, "l1_coef must be") for bad in (np.nan, np.inf, "x", True)),
        *(({"decay": bad}, "decay must be") for bad in (np.nan, np.inf, "x")),
        *(({"twin_cos": bad}, "twin_cos must") for bad in (np.nan, np.inf, "x")),
        *(
            ({name: bad}, f"{name} must be")
            for name in ("n_atoms", "batch", "n_steps", "n_iterations", "patience")
            for bad in (np.nan, 1.5, "x", True, -1, 2**31)
        ),
        *(({"seed": bad}, "seed must be") for bad in (-1, 2**32, np.nan)),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(UserError, match=message):
        learning.learn(**(GOOD | change))
