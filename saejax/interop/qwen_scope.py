"""Qwen Scope: TopK, `layer<i>.sae.pt` for every layer of a model, one config.json for all.

k is in config.json. If it is missing there, a directory above the file must carry the name of the release
(`...-L0_50`).

Sources:
  The model cards and config.json of Qwen/SAE-Res-*; SAELens 6.54, `qwen_scope_sae_huggingface_loader`.
"""

import os
import pathlib
import re
from typing import Any

from saejax.errors import UserError
from saejax.fields import paths
from saejax.interop import strict, torch_file
from saejax.sae.model import SAE
from saejax.storage import json_yaml

name = "qwen_scope"
export = None

_FILE = re.compile(r"layer(\d+)\.sae\.pt")
_KEYS = {"model_type", "base_model", "d_model", "d_sae", "k", "num_layers", "hook_point", "dtype"}


def detect(path: pathlib.Path) -> bool:
    """Returns whether `path` is one layer's file."""
    return path.is_file() and _FILE.fullmatch(path.name) is not None


def load(path: str | os.PathLike) -> SAE:
    """Reads one layer's file.

    The model card keeps the k largest pre-activations of a row as they are. Here, as in SAELens, those below 0 become
    0. That differs only where a row has fewer than k positive ones.

    Raises:
      UserError: the file would run code; a key is missing or unknown; a wrong shape; a NaN; nothing says k.
    """
    path = paths.local(path, "path")
    state = torch_file.read_state_dict(path)
    d, n = strict.sizes(path, state, "W_enc", transposed=True)
    w = strict.arrays(path, state, {"W_enc": (n, d), "b_enc": (n,), "W_dec": (d, n), "b_dec": (d,)})
    params = strict.params(w["W_enc"].T, w["b_enc"], w["W_dec"].T, w["b_dec"])
    config = _config(json_yaml.inside(path.parent, "config.json"), {"d_model": d, "d_sae": n})
    k = config["k"] if config else _k_of_name(path)
    layer = _FILE.fullmatch(path.name)
    origin: dict[str, Any] = {"path": str(path)} | ({"layer": int(layer[1])} if layer else {})
    if config:
        origin |= {"model_name": config.get("base_model"), "hook_name": config.get("hook_point")}
    return SAE(strict.build(path, "topk", params, k=k, subtract_b_dec=False), params, origin)


def _config(where: pathlib.Path, sizes: dict[str, int]) -> dict[str, Any]:
    """The checked config.json; {} where there is none."""
    if not where.is_file():
        return {}
    config = strict.read_json(where)
    strict.same_keys(where, set(config), {"model_type", "k"}, optional=_KEYS)
    strict.choice(where, config, "model_type", ("topk_sae",), None)
    strict.integer(where, config, "k")
    for key, size in sizes.items():
        if config.get(key, size) != size:
            raise UserError(f"{where}: {key} is {config[key]}, but the weights have {size}")
    return config


def _k_of_name(path: pathlib.Path) -> int:
    for part in reversed(path.absolute().parts[:-1]):
        found = re.search(r"-L0_(\d+)$", part)
        if found:
            return int(found[1])
    raise UserError(
        f"{path}: nothing says k: it needs config.json beside it, or a directory above it named as the release is "
        "(...-L0_50)"
    )
