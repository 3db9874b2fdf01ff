"""Uniform random k-subsets: the active atoms of a code."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key

from saejax.lab.codes.arguments import check_indexable, check_sizes


def sample(key: Key[Array, ""], n_atoms: int, k: int, b: int) -> Int[Array, "b k"]:
    """Independent k-subsets of range(n_atoms), each of the C(n_atoms, k) sets equally likely.

    Row i depends on `key` and i alone, not on `b`.

    Args:
      key: of `jax.random`.
      n_atoms: size of the whole set.
      k: size of a subset, at most n_atoms.
      b: number of subsets.

    Returns:
      int32, ascending within a row, no repeats.

    Raises:
      UserError: a size below 1 or k > n_atoms.

    Examples:
      >>> sample(jax.random.key(0), 3, 3, 2).tolist()
      [[0, 1, 2], [0, 1, 2]]
    """
    check_sizes(n_atoms=n_atoms, k=k, b=b)
    check_indexable(n_atoms=n_atoms, b=b)
    return of_keys(row_keys(key, b), n_atoms, k)


def row_keys(key: Key[Array, ""], b: int) -> Key[Array, "b"]:
    """One key per row; the first rows stay the same when `b` grows."""
    return jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(b))


@partial(jax.jit, static_argnames=("n_atoms", "k"))
def of_keys(keys: Key[Array, "b"], n_atoms: int, k: int) -> Int[Array, "b k"]:
    """One uniform k-subset per key, by Floyd's algorithm: k draws and k^2 comparisons, nothing of size n_atoms.

    Step j draws t uniformly from 0..n_atoms-k+j and takes t, or n_atoms-k+j where t is already taken; every k-set
    then has the same probability (Bentley and Floyd 1987, "Programming pearls: a sample of brilliance").
    """

    def one(key: jax.Array) -> jax.Array:
        last = jnp.arange(n_atoms - k, n_atoms, dtype=jnp.int32)
        draws = jax.random.randint(key, (k,), 0, last + 1, dtype=jnp.int32)

        def step(j: jax.Array, taken: jax.Array) -> jax.Array:
            repeated = jnp.any(taken == draws[j])
            return taken.at[j].set(jnp.where(repeated, last[j], draws[j]))

        return jnp.sort(jax.lax.fori_loop(0, k, step, jnp.full((k,), -1, jnp.int32)))

    return jax.vmap(one)(keys)


def indicator(subsets: Int[Array, "b k"], n_atoms: int) -> Bool[Array, "b n_atoms"]:
    """The 0/1 code of every subset."""
    rows = jnp.arange(subsets.shape[0])[:, None]
    return jnp.zeros((subsets.shape[0], n_atoms), bool).at[rows, subsets].set(True)
