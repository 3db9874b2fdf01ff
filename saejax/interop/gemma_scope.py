r"""Gemma Scope: `params.npz` (first release), `params.safetensors` with `config.json` (second release).

All are JumpReLU and read x itself, in the data's own scale. A transcoder of the second release may add :math:`x\,`
`affine_skip_connection` ([d_in, d_out], `W_skip` here). Its cross-layer transcoders are directories of
`params_layer_<i>.safetensors`. Each file has a decoder [d_sae, layers, d] that writes layer i and later ones. Its
crosscoders are the same with equal in-sites and out-sites, so they become a `clt` too. Weights are read as published:
the first release's SAEs of token embeddings expect embeddings before the model multiplies them by the root of their
width.

Sources:
  Lieberum et al., Gemma Scope, 2024 (arXiv:2408.05147), and the weights of its tutorial; Gemma Scope 2, 2025, the
  config.json of its releases and the classes of its tutorial; SAELens 6.54, `gemma_2_sae_huggingface_loader`,
  `gemma_3_sae_huggingface_loader`; circuit-tracer at 4bb8c0ea, `load_gemma_scope_2_clt`.
"""

import os
import pathlib
import re
from typing import Any

import numpy as np

from saejax.errors import UserError
from saejax.fields import paths
from saejax.interop import strict
from saejax.sae import base
from saejax.sae.layout import Family
from saejax.sae.model import SAE
from saejax.storage import json_yaml

name = "gemma_scope"
export = None
NPZ, TENSORS, LAYER, CONFIG = "params.npz", "params.safetensors", "params_layer_{}.safetensors", "config.json"

_DESCRIBED = {"hf_hook_point_in", "hf_hook_point_out", "model_name", "type", "affine_connection", "width", "l0"}
_SKIP = "affine_skip_connection"
_TRANSCODERS = re.compile("gemma-scope.*transcoders")
"""Name of a release of transcoders; other folders on the way may be called anything."""


def detect(path: pathlib.Path) -> bool:
    """Returns whether `path` is a directory of Gemma Scope, or the weights file in one."""
    if path.is_file():
        return path.name in (NPZ, TENSORS)
    return any((path / file).is_file() for file in (NPZ, TENSORS, LAYER.format(0)))


def load(path: str | os.PathLike) -> SAE:
    """Reads one autoencoder, transcoder, cross-layer transcoder or crosscoder.

    Without a config.json (the whole first release), the name of the release in the path tells a transcoder
    (gemma-scope-2b-pt-transcoders).

    Raises:
      UserError: a key is missing or unknown, a wrong shape, a NaN, or a skip of a cross-layer transcoder.
    """
    path = paths.local(path, "path")
    folder = path.parent if path.is_file() else path
    config = _config(json_yaml.inside(folder, CONFIG))
    if path.is_dir() and (path / LAYER.format(0)).is_file():
        sparsifier, params = _layers(path)
    else:
        file = path if path.is_file() else json_yaml.inside(path, NPZ if (path / NPZ).is_file() else TENSORS)
        sparsifier, params = _single(file, config)
    if config.get("width", sparsifier.d_sae) != sparsifier.d_sae:
        wrong = f"must be the number of latents, {sparsifier.d_sae}, got {config['width']}"
        raise UserError(f"{folder / CONFIG}: width {wrong}")
    named = {"hook_name": "hf_hook_point_in", "hook_name_out": "hf_hook_point_out", "model_name": "model_name"}
    origin = {ours: config[key] for ours, key in named.items() if config.get(key)}
    return SAE(sparsifier, params, {"path": str(path)} | origin | ({"gemma_scope_config": config} if config else {}))


def _config(where: pathlib.Path) -> dict[str, Any]:
    """The description beside the weights; {} where there is none."""
    if not where.is_file():
        return {}
    config = strict.read_json(where)
    strict.same_keys(where, set(config), {"architecture"}, optional=_DESCRIBED)
    strict.choice(where, config, "architecture", ("jump_relu",), None)
    strict.choice(where, config, "type", ("sae", "transcoder", "clt", "crosscoder"), "sae")
    strict.choice(where, config, "affine_connection", (False, True, None), False)
    return config


def _single(file: pathlib.Path, config: dict[str, Any]) -> tuple[base.Sparsifier, base.SAEParams]:
    w = _checked(file, strict.read_npz(file) if file.name == NPZ else strict.read_safetensors(file))
    kind = config.get("type")
    if kind in ("clt", "crosscoder"):
        raise UserError(f"{file}: type={kind} is read from a directory of {LAYER.format('<i>')}")
    if config.get("affine_connection", _SKIP in w) != (_SKIP in w):
        raise UserError(f"{file.parent / CONFIG}: affine_connection must say whether {file.name} has {_SKIP}")
    by_name = kind is None and any(_TRANSCODERS.search(part) for part in file.absolute().parts)
    transcodes = kind == "transcoder" or by_name or _SKIP in w
    params = _params(w)
    fields = strict.transcoder(params) if transcodes else {"subtract_b_dec": False}
    return strict.build(file, "jumprelu", params, **fields), params


def _checked(file: pathlib.Path, weights: dict[str, np.ndarray], layers: int = 0) -> dict[str, np.ndarray]:
    """The arrays under our names, which the second release writes with a small w."""
    weights = {f"W_{key[2:]}" if key.startswith("w_") else key: array for key, array in weights.items()}
    factor = weights.pop("scaling_factor", np.ones(()))
    if not np.all(factor == 1):
        raise UserError(f"{file}: scaling_factor must be 1 where there is one, got {factor}")
    d, n = strict.sizes(file, weights, "W_enc")
    shapes = {"W_enc": (d, n), "b_enc": (n,), "W_dec": (n, layers, d) if layers else (n, d), "threshold": (n,)}
    return strict.arrays(file, weights, shapes | {"b_dec": (d,)} | ({_SKIP: (d, d)} if _SKIP in weights else {}))


def _params(w: dict[str, np.ndarray]) -> base.SAEParams:
    # relu(pre) * (pre > threshold) of a negative threshold is that of 0.
    ours = w | {"threshold": np.maximum(w["threshold"], 0)}
    return strict.params(**{"W_skip" if key == _SKIP else key: array for key, array in ours.items()})


def _layers(folder: pathlib.Path) -> tuple[base.Sparsifier, base.SAEParams]:
    """One file for each layer, of latents that write it and later ones."""
    n_layers = len(list(folder.glob(LAYER.format("*"))))
    files = [json_yaml.inside(folder, LAYER.format(i)) for i in range(n_layers)]
    parts = [_checked(file, strict.read_safetensors(file), n_layers) for file in files]
    for i, (file, w) in enumerate(zip(files, parts, strict=True)):
        if _SKIP in w:
            raise UserError(f"{file}: {_SKIP}: cross-layer transcoders are read without a skip")
        if w["W_dec"][:, :i].any():
            raise UserError(f"{file}: w_dec must be 0 for the layers before {i}")
        if w["W_enc"].shape != parts[0]["W_enc"].shape:
            raise UserError(f"{file}: w_enc must have shape {parts[0]['W_enc'].shape}, as in {files[0].name}")
        w["W_dec"] = w["W_dec"].reshape(len(w["W_dec"]), -1)
    axes = {"W_enc": 1, "b_enc": 0, "W_dec": 0, "b_dec": 0, "threshold": 0}
    params = _params({key: np.concatenate([w[key] for w in parts], axis) for key, axis in axes.items()})
    d = params.W_enc.shape[0]
    fields: dict[str, Any] = {"family": Family.clt, "sites": (d,) * (2 * n_layers), "d_in": d * n_layers}
    return strict.build(folder, "jumprelu", params, subtract_b_dec=False, **fields), params
