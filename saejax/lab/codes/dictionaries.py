"""Dictionaries of codes: rows are atoms, `[n_atoms, d]`, float32.

Random ensembles, one optimised ensemble, and `Implicit`: a Rademacher dictionary that is never held whole.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from saejax.lab.codes.arguments import check_indexable, check_seed, check_sizes

_HIGHEST = jax.lax.Precision.HIGHEST


def rademacher(key: Key[Array, ""], n_atoms: int, d: int) -> Float[Array, "n_atoms d"]:
    """Independent signs +-1/sqrt(d); rows have norm exactly 1.

    Args:
      key: of `jax.random`.
      n_atoms: number of rows.
      d: dimensions.

    Returns:
      float32 unit rows.

    Raises:
      UserError: a size below 1.
    """
    check_sizes(n_atoms=n_atoms, d=d)
    return jax.random.rademacher(key, (n_atoms, d), jnp.float32) / jnp.sqrt(jnp.float32(d))


def gaussian(key: Key[Array, ""], n_atoms: int, d: int) -> Float[Array, "n_atoms d"]:
    """Independent entries N(0, 1/d); squared row norms are 1 on average, with variance 2/d.

    Args:
      key: of `jax.random`.
      n_atoms: number of rows.
      d: dimensions.

    Returns:
      float32; use `spherical` where unit rows are needed.

    Raises:
      UserError: a size below 1.
    """
    check_sizes(n_atoms=n_atoms, d=d)
    return jax.random.normal(key, (n_atoms, d), jnp.float32) / jnp.sqrt(jnp.float32(d))


def spherical(key: Key[Array, ""], n_atoms: int, d: int) -> Float[Array, "n_atoms d"]:
    """Directions uniform on the sphere: Gaussian rows scaled to norm 1.

    Args:
      key: of `jax.random`.
      n_atoms: number of rows.
      d: dimensions.

    Returns:
      float32 unit rows.

    Raises:
      UserError: a size below 1.
    """
    return _unit_rows(gaussian(key, n_atoms, d))


def orthonormal(key: Key[Array, ""], n_atoms: int, d: int) -> Float[Array, "n_atoms d"]:
    """Random orthonormal rows; beyond d of them, a union of independent random bases, d rows each.

    A union of whole bases is a tight frame: its mean square interference is the Welch bound.

    Args:
      key: of `jax.random`.
      n_atoms: number of rows.
      d: dimensions.

    Returns:
      float32 unit rows; rows i and j are orthogonal where i // d == j // d.

    Raises:
      UserError: a size below 1.
    """
    check_sizes(n_atoms=n_atoms, d=d)
    bases = jax.random.orthogonal(key, d, (-(-n_atoms // d),))
    return bases.reshape(-1, d)[:n_atoms]


def minimise_interference(key: Key[Array, ""], n_atoms: int, d: int, *, steps: int = 200) -> Float[Array, "n_atoms d"]:
    """Unit rows whose mean square interference is as small as possible.

    Descends the frame potential ||D^T D||_F^2 over unit rows from a spherical start. Its minimum over n_atoms > d
    unit vectors is n_atoms^2/d, met by tight frames (Benedetto and Fickus 2003), which is the Welch bound.

    Args:
      key: of `jax.random`.
      n_atoms: number of rows.
      d: dimensions.
      steps: gradient steps; each costs 4 n_atoms d^2 operations.

    Returns:
      float32 unit rows.

    Raises:
      UserError: a size below 1.
    """
    check_sizes(n_atoms=n_atoms, d=d, steps=steps)
    return _tighten(spherical(key, n_atoms, d), steps)


@partial(jax.jit, static_argnames=("steps",))
def _tighten(dictionary: Float[Array, "n d"], steps: int) -> Float[Array, "n d"]:
    """Gradient steps on the frame potential. Singular values s of D, in units of their target, move as
    s <- s + (s - s^3)/4, which contracts to 1 from anywhere in (0, sqrt(5)); random starts lie below 2."""
    n_atoms, d = dictionary.shape
    target = max(n_atoms / d, 1.0)

    def step(_: int, rows: jax.Array) -> jax.Array:
        if n_atoms > d:
            pull = jnp.matmul(rows, jnp.matmul(rows.T, rows, precision=_HIGHEST), precision=_HIGHEST)
        else:
            pull = jnp.matmul(jnp.matmul(rows, rows.T, precision=_HIGHEST), rows, precision=_HIGHEST)
        return _unit_rows(rows + (rows - pull / target) / 4)

    return jax.lax.fori_loop(0, steps, step, dictionary)


def _unit_rows(rows: Float[Array, "n d"]) -> Float[Array, "n d"]:
    return rows / jnp.linalg.norm(rows, axis=-1, keepdims=True)


ENSEMBLES: dict[str, Callable[[jax.Array, int, int], jax.Array]] = {
    "rademacher": rademacher,
    "gaussian": gaussian,
    "spherical": spherical,
    "orthonormal": orthonormal,
    "minimise_interference": minimise_interference,
}
"""Every dictionary by name: (key, n_atoms, d) -> [n_atoms, d]."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Implicit:
    """A Rademacher dictionary given by a seed: row i is made from (seed, i) whenever it is needed.

    Only the rows asked for exist, so n_atoms = 2^20 at d = 20,000 (80 GB whole) fits anywhere.
    """

    n_atoms: int
    """Number of rows (1 to 2^31 - 1)."""
    d: int
    """Dimensions (>= 1)."""
    seed: int = 0
    """Seed of all rows (0 to 2^32 - 1)."""

    def __post_init__(self) -> None:
        check_indexable(n_atoms=self.n_atoms, d=self.d)
        check_seed(seed=self.seed)

    def rows(self, indices: Int[Array, "..."]) -> Float[Array, "... d"]:
        """Unit rows at the given indices, float32.

        Args:
          indices: any shape, in 0..n_atoms-1.

        Returns:
          The same rows for any order or grouping of the indices.
        """
        return signs(jax.random.key(self.seed), indices, self.d) / jnp.sqrt(jnp.float32(self.d))

    def whole(self) -> Float[Array, "n_atoms d"]:
        """All rows at once, for moderate sizes."""
        return self.rows(jnp.arange(self.n_atoms))


@partial(jax.jit, static_argnames=("d",))
def signs(key: Key[Array, ""], indices: Int[Array, "..."], d: int) -> Float[Array, "... d"]:
    """Signs +-1 of the rows at `indices`: 32 per random word, each row from a key of its own."""
    keys = jax.vmap(partial(jax.random.fold_in, key))(indices.reshape(-1))
    words = jax.vmap(lambda row: jax.random.bits(row, (-(-d // 32),), jnp.uint32))(keys)
    bits = (words[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)[None, None]) & 1
    flat = bits.reshape(len(words), -1)[:, :d].astype(jnp.float32)
    return (1 - 2 * flat).reshape(*indices.shape, d)
