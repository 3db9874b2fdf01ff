"""Evaluation loop: adds up every metric's sums on the devices and returns numbers once at the end.

One compiled update serves every batch; rows of weight 0 pad the last one. Rows are split over the mesh axis `data`.
The update's results are replicated, so the compiled program adds the shards' partial sums. Over a few batches these
sums are float32 and int32. The host merges such chunks in float64 and int64, one chunk late. So neither the size of
the data nor the precision of the devices shows in the result.
"""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from saejax.errors import UserError
from saejax.evals import finite, metric, reconstruction, recovery, shrinkage, site_error, sparsity
from saejax.evals.result import EvalResult, write_json
from saejax.parallel import sharding, signals
from saejax.sae import base

__all__ = [
    "EvalResult",
    "Evaluator",
    "default_metrics",
    "evaluate",
    "evaluate_rows",
    "light_metrics",
    "make_evaluator",
    "recovered",
    "write_json",
]

_CHUNK_BATCHES = 16
"""Batches summed in float32 before the host takes over: few enough that rounding stays below 1e-6."""


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluator:
    """A compiled evaluation of one architecture; made by `make_evaluator`.

    Attributes:
      sparsifier: Architecture.
      metrics: What is measured.
      mesh: Where, or None for the default device.
      init: () -> states of all metrics.
      update: (params, mean, scale, states, rows, weight) -> states; compiled once for each batch size. `params` work on
        (rows - mean) * scale, `rows` [b, d_row] are in the data's own scale, `weight` [b] is 1 for rows and 0 for
        padding; `states` are donated.
    """

    sparsifier: base.Sparsifier
    metrics: tuple[metric.Metric, ...]
    mesh: Mesh | None
    init: Callable[[], Any]
    update: Callable[..., Any]

    def evaluate(
        self,
        params: base.SAEParams,
        batches: Iterable[Float[np.ndarray, "_ d_row"]],
        *,
        mean: Float[Array, "d_row"] | np.ndarray | None = None,
        scale: Float[Array, "..."] | np.floating | None = None,
        batch_rows: int | None = None,
    ) -> EvalResult:
        """Measures one set of parameters on finite data.

        Args:
          params: Parameters of an SAE that works on (rows - mean) * scale.
          batches: Rows, of all sites, in the data's own scale, in blocks of any size and any float dtype.
          mean: Subtracted from rows; None for 0.
          scale: Multiplies what remains, a number or [d_row]; None for 1.
          batch_rows: Rows per compiled call, rounded up to a multiple of the mesh axis `data`; None for the size of the
            first block.

        Returns:
          The metrics; their values do not depend on `batch_rows`, except the one whose name ends in `_legacy`.

        Raises:
          UserError: no rows, or rows of another width.
        """
        if self.mesh is not None:
            params = sharding.placed(self.mesh, params)
        mean = np.zeros(self.sparsifier.d_row, np.float32) if mean is None else mean
        scale = np.float32(1.0) if scale is None else scale
        states, pending, merged, rows, size = None, None, None, 0, 0
        for index, (x, weight) in enumerate(self._padded(batches, batch_rows)):
            signals.check()  # where all processes of an evaluation stop alike
            rows, size = rows + int(weight.sum()), len(weight)
            if index % _CHUNK_BATCHES == 0:
                merged, pending, states = self._take(merged, pending), states, self.init()
            with _on(self.mesh):
                states = self.update(params, mean, scale, states, self._put(x), self._put(weight))
        if not rows:
            raise UserError("there are no rows to evaluate: the source of held-out activations is empty")
        merged = self._take(self._take(merged, pending), states)
        return self._result(merged, {"rows": rows, "batch_rows": size})

    def _padded(self, blocks: Iterable[np.ndarray], batch_rows: int | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Cuts blocks of any size into float32 batches [batch_rows, d_row] with their weights; order is kept."""
        n_data = 1 if self.mesh is None else self.mesh.shape[sharding.DATA]
        width, filled, x = self.sparsifier.d_row, 0, np.zeros((0, self.sparsifier.d_row), np.float32)
        for block in blocks:
            block = np.asarray(block)
            if block.ndim < 1 or block.shape[-1] != width:
                raise UserError(_of_another_width(self.sparsifier, block))
            block = block.reshape(-1, width)
            if not len(x):
                size = -(-(batch_rows or len(block)) // n_data) * n_data
                x = np.zeros((size, width), np.float32)
            while len(block):
                taken = block[: len(x) - filled]
                x[filled : filled + len(taken)] = taken
                filled, block = filled + len(taken), block[len(taken) :]
                if filled == len(x):
                    yield x, np.ones(len(x), np.float32)
                    # A new array: the transfer to the devices may still be reading the old one.
                    filled, x = 0, np.zeros_like(x)
        if filled:
            yield x, (np.arange(len(x)) < filled).astype(np.float32)

    def _put(self, rows: np.ndarray) -> jax.Array:
        """Places a batch, split over `data`; every process holds all of it and hands over its part."""
        if self.mesh is None:
            return jnp.asarray(rows)
        placed = NamedSharding(self.mesh, P(sharding.DATA))
        return jax.make_array_from_callback(rows.shape, placed, lambda index: rows[index])

    def _take(self, merged: Any, states: Any) -> Any:
        """Merges the sums of one chunk into those on the host."""
        if states is None:
            return merged
        wide = jax.tree.map(lambda a: np.asarray(a, np.float64 if a.dtype.kind == "f" else np.int64), states)
        if merged is None:
            return wide
        return tuple(m.merge(a, b) for m, a, b in zip(self.metrics, merged, wide, strict=True))

    def _result(self, states: Any, data: dict[str, Any]) -> EvalResult:
        """The numbers of merged sums."""
        values, definitions = {}, {}
        for m, state in zip(self.metrics, states, strict=True):
            computed, said = m.compute(state), m.definitions()
            if unsaid := [key for key in computed if key not in said]:
                raise UserError(f"metric {m.name}: definitions() must say what {', '.join(unsaid)} is")
            if twice := [key for key in computed if key in values]:
                raise UserError(f"metric {m.name}: {', '.join(twice)} is already computed by another metric")
            values.update(computed)
            definitions.update(said)
        return EvalResult.of(values, definitions, data)


def default_metrics(sparsifier: base.Sparsifier | None = None) -> tuple[metric.Metric, ...]:
    """Every metric of rows, with its usual settings; for an SAE that writes several sites also the fvu of each."""
    return (
        reconstruction.Reconstruction(),
        reconstruction.FvuBatchLegacy(),
        reconstruction.EvLegacy(),
        sparsity.Firing(),
        sparsity.Activity(),
        shrinkage.Norms(),
        shrinkage.NormSlope(),
        shrinkage.Gain(),
        *_per_site(sparsifier),
    )


def named_metrics(
    names: Iterable[str | metric.Metric], sparsifier: base.Sparsifier | None = None
) -> tuple[metric.Metric, ...]:
    """Metrics of rows by name, with their default settings.

    Args:
      names: of `metric.METRICS`; `default` stands for `default_metrics`; metrics themselves stay as they are.
      sparsifier: Architecture.

    Raises:
      UserError: no such metric, or one that does not look at rows.
    """
    found: dict[metric.Metric, None] = {}
    for name in names:
        if isinstance(name, metric.Metric):
            found[name] = None
        elif name == "default":
            found |= dict.fromkeys(default_metrics(sparsifier))
        elif name in (known := _of_rows()):
            found[known[name]()] = None
        else:
            unfit = ", which needs settings or other batches" if name in metric.METRICS else ""
            raise UserError(f"metrics must be default or of {', '.join(known)}, got {name}{unfit}")
    return tuple(found)


def _of_rows() -> dict[str, type[metric.Metric]]:
    """Metrics that `Evaluator` can run and that need no settings."""

    def fits(cls: type[metric.Metric]) -> bool:
        settings = inspect.signature(cls).parameters.values()
        complete = all(setting.default is not inspect.Parameter.empty for setting in settings)
        return cls.batch_type is metric.EvalBatch and not cls.on_host and complete

    return {name: cls for name, cls in metric.METRICS.items() if fits(cls)}


def light_metrics(sparsifier: base.Sparsifier | None = None) -> tuple[metric.Metric, ...]:
    """Metrics of the evaluations in training: mse, fvu (of each site), cosine, l0, dead and dense shares."""
    return reconstruction.Reconstruction(), sparsity.Firing(windows=()), *_per_site(sparsifier)


def _per_site(sparsifier: base.Sparsifier | None) -> tuple[metric.Metric, ...]:
    if sparsifier is None or len(sparsifier.writes) < 2:
        return ()
    return (site_error.SiteError(widths=sparsifier.writes),)


@functools.lru_cache(maxsize=16)
def make_evaluator(
    sparsifier: base.Sparsifier, metrics: tuple[metric.Metric, ...], mesh: Mesh | None = None
) -> Evaluator:
    """Builds the compiled evaluation of an architecture; the same arguments give the same object, compiled once.

    Args:
      sparsifier: Architecture.
      metrics: What to measure, from `default_metrics()`, `light_metrics()` or one's own.
      mesh: With axes `data` and `latent`; None for the default device.

    Returns:
      An evaluator; `evaluator.evaluate(params, batches, mean=..., scale=...)` runs it.

    Raises:
      UserError: the mesh cannot split the latents evenly.
    """
    if mesh is not None:
        sharding.check_divides(mesh, n_lanes=mesh.shape[sharding.DATA], d_sae=sparsifier.d_sae)

    def observe(params, mean, scale, rows, weight) -> metric.EvalBatch:
        x, _ = sparsifier.split((rows - mean[None, :]) * _as_row(scale))
        (_, mean), (_, target) = sparsifier.split(mean), sparsifier.split(rows)
        scale = scale if jnp.ndim(scale) == 0 else sparsifier.split(scale)[1]
        encoding = sparsifier.encode(params, x)
        recon = sparsifier.add_skip(params, sparsifier.decode(params, encoding), x)
        return metric.EvalBatch(
            x=target,
            recon=recon / _as_row(scale) + mean[None, :],
            encoding=encoding,
            weight=weight,
            W_dec=params.W_dec / _as_row(scale),
            b_dec=params.b_dec / scale + mean,
        )

    def init() -> Any:
        row = jax.ShapeDtypeStruct((1, sparsifier.d_row), jnp.float32)
        params = jax.eval_shape(sparsifier.init, jax.eval_shape(lambda: jax.random.key(0)))
        batch = jax.eval_shape(observe, params, jnp.zeros(sparsifier.d_row), jnp.ones(()), row, jnp.ones(1))
        return tuple(m.init(batch) for m in metrics)

    def update(params, mean, scale, states, rows, weight):
        batch = observe(params, mean, scale, rows, weight)
        return tuple(m.update(state, batch) for m, state in zip(metrics, states, strict=True))

    placed = None if mesh is None else NamedSharding(mesh, P())
    return Evaluator(
        sparsifier=sparsifier,
        metrics=metrics,
        mesh=mesh,
        init=jax.jit(init, out_shardings=placed),
        update=jax.jit(update, out_shardings=placed, donate_argnames="states"),
    )


def evaluate_rows(
    sae: Any,
    batches: Iterable[Float[np.ndarray, "_ d_row"]],
    metrics: Iterable[str | metric.Metric] | None = None,
    *,
    mesh: Mesh | None = None,
    batch_rows: int | None = None,
) -> EvalResult:
    """Measures a finished SAE on finite rows.

    Args:
      sae: With `config` (the sparsifier) and `params`, in the data's own scale; see `sae.model.SAE`.
      batches: Rows in the data's own scale, in blocks of any size.
      metrics: Metrics or their names; None for `default_metrics()`.
      mesh: Where to run; None for the default device.
      batch_rows: Rows per compiled call; None for the size of the first block.

    Returns:
      The metrics, a dict; arrays and definitions are attributes.

    Raises:
      UserError: no rows, or rows of another width.
    """
    metrics = named_metrics(("default",) if metrics is None else metrics, sae.config)
    return make_evaluator(sae.config, metrics, mesh).evaluate(sae.params, batches, batch_rows=batch_rows)


def evaluate(
    sae: Any,
    activations: Any,
    *,
    batch_rows: int = 4096,
    max_rows: int | None = None,
    metrics: Iterable[str | metric.Metric] | None = None,
    mesh: Mesh | None = None,
) -> EvalResult:
    """Returns the held-out metrics of one SAE on any array, source or stream of arrays.

    Args:
      sae: With `config` and `params`, in the data's own scale.
      activations: An array [..., d_row], an iterable of such arrays, or a source. Of a source the held-out rows are
        used; if it knows its true features, the recovery of the dictionary is measured too. d_row is d_in, except for
        transcoders: their rows hold the input and then the target.
      batch_rows: Rows per compiled call.
      max_rows: Rows to use at most; None for all of them.
      metrics: Metrics or their names; None for `default_metrics()`.
      mesh: Where to run; None for the default device.

    Returns:
      A dict of numbers by flat key; `.arrays`, `.definitions` and `.data` hold the rest.

    Raises:
      UserError: no rows, rows of another width, or an array or block that is not of finite numbers.
    """
    if hasattr(activations, "heldout"):
        blocks = activations.heldout(batch_rows, max_rows)
    elif hasattr(activations, "ndim"):
        blocks = finite.blocks(_in_batches(activations, sae.config, batch_rows))
    elif isinstance(activations, (str, bytes, dict)) or not hasattr(activations, "__iter__"):
        raise UserError(f"activations must be an array, a source or blocks of rows, got {type(activations).__name__}")
    else:
        blocks = finite.blocks(activations)
    result = evaluate_rows(sae, _first_rows(blocks, max_rows), metrics, mesh=mesh, batch_rows=batch_rows)
    if hasattr(activations, "features"):
        result = result.joined(recovered(sae, activations.features()))
    return result


def _of_another_width(sparsifier: base.Sparsifier, rows: Any) -> str:
    width, shape = sparsifier.d_row, list(rows.shape)
    name = "d_in" if width == sparsifier.d_in else "d_row"
    hint = "; is the array transposed?" if shape == [width, *shape[1:2]] else ""
    return f"activations must be [rows, {name}={width}] for this SAE, got {shape}{hint}"


def _in_batches(rows: Any, sparsifier: base.Sparsifier, batch_rows: int) -> Iterator[Any]:
    """The rows of an array [..., d_row]."""
    if rows.ndim < 1 or rows.shape[-1] != sparsifier.d_row:
        raise UserError(_of_another_width(sparsifier, rows))
    rows = rows.reshape(-1, sparsifier.d_row)
    return (rows[i : i + batch_rows] for i in range(0, len(rows), batch_rows))


def recovered(sae: Any, features: Float[np.ndarray, "n_features d_row"]) -> EvalResult:
    """Returns how well the decoder of an SAE recovers known features, as a result to join with others."""
    _, written = sae.config.split(np.asarray(features))
    values = recovery.dictionary_recovery(np.asarray(sae.params.W_dec), written)
    return EvalResult.of(values, recovery.DEFINITIONS)


def _first_rows(blocks: Iterable[Any], max_rows: int | None) -> Iterator[np.ndarray]:
    """The first `max_rows` rows of a stream of blocks."""
    left = float("inf") if max_rows is None else max_rows
    for block in blocks:
        block = np.asarray(block)
        block = block.reshape(-1, block.shape[-1])
        yield block if len(block) <= left else block[: int(left)]
        left -= len(block)
        if left <= 0:
            return


def _as_row(scale: Any) -> Any:
    """A scale to multiply rows with: a number as it is, one number per column as a row."""
    return scale if jnp.ndim(scale) == 0 else scale[None, :]


def _on(mesh: Mesh | None) -> Any:
    """The mesh as context, so that kernels see its axes; nothing without one."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)
