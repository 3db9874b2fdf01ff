r"""circuit-tracer transcoders: `layer_<i>.safetensors` for one layer, a directory for a cross-layer transcoder.

.. math:: f = \mathrm{act}(x W_{enc}^T + b_{enc}), \quad \hat y = f W_{dec} + b_{dec} \;(+\; x W_{skip}^T)

A cross-layer transcoder has `W_enc_<i>.safetensors` (W_enc_i [n, d], b_enc_i, b_dec_i, perhaps threshold_i) and
`W_dec_<i>.safetensors` (W_dec_i [n, layers - i, d], for layer i and later ones) for every layer. With thresholds act
is JumpReLU, else ReLU. A config.yaml beside a single layer may say topk.

Sources:
  circuit-tracer at 4bb8c0ea (Hanna, Piotrowski), `load_transcoder`, `load_clt`; SAELens 6.54,
  `mwhanna_transcoder_huggingface_loader`, `mntss_clt_layer_huggingface_loader`.
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

name = "circuit_tracer"
export = None

_LAYER, _ENCODER, _DECODER = re.compile(r"layer_\d+\.safetensors"), "W_enc_{}.safetensors", "W_dec_{}.safetensors"
_THRESHOLD = "activation_function.threshold"


def detect(path: pathlib.Path) -> bool:
    """Returns whether `path` is one layer's file, or the directory of a cross-layer transcoder."""
    if path.is_file():
        return _LAYER.fullmatch(path.name) is not None
    return (path / _ENCODER.format(0)).is_file() and (path / _DECODER.format(0)).is_file()


def load(path: str | os.PathLike) -> SAE:
    """Reads one transcoder.

    Raises:
      UserError: a key is missing or unknown; a wrong shape; a NaN; a threshold below 0.
    """
    path = paths.local(path, "path")
    config = _config(json_yaml.inside(path.parent if path.is_file() else path, "config.yaml"))
    sparsifier, params = _single(path, config) if path.is_file() else _layers(path, config)
    named = {"hook_name": "feature_input_hook", "hook_name_out": "feature_output_hook", "model_name": "model_name"}
    origin = {ours: config[theirs] for ours, theirs in named.items() if config.get(theirs)}
    return SAE(sparsifier, params, {"path": str(path)} | origin)


def _config(where: pathlib.Path) -> dict[str, Any]:
    """Settings of config.yaml for all layers; {} without the file."""
    return strict.read_yaml(where) if where.is_file() else {}


def _single(file: pathlib.Path, config: dict[str, Any]) -> tuple[base.Sparsifier, base.SAEParams]:
    weights = strict.read_safetensors(file)
    d, n = strict.sizes(file, weights, "W_enc", transposed=True)
    _, out = strict.sizes(file, weights, "W_dec")
    shapes = {"W_enc": (n, d), "b_enc": (n,), "W_dec": (n, out), "b_dec": (out,)}
    optional = {"W_skip": (out, d), _THRESHOLD: (n,)}
    w = strict.arrays(file, weights, shapes | {key: shape for key, shape in optional.items() if key in weights})
    extra = {"W_skip": w["W_skip"].T} if "W_skip" in w else {}
    kind = strict.choice(file.parent / "config.yaml", config, "activation", ("topk", "relu", "jump_relu", None), None)
    if (kind == "topk" and _THRESHOLD in w) or (kind == "jump_relu" and _THRESHOLD not in w):
        raise UserError(f"{file}: activation={kind} in config.yaml does not agree with the keys, {', '.join(w)}")
    if kind == "topk":
        params = strict.params(w["W_enc"].T, w["b_enc"], w["W_dec"], w["b_dec"], **extra)
        k = strict.integer(file.parent / "config.yaml", config, "k")
        return strict.build(file, "topk", params, k=k, **strict.transcoder(params)), params
    act, threshold = _act(file, w.get(_THRESHOLD))
    params = strict.params(w["W_enc"].T, w["b_enc"], w["W_dec"], w["b_dec"], **extra, **threshold)
    return strict.build(file, act, params, **strict.transcoder(params)), params


def _act(file: pathlib.Path, threshold: np.ndarray | None) -> tuple[str, dict[str, np.ndarray]]:
    """Our architecture and its thresholds; one below 0 would let negative latents through."""
    if threshold is None:
        return "l1", {}
    if (threshold < 0).any():
        raise UserError(f"{file}: thresholds must be at least 0, got {float(threshold.min())}")
    return "jumprelu", {"threshold": threshold}


def _layers(folder: pathlib.Path, config: dict[str, Any]) -> tuple[base.Sparsifier, base.SAEParams]:
    n_layers = len(list(folder.glob(_ENCODER.format("*"))))
    parts = [_layer(folder, i, n_layers) for i in range(n_layers)]
    first = parts[0]
    for i, w in enumerate(parts):
        if set(w) != set(first) or w["W_enc"].shape != first["W_enc"].shape:
            raise UserError(f"{folder / _ENCODER.format(i)}: must have the keys and shapes of {_ENCODER.format(0)}")
    joined = {key: np.concatenate([w[key] for w in parts]) for key in first}
    kinds = ("jump_relu" if "threshold" in joined else "relu", None)
    strict.choice(folder / "config.yaml", config, "activation", kinds, None)
    act, threshold = _act(folder, joined.pop("threshold", None))
    params = strict.params(**joined | {"W_enc": joined["W_enc"].T}, **threshold)
    d = params.W_enc.shape[0]
    fields: dict[str, Any] = {"family": Family.clt, "sites": (d,) * (2 * n_layers), "d_in": d * n_layers}
    return strict.build(folder, act, params, subtract_b_dec=False, **fields), params


def _layer(folder: pathlib.Path, i: int, n_layers: int) -> dict[str, np.ndarray]:
    """One layer's arrays without their numbers; W_dec [n, layers d] with zeros for the layers before."""
    file, to = json_yaml.inside(folder, _ENCODER.format(i)), json_yaml.inside(folder, _DECODER.format(i))
    weights = strict.read_safetensors(file)
    d, n = strict.sizes(file, weights, f"W_enc_{i}", transposed=True)
    shapes = {f"W_enc_{i}": (n, d), f"b_enc_{i}": (n,), f"b_dec_{i}": (d,)}
    w = strict.arrays(file, weights, shapes | ({f"threshold_{i}": (n,)} if f"threshold_{i}" in weights else {}))
    decoder = strict.arrays(to, strict.read_safetensors(to), {f"W_dec_{i}": (n, n_layers - i, d)})
    whole = np.zeros((n, n_layers, d), np.float32)
    whole[:, i:] = decoder[f"W_dec_{i}"]
    return {key.removesuffix(f"_{i}"): array for key, array in w.items()} | {"W_dec": whole.reshape(n, -1)}
