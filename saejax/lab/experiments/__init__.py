"""Experiments: each tests a claim of the papers and ends in a figure and a table of passes and failures.

Sixth station: an experiment may use every package below it, and none of them knows it. `all_experiments()` lists them.
"""

import importlib
import pkgutil
from typing import Any


def all_experiments() -> dict[str, Any]:
    """Every experiment class by its name, sorted: imports each module of this package."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    registry = importlib.import_module(f"{__name__}.harness").EXPERIMENTS
    return dict(sorted(registry.items()))
