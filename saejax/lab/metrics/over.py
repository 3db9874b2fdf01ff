"""Metrics over whole arrays: cut into blocks, summed on the devices, merged on the host.

`evals.evaluate` streams rows through an SAE. Here the caller passes a metric's batch (true codes beside found ones,
pairs of inputs, labels) as a whole, and its rows may be split over devices.
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from saejax.errors import UserError
from saejax.evals import metric
from saejax.evals.result import EvalResult
from saejax.parallel import sharding


def over(m: metric.Metric, batch: Any, *, rows: int | None = None, mesh: Mesh | None = None) -> EvalResult:
    """Measures whole arrays with one metric.

    Args:
      m: The metric.
      batch: A struct of type `m.batch_type` over all rows; `weight` None counts every row.
      rows: Rows per update; None takes all at once. The value does not depend on it.
      mesh: Its axis `data` splits the rows of an update; None for the default device. A metric `on_host` ignores it.

    Returns:
      The numbers of `m.compute`, with their definitions.

    Raises:
      UserError: no rows, `rows` below 1, fields of different lengths or widths, or values that are not finite in rows
        of weight above 0.
    """
    if rows is not None and rows < 1:
        raise UserError(f"rows must be at least 1, got {rows}")
    fields = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    shared = {name: fields.pop(name) for name in getattr(batch, "shared", ())}
    n = _n_rows(fields)
    if fields["weight"] is None:
        fields["weight"] = np.ones(n, np.float32)
    n_real = int((np.asarray(fields["weight"]) > 0).sum())
    if not n_real:
        raise UserError("there are no rows to measure: every weight is 0")
    _check_finite(shared)
    _check_finite(_real(fields))
    n_data = 1 if mesh is None or m.on_host else mesh.shape[sharding.DATA]
    size = -(-(n if rows is None else rows) // n_data) * n_data
    merged = None
    for start in range(0, n, size):
        block = jax.tree.map(lambda a, at=start: np.asarray(a[at : at + size]), fields)
        piece = type(batch)(**(_real(block) if m.on_host else _padded(block, size)), **shared)
        try:
            state = _wide(m.update(m.init(piece), piece) if m.on_host else _summed(m, mesh)(piece))
        except UserError:
            raise
        except (TypeError, ValueError) as error:  # what JAX and NumPy say of shapes names no argument
            shapes = {
                name: [list(np.shape(leaf)) for leaf in jax.tree.leaves(a)] for name, a in (fields | shared).items()
            }
            raise UserError(f"the arrays of {m.name} must fit each other, got {shapes}") from error
        merged = state if merged is None else m.merge(merged, state)
    return EvalResult.of(m.compute(merged), m.definitions(), {"rows": n_real})


@functools.lru_cache(maxsize=64)
def _summed(m: metric.Metric, mesh: Mesh | None) -> Any:
    """Compiled: the state of one block alone, replicated."""

    def sums(piece: Any) -> Any:
        return m.update(m.init(piece), piece)

    if mesh is None:
        return jax.jit(sums)
    compiled = jax.jit(sums, out_shardings=NamedSharding(mesh, P()))
    by_row, whole = NamedSharding(mesh, P(sharding.DATA)), NamedSharding(mesh, P())

    def placed(piece: Any) -> Any:
        shared = getattr(piece, "shared", ())
        put = {
            f.name: jax.device_put(getattr(piece, f.name), whole if f.name in shared else by_row)
            for f in dataclasses.fields(piece)
        }
        with jax.set_mesh(mesh):
            return compiled(type(piece)(**put))

    return placed


def _n_rows(fields: dict[str, Any]) -> int:
    """The common length of all per-row fields."""
    lengths = {name: len(leaf) for name, value in fields.items() for leaf in jax.tree.leaves(value)}
    if not lengths or 0 in lengths.values():
        raise UserError("there are no rows to measure: the arrays are empty")
    if len(set(lengths.values())) > 1:
        raise UserError(f"all arrays must have the same number of rows, got {lengths}")
    return next(iter(lengths.values()))


def _check_finite(fields: dict[str, Any]) -> None:
    """Refuses NaN and infinities, by the name of the field."""
    for name, value in fields.items():
        for leaf in jax.tree.leaves(value):
            if np.asarray(leaf).dtype.kind == "f" and not np.isfinite(np.asarray(leaf)).all():
                raise UserError(f"{name} must be finite, got NaN or infinity")


def _padded(block: dict[str, Any], size: int) -> dict[str, Any]:
    """Rows of zeros, and so of weight 0, up to the common size: one compiled program serves all blocks."""
    return jax.tree.map(lambda a: np.pad(a, [(0, size - len(a))] + [(0, 0)] * (a.ndim - 1)), block)


def _real(block: dict[str, Any]) -> dict[str, Any]:
    """The rows that count."""
    keep = np.asarray(block["weight"]) > 0
    return jax.tree.map(lambda a: np.asarray(a)[keep], block)


def _wide(state: Any) -> Any:
    """A state on the host, in float64 and int64, so that many blocks add up without rounding."""
    kinds = {"f": np.float64, "i": np.int64, "u": np.int64}
    return jax.tree.map(lambda a: np.asarray(a).astype(kinds.get(np.asarray(a).dtype.kind, np.asarray(a).dtype)), state)
