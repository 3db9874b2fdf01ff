"""Result of an evaluation: numbers by flat key, arrays, definitions, and the file `eval.json`."""

import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from saejax.storage import atomic


class EvalResult(dict[str, float]):
    """Metrics of one evaluation: a flat dict of numbers, with arrays and definitions as attributes.

    Attributes:
      arrays: Metrics that are arrays (`firing_rate`, `gain`, the density histogram), by flat key.
      definitions: One exact sentence for each key of the numbers and of the arrays.
      data: Record of the evaluated data: rows, batch_rows, and the caller's additions.
    """

    def __init__(
        self,
        metrics: dict[str, float],
        *,
        arrays: dict[str, np.ndarray] | None = None,
        definitions: dict[str, str] | None = None,
        data: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(metrics)
        self.arrays, self.definitions, self.data = arrays or {}, definitions or {}, data or {}

    def joined(self, other: "EvalResult") -> "EvalResult":
        """Returns both results as one; keys of `other` win where both have one."""
        return EvalResult(
            {**self, **other},
            arrays={**self.arrays, **other.arrays},
            definitions={**self.definitions, **other.definitions},
            data={**self.data, **other.data},
        )

    @classmethod
    def of(
        cls,
        values: Mapping[str, float | np.ndarray],
        definitions: Mapping[str, str],
        data: dict[str, Any] | None = None,
    ) -> "EvalResult":
        """Sorts values into numbers and arrays, and keeps their definitions."""
        arrays = {key: value for key, value in values.items() if isinstance(value, np.ndarray)}
        numbers = {key: float(value) for key, value in values.items() if key not in arrays}
        return cls(numbers, arrays=arrays, definitions={key: definitions[key] for key in values}, data=data)


def write_json(result: EvalResult, path: str | os.PathLike[str]) -> None:
    """Writes a result as `{"metrics", "arrays", "definitions", "data"}`, all of it or nothing; NaN becomes null."""
    content = {
        "metrics": {key: _plain(value) for key, value in result.items()},
        "arrays": {key: _plain(value.tolist()) for key, value in result.arrays.items()},
        "definitions": result.definitions,
        "data": result.data,
    }
    atomic.write(path, json.dumps(content, indent=1, allow_nan=False))


def _plain(value: Any) -> Any:
    """A JSON value: numbers that JSON cannot write become None."""
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
