"""Data for evaluating a finished run: its own, or others that the user names."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from saejax import config
from saejax.activations import array_files, store, text
from saejax.activations.source import ActivationSource
from saejax.activations.store import files as store_format
from saejax.activations.store import source as store_source
from saejax.errors import UserError
from saejax.fields import paths
from saejax.runs import directory
from saejax.sae import Family, model

logger = logging.getLogger(__name__)


def compare(run_dir: Path, source: ActivationSource, step: int | None = None, *, any_data: bool) -> str | None:
    """Compares the data of an evaluation with the run's training data.

    Args:
      run_dir: of the run.
      source: what lies at its path now.
      step: of the checkpoint that is looked at; None takes the newest.
      any_data: whether others are taken too.

    Returns:
      None where they are the same, or the run has no record of them; else what differs.

    Raises:
      UserError: they differ, and may not.
    """
    differs = directory.data_differ(run_dir, source, step)
    if differs is None:
        return None
    if not any_data:
        raise UserError(f"{differs}; restore the data, or continue with any_data=true")
    logger.warning("%s; continuing because of any_data=true", differs)
    return differs


def rows(path: str | os.PathLike[str], sae: model.SAE, check: int = 0) -> Iterator[np.ndarray] | store_source.Store:
    """The rows that `activations=` names: the held-out part of a store, or all of some arrays.

    Args:
      path: a store, a .npy or .safetensors file, or a directory of .npy files.
      sae: what they are for.
      check: rows of an array that are looked at now, because the work before they are measured may be long.

    Raises:
      UserError: none there, or of another width; one of those looked at is not finite.
    """
    where, folder = f"activations = {path}", paths.local(path, "activations")
    if (folder / store_format.MANIFEST).is_file():
        raise UserError(f"{where}: is a part of a store; give the directory that holds it, {folder.parent}")
    if any((folder / split / store_format.MANIFEST).is_file() for split in text.SPLITS):
        if not (folder / "heldout").is_dir():
            raise UserError(f"{where}: this store lacks the heldout/ part that is measured")
        return store_source.Store(path=str(folder))
    table, width = array_files.open_table(folder, field="activations"), sae.sparsifier.d_row
    if table.shape[1] != width:
        hint = f"; is the array [{width}, n], transposed?" if table.shape[0] == width else ""
        raise UserError(f"{where}: rows of width {width} are needed for this SAE, got shape {table.shape}{hint}")
    for _ in table.blocks(_ROWS_AT_ONCE, stop=check):
        pass
    return table.blocks(_ROWS_AT_ONCE)


_ROWS_AT_ONCE = 4096


def text_of(run_dir: Path, step: int, *, any_data: bool) -> store.Reader | None:
    """The held-out store that a run's latents are shown on; a line where there is none any more."""
    trained = config.from_run(run_dir)
    source = trained.source
    if isinstance(source, store_source.Store) and not any(
        (Path(source.path) / split).is_dir() for split in text.SPLITS
    ):
        logger.warning("without text: the store of the run is no longer at %s", source.path)
        return None
    heldout = heldout_store(trained)
    if heldout is not None:
        compare(run_dir, trained.source, step, any_data=any_data)
    return heldout


def heldout_store(trained: config.Config) -> store.Reader | None:
    """The held-out activations of an SAE that was trained on a store of one hook; a line where it is of several."""
    source = trained.source
    heldout = source.reader("heldout") if isinstance(source, store_source.Store) else None
    if heldout is not None and len(heldout.hooks) > 1:
        hooks = " and ".join(heldout.hooks)
        logger.warning(
            "without text and language model, which need a store of one hook: %s has %s", heldout.path, hooks
        )
        return None
    if heldout is not None and trained.sae.family is not Family.sae:
        name = trained.sae.family.name
        logger.warning("without text and language model, which need family=sae: this run is of family=%s", name)
        return None
    return heldout
