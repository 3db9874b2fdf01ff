"""OpenAI autoencoders of GPT-2 small and similar: one `.pt` file, TopK or ReLU.

A TopK one normalises every row first (subtracts the mean, divides by the unbiased deviation + 1e-5) and undoes it at
the end; a ReLU one does not. The name of the activation alone tells which.

Sources:
  openai/sparse_autoencoder, `sparse_autoencoder/model.py` (`Autoencoder.from_state_dict`, `LN`, `TopK`).
"""

import os
import pathlib
from typing import Any

import numpy as np

from saejax.errors import UserError
from saejax.fields import paths
from saejax.interop import strict, torch_file
from saejax.kernels.row_norm import RowNorm
from saejax.sae import per_row
from saejax.sae.model import SAE

name = "openai"
export = None

_SIGNATURE = {"pre_bias", "latent_bias", "encoder.weight", "decoder.weight"}
_STATISTICS = {"stats_last_nonzero", "latents_activation_frequency", "latents_mean_square"}
"""Counts of training, which inference does not use."""
_ACTIVATION = {"activation", "activation_state_dict", "activation.k", "activation.postact_fn"}
"""What says which activation it is; the last two repeat the second where the module itself was saved."""
_SETTINGS = {"activation_state_dict.k", "activation_state_dict.postact_fn"}


def detect(path: pathlib.Path) -> bool:
    """Returns whether `path` is a file of torch.save with the keys of one."""
    return path.is_file() and torch_file.keys(path) >= _SIGNATURE


def load(path: str | os.PathLike) -> SAE:
    """Reads one file.

    Raises:
      UserError: the file would run code; a key is missing or unknown; a wrong shape; a NaN.
    """
    path = paths.local(path, "path")
    found = torch_file.read(path)
    if not isinstance(found, dict):
        raise UserError(f"{path}: must hold a dictionary of tensors, got {type(found).__name__}")
    strict.same_keys(path, set(found), _SIGNATURE, optional=_STATISTICS | _ACTIVATION)
    kind = strict.choice(path, found, "activation", ("TopK", "ReLU"), "ReLU")
    settings: Any = found.get("activation_state_dict", {})
    again = {key.partition(".")[2]: value for key, value in found.items() if key.startswith("activation.")}
    if again not in ({}, settings):
        raise UserError(f"{path}: activation.* must say what activation_state_dict says, {settings}, got {again}")
    weights = {key: value for key, value in found.items() if key in _SIGNATURE}
    wrong = [key for key, value in weights.items() if not isinstance(value, np.ndarray)]
    if wrong:
        raise UserError(f"{path}: {wrong[0]} must be a tensor, got {type(weights[wrong[0]]).__name__}")
    d, n = strict.sizes(path, weights, "encoder.weight", transposed=True)
    shapes = {"encoder.weight": (n, d), "latent_bias": (n,), "decoder.weight": (d, n), "pre_bias": (d,)}
    w = strict.arrays(path, weights, shapes)
    params = strict.params(w["encoder.weight"].T, w["latent_bias"], w["decoder.weight"].T, w["pre_bias"])
    if kind == "ReLU":
        sparsifier = strict.build(path, "l1", params, subtract_b_dec=True)
    else:
        sparsifier = strict.build(path, "topk", params, subtract_b_dec=True, k=_k(path, settings))
        sparsifier = per_row.LayerNormed.of(sparsifier, RowNorm.deviation)
    return SAE(sparsifier, params, {"path": str(path), "architecture": kind})


def _k(path: pathlib.Path, settings: Any) -> int:
    """k of a TopK whose values go through a ReLU."""
    settings = settings if isinstance(settings, dict) else {}
    strict.same_keys(path, {f"activation_state_dict.{key}" for key in settings}, _SETTINGS)
    strict.choice(path, settings, "postact_fn", ("ReLU",), None)
    return strict.integer(path, settings, "k")
