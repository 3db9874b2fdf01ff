"""Attention sinks: the few tokens with huge, similar activations, which get no row.

In most language models the first token of a sequence and a few early tokens absorb attention that has no other target.
Their activations are a hundred times longer than the others and hold most of the variance. An autoencoder trained on
them learns little else. The same rule must hold wherever activations are used. So the harvest fixes it once, the
store's manifest records it, and evaluation and splicing read it.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Bool, Float, Int

from saejax.errors import UserError

ArrayT = TypeVar("ArrayT", bound=Any)  # NumPy on the host, JAX under jit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sink:
    """The rule: what counts as a sink at one hook of one model, or at any of several."""

    factor: float | None = 10.0
    """A token is a sink if its norm exceeds `factor` x `median_norm` at any hook. None keeps tokens of any norm."""

    median_norm: float | tuple[float, ...] | None = None
    """Median norm at the hook, or at each of several, measured by `calibrate`; needed unless `factor` is None."""

    mask_position_zero: bool = True
    """Whether the first token of every segment counts as a sink whatever its norm."""

    calibration_tokens: int = 4096
    """How many tokens the median is taken over: the first ones of the training text."""

    def __post_init__(self):
        if isinstance(self.median_norm, list):  # as JSON has it
            object.__setattr__(self, "median_norm", tuple(self.median_norm))
        if self.factor is not None and not self.factor > 1:
            raise UserError(f"sink_factor must be above 1 or null, got {self.factor}")
        if self.calibration_tokens < 1:
            raise UserError(f"sink_calibration_tokens must be positive, got {self.calibration_tokens}")

    def to_json(self) -> dict:
        """The manifest's `sink` entry; `Sink(**entry)` reads it back."""
        return dataclasses.asdict(self)


def keep_mask(
    norms: Float[ArrayT, "*sites_b s"], positions: Int[ArrayT, "*b s"], segments: Int[ArrayT, "*b s"], sink: Sink
) -> Bool[ArrayT, "*b s"]:
    """Mask of the tokens that get a row: neither padding nor sink. Pure; NumPy arrays or JAX arrays, also traced.

    Args:
      norms: Euclidean norm of each token's activation at the hook; [sites, *b, s] if the rule has several medians.
      positions: position of each token in its segment, from 0.
      segments: segment of each token, 0 for padding.
      sink: the rule, with its median measured.

    Returns:
      True where the token is kept. A norm that is NaN is kept, so that it is found and not hidden.

    >>> norms = np.array([900.0, 170.0, 2000.0, 180.0])
    >>> rule = Sink(factor=10.0, median_norm=170.0)
    >>> keep_mask(norms, np.array([0, 1, 2, 3]), np.array([1, 1, 1, 0]), rule).tolist()
    [False, True, False, False]
    """
    keep = segments > 0
    if sink.mask_position_zero:
        keep = keep & (positions > 0)
    if sink.factor is not None:
        if sink.median_norm is None:
            raise ValueError("the sink rule has a factor but its median was not measured")
        median = sink.median_norm
        medians, at_hooks = (median, norms) if isinstance(median, tuple) else ((median,), (norms,))
        if norms.ndim - positions.ndim != isinstance(median, tuple):
            raise UserError(
                f"the sink rule has {len(medians)} hooks, the norms have shape {norms.shape}: give one array for each"
            )
        for one, at_hook in zip(medians, at_hooks, strict=True):
            keep = keep & ~(at_hook > sink.factor * one)
    return keep


def calibrate(sink: Sink, measured: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Sink:
    """Measures the median norm over the first `calibration_tokens` tokens that the other rules keep.

    Args:
      sink: the rule without its median.
      measured: (norms, positions, segments) of batch after batch, norms [b, s] or [sites, b, s]; only as many are
        taken as are needed.

    Returns:
      The rule with `median_norm`, a tuple for several sites. The median, not the mean: sinks are among the tokens it
      is taken over.
    """
    if sink.factor is None:
        return sink
    others = dataclasses.replace(sink, factor=None)
    norms: list[np.ndarray] = []
    missing = sink.calibration_tokens
    for batch in measured:
        norms.append(batch[0][..., keep_mask(*batch, others)][..., :missing])
        missing -= norms[-1].shape[-1]
        if missing <= 0:
            break
    median = np.median(np.concatenate(norms, axis=-1), axis=-1) if missing < sink.calibration_tokens else np.nan
    if not np.all(np.isfinite(median) & (median > 0)):
        raise UserError(f"the activations' median norm is {median}: sinks cannot be told; set sink_factor=null")
    return dataclasses.replace(sink, median_norm=np.asarray(median).tolist())
