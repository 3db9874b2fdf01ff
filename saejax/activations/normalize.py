"""Normalisation of the data: estimated once when a run starts, saved with its state.

Fourth station of the data path, between the buffer and the train step. Usually it is one offset and one scalar for all
dimensions, so directions keep their meaning. It may also be a whitening, or a normalisation of every row by itself.
The finished SAE absorbs all of it and works in the data's own scale: its weights take offset, scalar and whitening;
`sae.per_row` normalises rows. Rows of several sites get one scalar per site, estimated from that site alone. Otherwise
the site with the largest activations would dominate.
"""

import dataclasses
import enum
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from saejax.errors import UserError
from saejax.fields import numeric
from saejax.fields.resume_policy import Fixed
from saejax.kernels.row_norm import normalized


class NormMode(enum.Enum):
    """Kind of normalisation; `auto` stands for the scale that the architecture was made for."""

    auto = "auto"
    """The architecture's own: sqrt_d or unit."""
    none = "none"
    """Nothing."""
    sqrt_d = "sqrt_d"
    """One scalar: mean norm sqrt(d_in)."""
    unit = "unit"
    """One scalar: mean square norm 1."""
    layer_norm = "layer_norm"
    """Every row to mean 0 and variance 1 by itself, then the architecture's own scale."""
    whiten = "whiten"
    """Centred, all directions made equally wide, then the architecture's own scale."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormalizeConfig:
    """Centring and scaling of rows before training."""

    mode: Fixed[NormMode] = NormMode.auto
    """auto: as the architecture prefers; none: as they are; sqrt_d: mean norm E||x|| = sqrt(d_in);
    unit: mean square norm E||x||^2 = 1; layer_norm: every row by itself; whiten: unit covariance. After the last two
    comes the scale that the architecture prefers."""
    center: Fixed[bool] = False
    """Subtract the mean row before scaling; whiten always does, layer_norm subtracts that of the normalised rows."""
    whiten_eps: Fixed[float] = 0.01
    """Shrinkage of the covariance in whiten towards its mean variance, in (0, 1]: keeps narrow directions narrow."""
    rows: Fixed[int] = 65_536
    """Rows the estimate is taken from (>= 1; fewer where the first filling of the buffer holds fewer)."""

    def __post_init__(self):
        numeric.check(self, "normalize.")
        if self.rows < 1:
            raise UserError(f"normalize.rows = {self.rows}: at least 1 is needed")
        if not 0 < self.whiten_eps <= 1:
            raise UserError(f"normalize.whiten_eps must be in (0, 1], got {self.whiten_eps}")


@struct.dataclass
class Normalizer:
    """y = (x - mean) * scale, float32; between them what whiten and layer_norm add.

    Attributes:
      mean: [d_in] float32.
      scale: scalar; [d_in], constant within each site, for rows of several sites.
      matrix: [d_in, d_in], y = (x - mean) * scale @ matrix; None but for whiten.
      inverse: of `matrix`.
      per_row: whether rows go through `kernels.row_norm.normalized` first (static).
    """

    mean: Float[Array, " d_in"]
    scale: Float[Array, "..."]
    matrix: Float[Array, "d_in d_in"] | None = None
    inverse: Float[Array, "d_in d_in"] | None = None
    per_row: bool = struct.field(pytree_node=False, default=False)


def abstract(mode: NormMode, d_in: int, sites: tuple[int, ...] = ()) -> Normalizer:
    """The shapes of a normaliser of rows of some sites, as `jax.ShapeDtypeStruct`s."""
    vector: Any = jax.ShapeDtypeStruct((d_in,), jnp.float32)
    scalar: Any = vector if len(sites) > 1 else jax.ShapeDtypeStruct((), jnp.float32)
    square: Any = jax.ShapeDtypeStruct((d_in, d_in), jnp.float32) if mode is NormMode.whiten else None
    return Normalizer(mean=vector, scale=scalar, matrix=square, inverse=square, per_row=mode is NormMode.layer_norm)


def estimate(
    rows: Float[Array, "n d_in"],
    mode: NormMode,
    *,
    center: bool = False,
    preferred: NormMode = NormMode.sqrt_d,
    whiten_eps: float = 0.01,
    sites: tuple[int, ...] = (),
) -> Normalizer:
    """Estimate the normaliser on a sample of rows.

    mean = E[x] if center else 0;  scale = sqrt(d_in) / E||x - mean|| (sqrt_d), 1 / sqrt(E||x - mean||^2)
    (unit), or 1 (none); with several sites for each by itself.

    Args:
        rows: [n, d_in], any float dtype; may be sharded.
        mode: what the average row shall have; `auto` must be resolved before.
        center: subtract the mean.
        preferred: sqrt_d or unit, what rows have after layer_norm and whiten.
        whiten_eps: shrinkage of the covariance in whiten.
        sites: widths of the parts of a row; with several, mode is none, sqrt_d or unit.

    Raises:
        UserError: no scale exists, and why: the rows are all equal or zero, not finite, or too small or too large.
    """
    if len(sites) > 1:
        edges = [sum(sites[:i]) for i in range(len(sites) + 1)]
        found = [
            _estimated(rows[:, a:b], mode, center, f"the rows of site {number}")
            for number, (a, b) in enumerate(zip(edges, edges[1:], strict=False), start=1)
        ]
        scales = [jnp.broadcast_to(part.scale, part.mean.shape) for part in found]
        return Normalizer(mean=jnp.concatenate([part.mean for part in found]), scale=jnp.concatenate(scales))
    rows, per_row = jnp.asarray(rows), mode is NormMode.layer_norm
    matrices: tuple[Any, Any] = (None, None)
    if mode is NormMode.whiten:
        mean, covariance = _moments(rows)
        variance = float(np.trace(covariance)) / len(covariance)
        if not 0 < variance < np.inf:
            raise UserError(_without_scale(rows, mode, "these rows"))
        matrices = _whitening(np.asarray(covariance, np.float64), whiten_eps)
        # The scalar commutes with the matrix, so it may be found last and applied first.
        normalizer = _estimated((rows - mean[None]) @ matrices[0], preferred, False, "the whitened rows")
        normalizer = dataclasses.replace(normalizer, mean=mean)
    elif per_row:
        normalizer = _estimated(normalized(rows)[0], preferred, center, "these rows, each normalised by itself,")
    else:
        normalizer = _estimated(rows, mode, center, "these rows")
    return dataclasses.replace(normalizer, matrix=matrices[0], inverse=matrices[1], per_row=per_row)


def trouble(rows: Float[Array, "n d_in"] | np.ndarray, what: str = "the data") -> str | None:
    """Says why nothing can be learned from rows, or no scale be found for them.

    Squares and their sums must fit float32. With a mean square norm below 2^108, 2^20 rows add up. With a mean square
    about the mean of at least 2^-106, what float32 rounds to 0 (up to 2^-126) is 2^-20 of it.

    Args:
        rows: [n, d_in], any float dtype; may be sharded.
        what: begins the sentence.

    Returns:
        A sentence; None where there is no trouble.
    """
    finite, equal, largest, spread, square = map(float, _extent(jnp.asarray(rows)))
    deviation = largest * spread**0.5  # as Python's floats, which hold them all
    if not finite:
        return f"{what} are not finite"
    if largest == 0:
        return f"{what} are all zero, or nothing in float32: there is nothing to learn"
    if equal:
        return f"{what} are all equal: there is nothing to learn"
    if deviation**2 < 2.0**-106:
        return (
            f"{what} are too small to be squared in float32 (they vary by {deviation:.2g} and reach {largest:.2g}): "
            "scale them up"
        )
    if largest**2 * square >= 2.0**108:
        return f"{what} are too large to be squared and added in float32 (they reach {largest:.2g}): scale them down"
    return None


@jax.jit
def _extent(rows: Float[Array, "n d_in"]) -> tuple[Array, ...]:
    """Whether all is finite, whether all rows are equal, the largest |x|; over it, in squares: spread and norm."""
    x = rows.astype(jnp.float32)
    largest = jnp.abs(x).max()
    unit = jnp.where(largest > 1, 2.0**-64, 2.0**64)  # first by an exact power of 2: 1 / largest may be nothing
    y = x * unit / jnp.where(largest > 0, largest * unit, 1)
    spread = jnp.square(y - y.mean(0)[None]).mean()
    return jnp.isfinite(x).all(), (x == x[:1]).all(), largest, spread, jnp.square(y).sum(-1).mean()


def _estimated(rows: Float[Array, "n d_in"], mode: NormMode, center: bool, what: str) -> Normalizer:
    normalizer = _estimate(rows, mode=mode, center=center)
    if not 0 < float(normalizer.scale) < float("inf"):
        raise UserError(_without_scale(rows, mode, what))
    return normalizer


def _without_scale(rows: Float[Array, "n d_in"], mode: NormMode, what: str) -> str:
    return f"normalize.mode = {mode.name}: {trouble(rows, what) or f'{what} have no finite scale'}"


@partial(jax.jit, static_argnames=("mode", "center"))
def _estimate(rows: Float[Array, "n d_in"], *, mode: NormMode, center: bool) -> Normalizer:
    x = rows.astype(jnp.float32)
    d_in = x.shape[-1]
    mean = _mean(x) if center else jnp.zeros(d_in, jnp.float32)
    square_norms = jnp.square(x - mean[None]).sum(-1)
    match mode:
        case NormMode.none:
            scale = jnp.float32(1)
        case NormMode.sqrt_d:
            scale = jnp.sqrt(jnp.float32(d_in)) / jnp.sqrt(square_norms).mean()
        case NormMode.unit:
            scale = 1 / jnp.sqrt(square_norms.mean())
        case _:
            raise ValueError(f"{mode}: resolve it to the architecture's own mode first")
    return Normalizer(mean=mean, scale=scale)


def _mean(x: Float[Array, "n d_in"]) -> Float[Array, " d_in"]:
    mean = x.mean(0)
    return mean + (x - mean[None]).mean(0)  # a second pass takes out what float32 lost in the first


@jax.jit
def _moments(rows: Float[Array, "n d_in"]) -> tuple[Float[Array, " d_in"], Float[Array, "d_in d_in"]]:
    x = rows.astype(jnp.float32)
    mean = _mean(x)
    centred = x - mean[None]
    return mean, jnp.matmul(centred.T, centred, precision=jax.lax.Precision.HIGHEST) / len(x)


def _whitening(covariance: np.ndarray, eps: float) -> tuple[jax.Array, jax.Array]:
    """The symmetric root of the inverse of (1 - eps) covariance + eps (mean variance) I, and its inverse."""
    variance = np.trace(covariance) / len(covariance)
    variances, axes = np.linalg.eigh((1 - eps) * covariance + eps * variance * np.eye(len(covariance)))
    roots = np.sqrt(np.maximum(variances, 1e-12 * variance))
    return (
        jnp.asarray((axes / roots[None, :]) @ axes.T, jnp.float32),
        jnp.asarray((axes * roots[None, :]) @ axes.T, jnp.float32),
    )


def apply(normalizer: Normalizer, x: Float[Array, "... d_in"]) -> Float[Array, "... d_in"]:
    """Into training scale: (x - mean) * scale, float32 whatever the dtype of x, and what whiten and layer_norm add."""
    x = jnp.asarray(x, jnp.float32)
    if normalizer.per_row:
        x = normalized(x)[0]
    y = (x - jnp.broadcast_to(normalizer.mean, x.shape)) * jnp.broadcast_to(normalizer.scale, x.shape)
    return y if normalizer.matrix is None else y @ normalizer.matrix


def invert(
    normalizer: Normalizer, y: Float[Array, "... d_in"], x: Float[Array, "... d_in"] | None = None
) -> Float[Array, "... d_in"]:
    """Back into the data's own scale: y / scale + mean, float32.

    Args:
        normalizer: as estimated.
        y: rows in training scale.
        x: the rows that they come from, which layer_norm needs: their means and scales are its own.
    """
    y = jnp.asarray(y, jnp.float32)
    if normalizer.inverse is not None:
        y = y @ normalizer.inverse
    y = y / jnp.broadcast_to(normalizer.scale, y.shape) + jnp.broadcast_to(normalizer.mean, y.shape)
    if not normalizer.per_row:
        return y
    if x is None:
        raise UserError("normalize.mode = layer_norm: undoing it needs the rows that were normalised")
    _, mean, scale = normalized(x)
    return y * scale + mean


@partial(jax.jit, static_argnames="n_iter")
def geometric_median(rows: Float[Array, "n d_in"], n_iter: int = 100) -> Float[Array, " d_in"]:
    """The point with the smallest sum of distances to all rows, by Weiszfeld's iteration.

    m <- sum_i w_i x_i / sum_i w_i,  w_i = 1 / ||x_i - m||, from the mean. A few rows of huge norm move the
    mean far but hardly move this point, which makes it a good start for `b_dec`.

    Args:
        rows: [n, d_in], any float dtype.
        n_iter: iterations; convergence is linear.

    Returns:
        [d_in] float32.

    Source: Weiszfeld 1937; the floor on distances keeps an iterate that meets a row from dividing by zero.
    """
    x = rows.astype(jnp.float32)
    floor = 1e-7 * jnp.sqrt(jnp.square(x).sum(-1).mean()) + jnp.finfo(jnp.float32).tiny

    def step(_, median):
        distances = jnp.sqrt(jnp.square(x - median[None]).sum(-1))
        weights = 1 / jnp.maximum(distances, floor)
        return weights @ x / weights.sum()

    return jax.lax.fori_loop(0, n_iter, step, x.mean(0))
