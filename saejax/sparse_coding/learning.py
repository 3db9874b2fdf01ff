r"""Dictionary learning: alternates sparse codes of a batch (FISTA) with a better dictionary for them.

.. math:: \min_{D, Z}\ \frac1n \sum_i \tfrac12 \|y_i - z_i D\|^2 + \lambda \|z_i\|_1, \qquad \|d_j\| = 1

Both methods keep two averages over the batches, :math:`A \leftarrow \rho_t A + Z^\top Z / b` and :math:`B \leftarrow
\rho_t B + Z^\top Y / b`. They forget the oldest, :math:`\rho_t = (1 - 1/t)^{\text{decay}}`, so their memory is about t
/ decay batches. `online` improves one atom after another with the others fixed; `mod` solves for all atoms at once. An
atom that no code has used for some batches, or that duplicates another, restarts from a badly explained row. This is
the baseline without an encoder that a sparse autoencoder has to beat.

Sources:
  Mairal et al., Online learning for matrix factorization and sparse coding, 2010 (online); Engan et al., Method of
  optimal directions for frame design, 1999 (MOD); Beck and Teboulle 2009, O'Donoghue and Candes 2015 (FISTA, restart).
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from saejax.errors import UserError
from saejax.fields import numeric
from saejax.sparse_coding import proximal

METHODS = ("online", "mod")
"""How the dictionary follows from the averages."""

_EXACT = lax.Precision.HIGHEST


@struct.dataclass
class Learned:
    """A learnt dictionary and how it came about.

    Attributes:
      dictionary: [n_atoms, d] float32, rows of norm 1.
      history: per step, [n_steps] float32 each: `objective` (mean over the batch, before the step's update), `fvu`
        (uncentred: squared residual over squared signal), `l0` (codes above 0 in magnitude per row), `kkt` (largest
        violation of the optimality conditions of the batch's codes over l1_coef: how far FISTA was from converged)
        and `reseeded` (atoms started anew).
    """

    dictionary: jax.Array
    history: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learning:
    """Settings of `learn`."""

    l1_coef: float
    """Weight of the L1 norm against half the squared error, above 0, in the unit of the signals."""
    method: str = "online"
    """One of METHODS."""
    nonneg: bool = True
    """Codes are never negative."""
    batch: int = 512
    """Signals per step, at least 1."""
    n_steps: int = 400
    """Steps, at least 1."""
    seed: int = 0
    """Fixes the first atoms and the order of the signals."""
    n_iterations: int = 40
    """FISTA iterations per batch, from zero, at least 1; `history["kkt"]` says whether they suffice."""
    decay: float = 15.0
    """How fast old batches are forgotten, at least 0; 0 averages over all of them."""
    patience: int = 10
    """Batches without use after which an atom starts anew, at least 1."""
    twin_cos: float = 0.98
    """Cosine from which two atoms count as one, the less used starting anew, in (0, 1]; 1 keeps them all."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UserError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        for name in ("l1_coef", "decay", "twin_cos"):
            numeric.number(getattr(self, name), name)
        if self.l1_coef <= 0:
            raise UserError(f"l1_coef must be a finite number above 0, got {self.l1_coef}")
        if self.decay < 0:
            raise UserError(f"decay must be a finite number of at least 0, got {self.decay}")
        if not 0 < self.twin_cos <= 1:
            raise UserError(f"twin_cos must lie in (0, 1], got {self.twin_cos}")
        for name in ("batch", "n_steps", "n_iterations", "patience"):
            numeric.count(getattr(self, name), name)
        numeric.seed(self.seed)


class _Knobs(NamedTuple):
    """Settings that may change without compiling again."""

    l1_coef: float
    n_iterations: int
    decay: float
    patience: int
    twin_cos: float


class _State(NamedTuple):
    """State that one batch passes to the next."""

    dictionary: jax.Array  # [n, d]
    A: jax.Array  # [n, n]
    B: jax.Array  # [n, d]
    unused: jax.Array  # [n] int32, batches since last used


def learn(
    y: Float[Array, "rows d"],
    n_atoms: int,
    *,
    initial: Float[Array, "n_atoms d"] | None = None,
    **settings: Any,
) -> Learned:
    """Learns a dictionary of unit rows from signals.

    Args:
      y: Signals, finite. Each epoch takes them in a new random order; a batch may span two epochs.
      n_atoms: Atoms to learn, at least 1.
      initial: First dictionary, any row lengths above 0; None takes random signals.
      **settings: Fields of `Learning`: l1_coef must be given.

    Returns:
      See `Learned`.

    Raises:
      UserError: an argument is out of range, or there are too few signals that are not zero to start from.

    Examples:
      >>> import numpy as np
      >>> codes = np.random.default_rng(0).random((512, 3)) * np.eye(3)[np.arange(512) % 3]
      >>> found = learn(codes @ np.eye(3)[:, [1, 2, 0]], 3, l1_coef=0.05, batch=64, n_steps=30)
      >>> bool((np.sort(np.asarray(found.dictionary).max(axis=1)) > 0.999).all())
      True
    """
    cfg = Learning(**settings)
    numeric.count(n_atoms, "n_atoms")
    rows = _signals(y)
    rng = np.random.default_rng(cfg.seed)
    start = _start(rows, n_atoms, initial, rng)
    order = jnp.asarray(_order(rng, len(rows), cfg.n_steps, cfg.batch))
    knobs = _Knobs(cfg.l1_coef, cfg.n_iterations, cfg.decay, cfg.patience, cfg.twin_cos)
    dictionary, history = _run(cfg.method, cfg.nonneg, jnp.asarray(rows), jnp.asarray(start), order, knobs)
    if not all(bool(jnp.isfinite(found).all()) for found in (dictionary, *history.values())):
        raise _too_large(rows)
    return Learned(dictionary=dictionary, history={name: np.asarray(value) for name, value in history.items()})


def _signals(y: Float[Array, "rows d"]) -> np.ndarray:
    rows = np.asarray(y, np.float32)
    if rows.ndim != 2 or 0 in rows.shape:
        raise UserError(f"y must be a non-empty matrix [rows, d], got shape {rows.shape}")
    if not np.isfinite(rows).all():
        raise UserError(f"y must be finite, got {int((~np.isfinite(rows)).sum())} entries that are NaN or infinite")
    if float(np.abs(rows).max()) ** 2 * rows.shape[1] > numeric.LARGEST_FLOAT:
        raise _too_large(rows)
    return rows


def _too_large(rows: np.ndarray) -> UserError:
    size = float(np.abs(rows).max())
    return UserError(f"y must be of a size that can be squared in float32, got entries up to {size:.3g}: scale it")


def _start(rows: np.ndarray, n_atoms: int, initial: Array | None, rng: np.random.Generator) -> np.ndarray:
    """Unit rows to start from: those given, or signals drawn without replacement."""
    if initial is None:
        candidates = np.flatnonzero(np.linalg.norm(rows, axis=1) > 0)
        if len(candidates) < n_atoms:
            raise UserError(f"y must have at least n_atoms={n_atoms} rows that are not zero, got {len(candidates)}")
        first = rows[rng.choice(candidates, n_atoms, replace=False)]
    else:
        first = np.asarray(initial, np.float32)
        if first.shape != (n_atoms, rows.shape[1]):
            raise UserError(f"initial must have shape ({n_atoms}, {rows.shape[1]}), got {first.shape}")
    norm = np.linalg.norm(first, axis=1, keepdims=True)
    if not np.isfinite(norm).all() or (norm == 0).any():
        raise UserError("initial must have finite rows, none of them zero")
    return first / norm


def _order(rng: np.random.Generator, n: int, n_steps: int, batch: int) -> Int[np.ndarray, "n_steps batch"]:
    """Row numbers of every batch: whole random permutations, one after another."""
    n_epochs = -(-n_steps * batch // n)
    order = np.concatenate([rng.permutation(n) for _ in range(n_epochs)])
    return order[: n_steps * batch].reshape(n_steps, batch).astype(np.int32)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(method: str, nonneg: bool, y, dictionary, order, knobs: _Knobs):
    """All steps in one compiled loop: the last dictionary, and the history."""
    n, d = dictionary.shape

    def step(state: _State, at):
        number, chosen = at
        rows = y[chosen]
        codes = _codes(rows, state.dictionary, nonneg, knobs)
        residual = rows - _product(codes, state.dictionary)
        report = _report(rows, codes, residual, state.dictionary, knobs.l1_coef, nonneg)
        state = _averages(state, rows, codes, (1.0 - 1.0 / (number + 1.0)) ** knobs.decay)
        state = state._replace(dictionary=_one_by_one(state) if method == "online" else _all_at_once(state))
        stale = (state.unused >= knobs.patience) | _twins(state, nonneg, knobs.twin_cos)
        state, reseeded = _reseed(state, residual, stale)
        return state, report | {"reseeded": reseeded}

    state = _State(dictionary, jnp.zeros((n, n)), jnp.zeros((n, d)), jnp.zeros(n, jnp.int32))
    state, history = lax.scan(step, state, (jnp.arange(len(order)), order))
    return state.dictionary, history


def _codes(y, dictionary, nonneg: bool, knobs: _Knobs) -> Float[Array, "b n"]:
    """Nearly optimal codes after a fixed number of FISTA iterations with restart per row."""
    n, d = dictionary.shape
    target = _product(y, dictionary.T)
    gram = _product(dictionary, dictionary.T)
    step = 1.0 / proximal.lipschitz(dictionary)

    def iterate(_, carry):
        z, v, t = carry
        ahead = _product(v, gram) if n <= 2 * d else _product(_product(v, dictionary), dictionary.T)
        new = proximal.shrink(v - step * (ahead - target), step * knobs.l1_coef, nonneg)
        # Momentum that points uphill is dropped.
        t = jnp.where(jnp.sum((v - new) * (new - z), axis=1) > 0, 1.0, t)
        t_next = (1 + jnp.sqrt(1 + 4 * t**2)) / 2
        return new, new + ((t - 1) / t_next)[:, None] * (new - z), t_next

    zero = jnp.zeros_like(target)
    return lax.fori_loop(0, knobs.n_iterations, iterate, (zero, zero, jnp.ones(len(y))))[0]


def _averages(state: _State, rows, codes, rho) -> _State:
    """Takes one batch into the averages and notes which atoms it used."""
    A = rho * state.A + _product(codes.T, codes) / len(rows)
    B = rho * state.B + _product(codes.T, rows) / len(rows)
    unused = jnp.where(jnp.any(codes != 0, axis=0), 0, state.unused + 1)
    return _State(state.dictionary, A, B, unused)


def _one_by_one(state: _State) -> Float[Array, "n d"]:
    """One pass over the atoms, each set to its best direction given the others; unused ones stay."""

    def improve(j, D):
        moved = D[j] + (state.B[j] - state.A[j] @ D) / jnp.maximum(state.A[j, j], 1e-12)
        new = moved / jnp.maximum(jnp.linalg.norm(moved), 1e-12)
        return D.at[j].set(jnp.where(state.A[j, j] > 1e-10, new, D[j]))

    return lax.fori_loop(0, len(state.dictionary), improve, state.dictionary)


def _all_at_once(state: _State) -> Float[Array, "n d"]:
    """Least squares for all atoms, then unit length; the ridge keeps barely used atoms where they are."""
    used = jnp.diagonal(state.A)
    ridge = 1e-4 * jnp.mean(used) + 1e-12
    regular = state.A + ridge * jnp.eye(len(state.A))
    D = jax.scipy.linalg.solve(regular, state.B + ridge * state.dictionary, assume_a="pos")
    norm = jnp.linalg.norm(D, axis=1, keepdims=True)
    return jnp.where(norm > 1e-8, D / jnp.maximum(norm, 1e-8), state.dictionary)


def _reseed(state: _State, residual: Float[Array, "b d"], stale: Bool[Array, "n"]) -> tuple[_State, Float[Array, ""]]:
    """Starts atoms anew, each from another of the rows that are explained worst."""
    size = jnp.linalg.norm(residual, axis=1)
    take = min(len(stale), len(residual))
    _, worst = lax.top_k(size, take)
    place = jnp.cumsum(stale) - 1
    rows = worst[jnp.clip(place, 0, take - 1)]
    new = residual[rows] / jnp.maximum(size[rows], 1e-12)[:, None]
    replace = stale & (place < take) & (size[rows] > 1e-6)
    keep = ~replace
    return _State(
        dictionary=jnp.where(replace[:, None], new, state.dictionary),
        A=state.A * keep[:, None] * keep[None, :],
        B=state.B * keep[:, None],
        unused=jnp.where(replace, 0, state.unused),
    ), jnp.sum(replace, dtype=jnp.float32)


def _twins(state: _State, nonneg: bool, twin_cos) -> Bool[Array, "n"]:
    """Atoms that another, more used one repeats; of a signed dictionary also its mirror image."""
    cos = _product(state.dictionary, state.dictionary.T)
    same = (cos if nonneg else jnp.abs(cos)) > twin_cos
    use, number = jnp.diagonal(state.A), jnp.arange(len(cos))
    more = (use[None, :] > use[:, None]) | ((use[None, :] == use[:, None]) & (number[None, :] < number[:, None]))
    return jnp.any(same & more, axis=1) & (twin_cos < 1)


def _report(rows, codes, residual, dictionary, l1_coef, nonneg: bool) -> dict[str, jax.Array]:
    """The history of one step."""
    error = jnp.sum(residual**2, axis=1)
    slope = _product(residual, dictionary.T)  # at the optimum: l1_coef * sign(z) where z != 0, below elsewhere
    off = slope if nonneg else jnp.abs(slope)
    violation = jnp.where(codes != 0, jnp.abs(slope - l1_coef * jnp.sign(codes)), jnp.maximum(off - l1_coef, 0))
    return {
        "objective": jnp.mean(error / 2 + l1_coef * jnp.sum(jnp.abs(codes), axis=1)),
        "fvu": jnp.sum(error) / jnp.maximum(jnp.sum(rows**2), 1e-20),
        "l0": jnp.mean(jnp.sum(codes != 0, axis=1, dtype=jnp.float32)),
        "kkt": jnp.max(violation) / l1_coef,
    }


def _product(a, b):
    return jnp.matmul(a, b, precision=_EXACT)
