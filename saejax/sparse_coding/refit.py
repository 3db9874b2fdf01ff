"""Debiasing: keeps the support and replaces its values by the least-squares ones.

It removes the shrinkage of an L1 code, and separates an encoder's choice of latents from its amplitudes.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from saejax.errors import UserError
from saejax.sparse_coding import products, row_blocks, support
from saejax.sparse_coding.infer import check_values
from saejax.sparse_coding.solution import Solution


def refit(y: Float[Array, "b d"], dictionary: Float[Array, "n d"], solution: Solution, nonneg: bool = True) -> Solution:
    r"""Returns :math:`\arg\min_{z_S} \|y - z_S D_S\|^2` on the support S of each row, non-negative if asked.

    Args:
      y: Signals.
      dictionary: The dictionary that the solution is about.
      solution: Any solution; only its support counts. At most d atoms a row.
      nonneg: Whether the values must not fall below 0 (some may end there).

    Returns:
      A k-sparse solution with the same count of iterations. Where the atoms of a row are linearly dependent,
      `converged` is False and the row is unchanged.

    Raises:
      UserError: signals, dictionary and solution do not fit, hold NaN, or a row has more than d atoms.

    Source: Gao et al., Scaling and evaluating sparse autoencoders, 2024, section 5.1.

    Examples:
      >>> from saejax.sparse_coding import infer
      >>> y, eye = jnp.array([[3.0, 0.0]]), jnp.eye(2)
      >>> shrunk = infer(y, eye, method="fista", l1_coef=1.0)
      >>> shrunk.dense().round(3).tolist(), refit(y, eye, shrunk).dense().tolist()
      ([[2.0, 0.0]], [[3.0, 0.0]])
    """
    y, dictionary = jnp.asarray(y, jnp.float32), jnp.asarray(dictionary, jnp.float32)
    if y.ndim != 2 or dictionary.ndim != 2 or not y.size or y.shape[1] != dictionary.shape[1]:
        raise UserError(f"y must be [b, d] for a dictionary [n, d], got {y.shape} and {dictionary.shape}")
    if (len(solution.residual_norm), solution.n_atoms) != (len(y), len(dictionary)):
        got = f"{len(solution.residual_norm)} rows and {solution.n_atoms} atoms"
        raise UserError(f"solution must have {len(y)} rows and {len(dictionary)} atoms, got {got}")
    check_values(y, dictionary, unit=False)
    d = dictionary.shape[1]
    largest = int(jnp.max(solution.l0()))
    if largest > d:
        raise UserError(f"solution must have at most d={d} atoms in a row to refit them, got {largest}")
    values, indices = solution.values, solution.indices
    if values is None or indices is None:
        assert solution.latents is not None
        _, indices = jax.lax.top_k(jnp.abs(solution.latents), max(largest, 1))
        values = jnp.take_along_axis(solution.latents, indices, axis=1)
    values, residual_norm, solved = _refit(y, dictionary, values, indices, nonneg)
    return solution.replace(  # pyright: ignore[reportAttributeAccessIssue]
        residual_norm=residual_norm,
        converged=solution.converged & solved,
        gap=jnp.full(residual_norm.shape, jnp.nan),
        values=values,
        indices=indices,
        latents=None,
    )


@functools.partial(jax.jit, static_argnames="nonneg")
def _refit(y, dictionary, values, indices, nonneg):
    def block(y, values, indices, dictionary):
        atoms = dictionary[indices]
        fitted, residual, solved = support.fit(y, atoms, values != 0, nonneg)
        fitted = jnp.where(solved[:, None], fitted, values)
        residual = jnp.where(solved[:, None], residual, y - products.combine(values, atoms))
        return fitted, products.norms(residual), solved

    width = values.shape[1] * dictionary.shape[1]
    return row_blocks.over_blocks(block, (y, values, indices), (dictionary,), width)
