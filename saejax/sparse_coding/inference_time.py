"""Inference-time optimisation: a solver replaces the encoder of a trained SAE and keeps its dictionary.

It splits an SAE's error into the encoder's part and the dictionary's part.
"""

import warnings
from typing import Any, Unpack

import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float

from saejax.errors import UserError
from saejax.sae.model import SAE
from saejax.sparse_coding.infer import METHODS, Options, check_values, run_method
from saejax.sparse_coding.solution import Solution


def encode(
    sae: SAE,
    x: Float[Array, "... d_in"],
    *,
    method: str = "omp",
    nonneg: bool | None = None,
    warm_start: bool = True,
    tolerance: float = 1e-5,
    **options: Unpack[Options],
) -> Float[Array, "... d_sae"]:
    """Returns latents for `sae.decode`, found by a solver instead of the encoder.

    Subtracts `b_dec`, solves over the decoder's rows at norm 1, and gives the latents back in the rows' own norms.
    Warns (RuntimeWarning) if rows did not converge; `solve` gives the whole account.

    Args:
      sae: Any SAE; a decoder row of zeros is never used.
      x: Activations in the data's own scale.
      method: A name in `METHODS`.
      nonneg: Whether latents must not fall below 0; None: unless the SAE's own may.
      warm_start: Whether methods that can start from the encoder's latents do.
      tolerance: As in `infer`.
      **options: As in `infer`; without k the SAE's own k is taken, and l1_coef weighs latents by their decoder norms.

    Examples:
      >>> import jax
      >>> from saejax.sae import TopK
      >>> config = TopK(d_in=8, d_sae=32, k=4)
      >>> sae, x = SAE(config, config.init(jax.random.key(0))), jnp.ones((2, 8))
      >>> float(jnp.linalg.norm(sae.decode(encode(sae, x)) - x)) < float(jnp.linalg.norm(sae(x) - x))
      True
    """
    x = jnp.asarray(x, jnp.float32)
    if x.ndim == 0:
        raise UserError(f"x must have d_in={sae.config.d_in} columns, got shape ()")
    solution = solve(
        sae,
        x.reshape(-1, x.shape[-1]),
        method=method,
        nonneg=nonneg,
        warm_start=warm_start,
        tolerance=tolerance,
        **options,
    )
    if not isinstance(solution.converged, Tracer) and not bool(jnp.all(solution.converged)):
        n_failed = int(jnp.sum(~solution.converged))
        message = f"{method}: {n_failed} of {solution.converged.shape[0]} rows did not converge"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    return solution.dense().reshape(*x.shape[:-1], sae.config.d_sae)


def solve(
    sae: SAE,
    x: Float[Array, "b d_in"],
    *,
    method: str = "omp",
    nonneg: bool | None = None,
    warm_start: bool = True,
    tolerance: float = 1e-5,
    **options: Unpack[Options],
) -> Solution:
    """Returns what `encode` finds as a `Solution` in the latents' own scale; takes the same options."""
    params = sae.params
    if sae.config.row_norm is not None:
        raise UserError("sae normalises every row by itself (normalize.mode=layer_norm), which a solver does not know")
    if not sae.config.mirrors:
        raise UserError(
            f"sae.family={sae.config.family.name} does not write what it reads: a solver needs the family sae"
        )
    if x.ndim != 2 or x.shape[1] != sae.config.d_in or x.size == 0:
        raise UserError(f"x must have d_in={sae.config.d_in} columns and at least one row, got shape {x.shape}")
    norms = jnp.linalg.norm(params.W_dec, axis=1)
    safe = jnp.where(norms > 0, norms, 1)
    dictionary, y = params.W_dec / safe[:, None], x - params.b_dec[None, :]
    check_values(y, dictionary, unit=False)
    chosen = METHODS.get(method)
    given: dict[str, Any] = {**options}
    if chosen is not None and chosen.needs == "k" and given.get("k") is None:
        given["k"] = getattr(sae.config, "k", None)
    if chosen is not None and "warm_start" in chosen.takes and warm_start:
        given["warm_start"] = sae.encode(x) * norms[None, :]
    nonneg = not sae.config.signed if nonneg is None else nonneg
    solution = run_method(y, dictionary, method, nonneg, tolerance, given)
    if solution.values is not None:
        return solution.replace(values=solution.values / safe[solution.indices])  # pyright: ignore[reportAttributeAccessIssue]
    assert solution.latents is not None
    return solution.replace(latents=solution.latents / safe[None, :])  # pyright: ignore[reportAttributeAccessIssue]
