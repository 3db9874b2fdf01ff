r"""Round-trip error of a normaliser: \(\max |\mathrm{denorm}(\mathrm{norm}(x)) - x|\), at most 1e-5 of the data."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from saejax.evals import metric


@struct.dataclass
class RoundTripBatch:
    """Rows `x` and what came back, `returned`, both [b, d]; `weight` [b]."""

    shared: ClassVar[tuple[str, ...]] = ()

    x: jax.Array
    returned: jax.Array
    weight: jax.Array | None = None


@struct.dataclass
class RoundTripState:
    """Largest |returned - x| and largest |x| so far, scalars; maxima, not sums."""

    error: jax.Array
    size: jax.Array


@metric.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundTrip(metric.Metric):
    """Largest error of normalising and undoing it."""

    name: ClassVar[str] = "round_trip"
    batch_type: ClassVar[type] = RoundTripBatch

    def init(self, batch: RoundTripBatch) -> RoundTripState:
        metric.same_width(x=batch.x, returned=batch.returned)
        return RoundTripState(error=jnp.zeros(()), size=jnp.zeros(()))

    def update(self, state: RoundTripState, batch: Any) -> RoundTripState:
        real = batch.weight[:, None] > 0
        error, size = (jnp.max(jnp.where(real, jnp.abs(a), 0.0)) for a in (batch.returned - batch.x, batch.x))
        return self.merge(state, RoundTripState(error=error, size=size))

    def merge(self, a: RoundTripState, b: RoundTripState) -> RoundTripState:
        return jax.tree.map(lambda p, q: p * (p >= q) + q * (p < q), a, b)

    def compute(self, state: RoundTripState) -> dict[str, float | np.ndarray]:
        return {
            "round_trip_max": float(state.error),
            "round_trip_relative": metric.ratio(state.error, state.size),
        }

    def definitions(self) -> dict[str, str]:
        return {
            "round_trip_max": "Largest |returned - x| over all rows and dimensions.",
            "round_trip_relative": "round_trip_max over the largest |x|.",
        }
