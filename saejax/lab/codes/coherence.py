"""Coherence of a dictionary (interference between atoms), and the bounds on it.

Atoms are the dictionary's rows; nothing of size [n_atoms, n_atoms] is ever formed.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from saejax.errors import UserError
from saejax.lab.codes.arguments import check_pairs, check_positive, check_probability, check_sizes
from saejax.sparse_coding.infer import check_values

_HIGHEST = jax.lax.Precision.HIGHEST


def coherence(dictionary: Float[Array, "n_atoms d"], *, block: int = 1024) -> Float[Array, ""]:
    """Largest |<f_i, f_j>| over pairs i != j (metric M1 for unit rows).

    Args:
      dictionary: unit rows, at least 2.
      block: rows compared at once; [block, block] numbers exist at a time.

    Returns:
      float32 scalar, in [0, 1] for unit rows.

    Raises:
      UserError: fewer than 2 rows, rows not of norm 1, NaN or infinity, or block below 1.
    """
    _check_rows(dictionary)
    check_values(dictionary, dictionary, name="dictionary")
    check_sizes(block=block)
    return _coherence(dictionary, min(block, dictionary.shape[0]))


@partial(jax.jit, static_argnames=("block",))
def _coherence(dictionary: Float[Array, "n d"], block: int) -> Float[Array, ""]:
    n_atoms, d = dictionary.shape
    n_blocks = -(-n_atoms // block)
    # Zero rows of padding have inner product 0 with everything, which never exceeds a maximum of magnitudes.
    blocks = jnp.pad(dictionary, ((0, n_blocks * block - n_atoms), (0, 0))).reshape(n_blocks, block, d)
    diagonal = jnp.eye(block, dtype=bool)

    def against(largest: jax.Array, pair: jax.Array) -> tuple[jax.Array, None]:
        i, j = pair[0], pair[1]
        products = jnp.abs(jnp.matmul(blocks[i], blocks[j].T, precision=_HIGHEST))
        products = jnp.where(diagonal & (i == j), 0.0, products)
        return jnp.maximum(largest, products.max()), None

    pairs = jnp.stack(jnp.triu_indices(n_blocks), axis=1)
    return jax.lax.scan(against, jnp.float32(0), pairs)[0]


def mean_square_interference(dictionary: Float[Array, "n_atoms d"]) -> Float[Array, ""]:
    """Mean of <f_i, f_j>^2 over pairs i != j (metric M6), from the smaller of the two Gram matrices.

    gamma = (||D^T D||_F^2 - sum_i ||f_i||^4) / (n_atoms (n_atoms - 1)).

    Args:
      dictionary: rows, at least 2.

    Returns:
      float32 scalar; at least `welch_bound(n_atoms, d)` for unit rows.

    Raises:
      UserError: fewer than 2 rows, NaN or infinity.
    """
    _check_rows(dictionary)
    check_values(dictionary, dictionary, unit=False, name="dictionary")
    return _mean_square_interference(dictionary)


@jax.jit
def _mean_square_interference(dictionary: Float[Array, "n_atoms d"]) -> Float[Array, ""]:
    n_atoms, d = dictionary.shape
    left = dictionary.T if d < n_atoms else dictionary
    potential = jnp.sum(jnp.matmul(left, left.T, precision=_HIGHEST) ** 2)
    own = jnp.sum(jnp.sum(dictionary**2, axis=1) ** 2)
    return jnp.maximum(potential - own, 0) / (n_atoms * (n_atoms - 1))


def _check_rows(dictionary: Float[Array, "n_atoms d"]) -> None:
    if dictionary.ndim != 2 or dictionary.shape[1] == 0:
        raise UserError(f"dictionary = {dictionary.shape}: [n_atoms, d] is needed")
    check_pairs(dictionary.shape[0])


def welch_bound(n_atoms: int, d: int) -> float:
    """Smallest mean square interference of n_atoms unit vectors in d dimensions: (n_atoms - d) / (d (n_atoms - 1)).

    Its root bounds the coherence from below. Source: Welch 1974; attained, Benedetto and Fickus 2003.

    Args:
      n_atoms: number of vectors, at least 2.
      d: dimensions.

    Returns:
      The bound; 0 where n_atoms <= d.

    Raises:
      UserError: fewer than 2 vectors or d < 1.

    Examples:
      >>> round(welch_bound(64, 32) * 32, 5), welch_bound(16, 32)
      (0.50794, 0.0)
    """
    check_pairs(n_atoms)
    check_sizes(d=d)
    return max(n_atoms - d, 0) / (d * (n_atoms - 1))


def dims_for_coherence(n_atoms: int, epsilon: float, p: float) -> float:
    """Dimensions beyond which a Rademacher dictionary has coherence below epsilon with probability at least 1 - p.

    d > (2 / epsilon^2) (2 ln n_atoms + ln(1/p)). Source: superposition codes, Proposition 1.

    Args:
      n_atoms: number of rows.
      epsilon: coherence to stay below, above 0.
      p: probability of failure, in (0, 1).

    Returns:
      The bound on d (dimensions).

    Raises:
      UserError: a number out of its range.

    Examples:
      >>> round(dims_for_coherence(1024, 0.25, 0.1), 1)
      517.3
    """
    check_sizes(n_atoms=n_atoms)
    check_positive(epsilon=epsilon)
    check_probability(p=p)
    return 2 / epsilon**2 * (2 * math.log(n_atoms) - math.log(p))
