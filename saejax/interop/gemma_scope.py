"""Gemma Scope: `params.npz` of the first release, `params.safetensors` with `config.json` of the second.

All are JumpReLU autoencoders that read x itself, in the data's own scale. Read as published: the first release's SAEs
of token embeddings are for embeddings before the model multiplies them by the root of their width.

Sources:
  Lieberum et al., Gemma Scope, 2024 (arXiv:2408.05147), and the weights of its tutorial; Gemma Scope 2, 2025, and the
  config.json of its releases; SAELens 6.54, `gemma_2_sae_huggingface_loader`, `gemma_3_sae_huggingface_loader`.
"""

import os
import pathlib
from typing import Any

import numpy as np

from saejax.errors import UserError
from saejax.interop import strict
from saejax.sae.model import SAE

name = "gemma_scope"
export = None
NPZ, TENSORS, CONFIG = "params.npz", "params.safetensors", "config.json"

_DESCRIBED = {"hf_hook_point_in", "hf_hook_point_out", "model_name", "type", "affine_connection", "width", "l0"}


def detect(path: pathlib.Path) -> bool:
    """Returns whether `path` is a directory of Gemma Scope, or the weights file in one."""
    if path.is_file():
        return path.name in (NPZ, TENSORS)
    return (path / NPZ).is_file() or (path / TENSORS).is_file()


def load(path: str | os.PathLike) -> SAE:
    """Reads one autoencoder of either release.

    Raises:
      UserError: a key is missing or unknown, a wrong shape, a NaN, or something that is not an autoencoder.
    """
    path = pathlib.Path(path)
    file = path if path.is_file() else path / (NPZ if (path / NPZ).is_file() else TENSORS)
    weights = strict.read_npz(file) if file.name == NPZ else strict.read_safetensors(file)
    w = _checked(file, weights)
    config = _config(file.parent / CONFIG, w["W_enc"].shape[1]) if file.name == TENSORS else {}
    # relu(pre) * (pre > threshold) of a negative threshold is that of 0.
    params = strict.params(**w | {"threshold": np.maximum(w["threshold"], 0)})
    sparsifier = strict.build(file, "jumprelu", params, subtract_b_dec=False)
    origin = {"path": str(path), "hook_name": config.get("hf_hook_point_in"), "model_name": config.get("model_name")}
    known = {key: value for key, value in origin.items() if value is not None}
    return SAE(sparsifier, params, known | ({"gemma_scope_config": config} if config else {}))


def _checked(file: pathlib.Path, weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The five arrays under our names, which the second release writes with a small w."""
    weights = {f"W_{key[2:]}" if key.startswith("w_") else key: array for key, array in weights.items()}
    factor = weights.pop("scaling_factor", np.ones(()))
    if not np.all(factor == 1):
        raise UserError(f"{file}: scaling_factor must be 1 where there is one, got {factor}")
    d, n = strict.sizes(file, weights, "W_enc")
    shapes = {"W_enc": (d, n), "b_enc": (n,), "W_dec": (n, d), "b_dec": (d,), "threshold": (n,)}
    return strict.arrays(file, weights, shapes)


def _config(where: pathlib.Path, d_sae: int) -> dict[str, Any]:
    """The description beside the weights; {} where there is none."""
    if not where.is_file():
        return {}
    config = strict.read_json(where)
    strict.same_keys(where, set(config), {"architecture"}, optional=_DESCRIBED)
    strict.choice(where, config, "architecture", ("jump_relu",), None)
    strict.choice(where, config, "type", ("sae",), "sae")
    strict.choice(where, config, "affine_connection", (False, None), False)
    if config.get("width", d_sae) != d_sae:
        raise UserError(f"{where}: width must be the number of latents, {d_sae}, got {config['width']}")
    return config
