"""The papers' claims, each as one program that ends in a figure and a table of passes and failures.

Sixth station: everything below may be used, nothing below knows of it. `all_experiments()` finds every one.
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
