"""Sparse coding with a known or learned dictionary: solvers, refitting, inference-time optimisation of SAEs."""

from typing import Any

from saejax.sparse_coding.infer import METHODS as METHODS
from saejax.sparse_coding.infer import infer as infer
from saejax.sparse_coding.inference_time import encode as encode
from saejax.sparse_coding.refit import refit as refit
from saejax.sparse_coding.solution import Solution as Solution


def __getattr__(name: str) -> Any:
    """Loads dictionary learning when it is first asked for."""
    if name in {"learn", "Learned", "Learning"}:
        from saejax.sparse_coding import learning

        return getattr(learning, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
