"""Centre and scale of the data, estimated once at the start of a run and saved with its state.

Fourth station of the data path, between the buffer and the train step. One offset and one scalar for all
dimensions, never a whitening: directions keep their meaning, and the finished SAE folds both back in, so that
it works in the data's own scale.
"""

import dataclasses
import enum
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from saejax.errors import UserError


class NormMode(enum.Enum):
    """What the average row has after scaling; `auto` stands for what the architecture was made for."""

    auto = "auto"
    none = "none"
    sqrt_d = "sqrt_d"
    unit = "unit"


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormalizeConfig:
    """How rows are centred and scaled before training."""

    mode: NormMode = NormMode.auto
    """auto: as the architecture prefers; none: as they are; sqrt_d: mean norm E||x|| = sqrt(d_in);
    unit: mean square norm E||x||^2 = 1."""
    center: bool = False
    """Subtract the mean row before scaling."""
    rows: int = 65_536
    """Rows the estimate is taken from (>= 1; fewer where the first filling of the buffer holds fewer)."""

    def __post_init__(self):
        if self.rows < 1:
            raise UserError(f"normalize.rows = {self.rows}: at least 1 is needed")


@struct.dataclass
class Normalizer:
    """y = (x - mean) * scale, float32."""

    mean: Float[Array, " d_in"]
    scale: Float[Array, ""]


def estimate(rows: Float[Array, "n d_in"], mode: NormMode, *, center: bool = False) -> Normalizer:
    """Estimate the normaliser on a sample of rows.

    mean = E[x] if center else 0;  scale = sqrt(d_in) / E||x - mean|| (sqrt_d), 1 / sqrt(E||x - mean||^2)
    (unit), or 1 (none).

    Args:
        rows: [n, d_in], any float dtype; may be sharded.
        mode: what the average row shall have; `auto` must be resolved before.
        center: subtract the mean.

    Raises:
        UserError: the rows are all equal (or zero), or not finite, so that no scale exists.
    """
    normalizer = _estimate(jnp.asarray(rows), mode=mode, center=center)
    scale = float(normalizer.scale)
    if not 0 < scale < float("inf"):
        raise UserError(f"normalize.mode = {mode.name}: these rows have no finite scale; are they all equal?")
    return normalizer


@partial(jax.jit, static_argnames=("mode", "center"))
def _estimate(rows: Float[Array, "n d_in"], *, mode: NormMode, center: bool) -> Normalizer:
    x = rows.astype(jnp.float32)
    d_in = x.shape[-1]
    mean = jnp.zeros(d_in, jnp.float32)
    if center:
        mean = x.mean(0)
        mean = mean + (x - mean[None]).mean(0)  # a second pass takes out what float32 lost in the first
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


def apply(normalizer: Normalizer, x: Float[Array, "... d_in"]) -> Float[Array, "... d_in"]:
    """Into training scale: (x - mean) * scale, float32 whatever the dtype of x."""
    x = jnp.asarray(x, jnp.float32)
    return (x - jnp.broadcast_to(normalizer.mean, x.shape)) * normalizer.scale


def invert(normalizer: Normalizer, y: Float[Array, "... d_in"]) -> Float[Array, "... d_in"]:
    """Back into the data's own scale: y / scale + mean, float32."""
    y = jnp.asarray(y, jnp.float32)
    return y / normalizer.scale + jnp.broadcast_to(normalizer.mean, y.shape)


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
