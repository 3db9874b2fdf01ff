"""Formats of other tools, one file each: `export` writes one, `load` recognises and reads one.

A format is a module with

* `name`: its name in `format=` and in messages;
* `detect(path) -> bool`: whether a file or directory looks like it, from names and cheap looks inside; never raises;
* `load(path) -> SAE`: reads it and refuses whatever it does not understand (`strict` has the checks);
* `export(sae, path) -> path`, or `export = None` for a format that is only read;

and, where it can say that every row is normalised by itself, `row_norms = True`. `saejax.register` enters it.
"""

import dataclasses
import logging
import os
import pathlib
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import numpy as np

from saejax.errors import UserError
from saejax.evals import evaluate as evaluation
from saejax.fields import paths, registry
from saejax.interop import (
    circuit_tracer,
    dictionary_learning,
    gemma_scope,
    goodfire,
    llama_scope,
    llamascopium,
    neuronpedia,
    openai,
    qwen_scope,
    saelens,
    sparsify,
    strict,
)
from saejax.sae.model import SAE

logger = logging.getLogger(__name__)


@runtime_checkable
class Format(Protocol):
    """Interface of a format's module."""

    name: str
    detect: Callable[[pathlib.Path], bool]
    load: Callable[[str | os.PathLike], SAE]
    export: Callable[[SAE, str | os.PathLike], pathlib.Path] | None


_MODULES: tuple[Any, ...] = (
    saelens,
    dictionary_learning,
    sparsify,
    neuronpedia,
    gemma_scope,
    llamascopium,
    llama_scope,
    openai,
    goodfire,
    qwen_scope,
    circuit_tracer,
)

FORMATS: registry.Registry[Format] = registry.Registry("format", Format)
"""Every format by its name."""

for _module in _MODULES:
    FORMATS.register(_module)


def export(sae: SAE, path: str | os.PathLike, format: str = "saelens") -> pathlib.Path:
    """Writes an SAE in somebody else's format.

    Args:
      sae: The SAE.
      path: Directory to write; made where missing.
      format: One of FORMATS that can be written.

    Returns:
      The directory.

    Raises:
      UserError: the format is unknown, is only read, or cannot hold this architecture.
    """
    path = paths.local(path, "path")
    writers = {name: module.export for name, module in FORMATS.items() if module.export is not None}
    if format not in writers:
        only_read = " (it is only read)" if format in FORMATS else ""
        raise UserError(f"format={format}: must be one of {', '.join(writers)}{only_read}")
    sparsifier, params = sae.sparsifier.exported(sae.params)
    sae = dataclasses.replace(sae, sparsifier=sparsifier, params=params)
    if sparsifier.row_norm is not None and not getattr(FORMATS[format], "row_norms", False):
        raise UserError(
            f"format={format}: this SAE normalises every row by itself (normalize.mode=layer_norm), which the format "
            "does not say; train with unit, sqrt_d or whiten to export"
        )
    return writers[format](sae, path)


def recognise(path: str | os.PathLike) -> str:
    """Returns the name of the one format that a file or directory is in.

    Raises:
      UserError: there is nothing, no format fits, or several do.
    """
    path = paths.local(path, "path")
    if not path.exists():
        raise UserError(f"{path}: no such file or directory, so none of the known formats ({', '.join(FORMATS)})")
    fitting = [name for name, module in FORMATS.items() if module.detect(path)]
    if not fitting:
        raise UserError(f"{path}: none of the known formats ({', '.join(FORMATS)})")
    if len(fitting) > 1:
        raise UserError(f"{path}: could be {' or '.join(fitting)}; say format= (one of {', '.join(FORMATS)})")
    return fitting[0]


def load(path: str | os.PathLike, format: str | None = None) -> SAE:
    """Reads an SAE in any of FORMATS.

    Args:
      path: File or directory.
      format: Its format; None finds out.

    Returns:
      The SAE; `provenance["format"]` says which format it was.

    Raises:
      UserError: no format recognises `path`, several do, or one does and finds it wrong.
    """
    if format is not None and format not in FORMATS:
        raise UserError(f"format={format}: must be one of {', '.join(FORMATS)}")
    format = recognise(path) if format is None else format
    try:
        with np.errstate(over="ignore", invalid="ignore"):  # of scales and norms; what is not finite is refused
            sae = FORMATS[format].load(path)
    except (UserError, OSError) as error:  # which may quote what is in the file
        raise UserError(strict.one_line(error)) from None
    config = sae.sparsifier
    logger.info("%s: read as %s, %s with d_in=%d, d_sae=%d", path, format, config.name, config.d_in, config.d_sae)
    return SAE(config, sae.params, sae.provenance | {"format": format})


CHECKED_ROWS = 65_536
"""Default number of rows that `self_check` reads."""


def self_check(sae: SAE, activations: Any, max_rows: int | None = CHECKED_ROWS) -> dict[str, float]:
    """Measures an imported SAE on activations that it was made for.

    An fvu near 0 and an L0 near the published one mean that hook, scale and biases are right. An fvu near or above 1
    means that one of them is wrong.

    Args:
      sae: The SAE.
      activations: Array [..., d_in], an `ActivationSource`, or blocks of rows.
      max_rows: Rows looked at; None for all.

    Returns:
      l0 (mean number of active latents in a row), fvu (squared error over squared distance from the mean).
    """
    measured = evaluation.evaluate(sae, activations, max_rows=max_rows)
    found = {"l0": float(measured["l0"]), "fvu": float(measured["fvu"])}
    kind = sae.provenance.get("format", sae.sparsifier.name)
    logger.info("self-check of %s: l0 %.4g, fvu %.4g", kind, found["l0"], found["fvu"])
    return found
