"""Metric interface: a batch to look at, a state that merges, numbers computed once at the end.

Every file of metrics imports this one and no other metric's file. `evals.evaluate` runs the metrics of an SAE's
reconstructions (`EvalBatch`); `evals.over` runs any metric over existing arrays.
"""

import abc
import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from saejax.errors import UserError
from saejax.fields import numeric, registry
from saejax.sae import base

_SEE_NO_PADDING: set[Any] = set()
"""The `update` of every class, which is given zeros for padding: a class that inherits one needs no other."""


@struct.dataclass
class EvalBatch:
    """One batch seen by every metric, all in the data's own scale.

    Attributes:
      x: Target activations, [b, d_out] float32; for an SAE these are its input.
      recon: Their reconstructions, [b, d_out] float32.
      encoding: The latents behind them.
      weight: 1 for a real row, 0 for padding, [b] float32.
      W_dec: Contribution of one unit of each latent to `recon`, [d_sae, d_out] float32.
      b_dec: The reconstruction where no latent fires, [d_out] float32 (of a transcoder with skip: at x = 0).
    """

    shared: ClassVar[tuple[str, ...]] = ("W_dec", "b_dec")
    """Fields that are not one entry per row."""

    x: jax.Array
    recon: jax.Array
    encoding: base.Encoding
    weight: jax.Array
    W_dec: jax.Array
    b_dec: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metric(abc.ABC):
    """A monoid of sums over rows: static, hashable, all methods pure.

    `init` and `update` run on the devices in float32 and int32 over a few batches. `merge` runs there and on the host,
    where the states are numpy arrays in float64 and int64, so it uses only operators that both kinds of array have.
    `merge` is associative and `init` its neutral element. Ratios are formed once, in `compute`.

    A batch is a struct with `weight` [b], 1 for a real row and 0 for padding. Its other fields have one entry per row,
    except those named in its class attribute `shared`. What padding holds never counts: every `update` is given zeros
    there (see `without_padding`).
    """

    name: ClassVar[str]
    batch_type: ClassVar[type] = EvalBatch
    """Struct that `update` takes."""
    on_host: ClassVar[bool] = False
    """Whether `update` takes numpy batches of real rows, uncompiled, because it sorts or keeps rows."""

    def __post_init__(self) -> None:
        numeric.check(self)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        update = cls.update
        if getattr(update, "__isabstractmethod__", False) or update in _SEE_NO_PADDING:
            return

        @functools.wraps(update)
        def without(self: Any, state: Any, batch: Any) -> Any:
            return update(self, state, without_padding(batch))

        _SEE_NO_PADDING.add(without)
        cls.update = without

    @abc.abstractmethod
    def init(self, batch: Any) -> Any:
        """Returns the state of no rows at all: a pytree of float32 and int32 arrays.

        Args:
          batch: A batch, or one of `jax.ShapeDtypeStruct`: only the shapes of its trailing dimensions are looked at.
        """

    @abc.abstractmethod
    def update(self, state: Any, batch: EvalBatch) -> Any:
        """Returns the state after one more batch, whose rows follow those already seen."""

    @abc.abstractmethod
    def merge(self, a: Any, b: Any) -> Any:
        """Returns the state of the rows of `a` followed by those of `b`."""

    @abc.abstractmethod
    def compute(self, state: Any) -> dict[str, float | np.ndarray]:
        """Returns the numbers and arrays of a host state, by flat key."""

    @abc.abstractmethod
    def definitions(self) -> dict[str, str]:
        """Returns one exact sentence for every key that `compute` can produce."""


def _check_class(cls: type[Metric]) -> None:
    if cls.name == "default":
        raise UserError(f"{registry.full_name(cls)}.name must not be default: metrics=[default] are several")


METRICS: registry.Registry[type[Metric]] = registry.Registry("metric", Metric, check=_check_class)
"""Every metric by its name."""

register = METRICS.register
"""Class decorator: enters a metric under its `name`."""


def without_padding(batch: Any) -> Any:
    """A batch whose rows of weight 0 hold zeros and nothing else: 0 times NaN, which padding may hold, is NaN.

    Args:
      batch: See `Metric`; `weight` None is a batch of real rows.

    Examples:
      >>> batch = EvalBatch(*[jnp.array([[1.0], [jnp.nan]])] * 2, base.Encoding(), jnp.array([1.0, 0.0]), None, None)
      >>> without_padding(batch).x.tolist()
      [[1.0], [0.0]]
    """
    if batch.weight is None:
        return batch
    xp = jnp if isinstance(batch.weight, jax.Array) else np
    real = batch.weight > 0

    def zeroed(rows: Any) -> Any:
        rows = xp.asarray(rows)
        return xp.where(real.reshape(-1, *[1] * (rows.ndim - 1)), rows, xp.zeros((), rows.dtype))

    per_row = [field.name for field in dataclasses.fields(batch) if field.name not in getattr(batch, "shared", ())]
    return dataclasses.replace(batch, **{name: jax.tree.map(zeroed, getattr(batch, name)) for name in per_row})


def total(values: Float[Array, "b"], weight: Float[Array, "b"]) -> Float[Array, ""]:
    """Sums one value per real row; what a padded row holds, even NaN, does not count."""
    return jnp.sum(jnp.where(weight > 0, values * weight, 0.0))


def dot(a: Float[Array, "b d_in"], b: Float[Array, "b d_in"]) -> Float[Array, "b"]:
    """Inner product of each row of `a` with the same row of `b`."""
    return jnp.sum(a * b, axis=-1)


def centred(
    x: Float[Array, "b d"], weight: Float[Array, "b"]
) -> tuple[Float[Array, ""], Float[Array, "d"], Float[Array, "b d"]]:
    """Number of real rows, their mean, and each row minus that mean, 0 on padding; exact where the mean is large."""
    real = weight[:, None] > 0
    x = jnp.where(real, x, 0.0)
    rows = jnp.sum(weight)
    w = (weight / jnp.maximum(rows, 1.0))[:, None]
    rough = jnp.sum(x * w, axis=0)
    # The second pass takes away what rounding left in the first: it matters when the mean dwarfs the spread.
    mean = rough + jnp.sum((x - rough[None, :]) * w, axis=0)
    return rows, mean, jnp.where(real, x - mean[None, :], 0.0)


def share_of_second(a_rows: Any, b_rows: Any) -> Any:
    """b_rows / (a_rows + b_rows), 0 for two empty states: with it means and scatter matrices merge (Chan et al. 1983).

    The mean of both is `a + shift * share` with `shift = b - a`; sums of products about the mean add up, plus
    `outer(shift, shift') * a_rows * share`.
    """
    rows = a_rows + b_rows
    return b_rows / (rows + (rows == 0))


@struct.dataclass
class Scatter:
    """Rows, their mean [d], and the sum of outer products about it [d, d]: a covariance that merges."""

    rows: jax.Array
    mean: jax.Array
    scatter: jax.Array

    @classmethod
    def none(cls, d: int) -> "Scatter":
        """Returns the state of no rows."""
        return cls(rows=jnp.zeros(()), mean=jnp.zeros(d), scatter=jnp.zeros((d, d)))

    @classmethod
    def of(cls, x: Float[Array, "b d"], weight: Float[Array, "b"]) -> "Scatter":
        """Returns the state of the real rows of `x`."""
        rows, mean, apart = centred(x, weight)
        return cls(rows=rows, mean=mean, scatter=jnp.matmul(apart.T, apart, precision=jax.lax.Precision.HIGHEST))

    def merged(self, other: "Scatter") -> "Scatter":
        """Returns the state of the rows of both."""
        share, shift = share_of_second(self.rows, other.rows), other.mean - self.mean
        return Scatter(
            rows=self.rows + other.rows,
            mean=self.mean + shift * share,
            scatter=self.scatter + other.scatter + shift[:, None] * shift[None, :] * (self.rows * share),
        )


def same_width(**arrays: Any) -> None:
    """Refuses arrays of different widths, which would broadcast, by their names."""
    widths = {name: list(array.shape[1:]) for name, array in arrays.items()}
    if any(width != next(iter(widths.values())) for width in widths.values()):
        raise UserError(f"{' and '.join(widths)} must have the same width, got {list(widths.values())}")


def ratio(numerator: Any, denominator: Any) -> float:
    """Quotient of two sums as a Python float; NaN, never an error, where the denominator is 0.

    Examples:
      >>> ratio(1.0, 4.0), ratio(1.0, 0.0)
      (0.25, nan)
    """
    return float(numerator) / float(denominator) if denominator else float("nan")
