"""The sparsify format: a directory with cfg.json and sae.safetensors for each hook of a run.

Sources:
  sparsify 1.3.3 (EleutherAI), `SparseCoder.save_to_disk` and `load_from_disk`, for the keys.
"""

import json
import os
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from saejax.errors import UserError
from saejax.fields import paths
from saejax.interop import folder, strict
from saejax.sae.layout import Family
from saejax.sae.model import SAE
from saejax.storage import json_yaml

name = "sparsify"
CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"

_KEYS = {
    "activation", "expansion_factor", "normalize_decoder", "num_latents", "multi_topk", "skip_connection", "transcode",
}  # fmt: skip
_OLDER = {"signed", "hookpoint", "layer"}
"""Keys of versions before 1.0, ignored by later ones too."""


def detect(path: pathlib.Path) -> bool:
    """Returns whether `path` looks like one hook's directory of a sparsify run."""
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def load(path: str | os.PathLike) -> SAE:
    """Reads one hook's directory of activation `topk`: an autoencoder or, with or without a skip, a transcoder.

    sparsify's encoder subtracts b_dec wherever `transcode` is not set, which older skip transcoders do not; there the
    encoder's bias takes it up.

    Raises:
      UserError: it has groups, or a key, shape or number is wrong.
    """
    path = paths.local(path, "path")
    where = json_yaml.inside(path, CONFIG)
    config = strict.read_json(where)
    strict.same_keys(where, set(config), {"d_in", "k"}, optional=_KEYS | _OLDER)
    d_in, k = strict.integer(where, config, "d_in"), strict.integer(where, config, "k")
    for key, allowed, default in (
        ("activation", ("topk",), "topk"),
        ("signed", (False,), False),
    ):
        strict.choice(where, config, key, allowed, default)
    skip = strict.choice(where, config, "skip_connection", (True, False), False)
    transcode = strict.choice(where, config, "transcode", (True, False), False)
    n = _d_sae(where, config, d_in)
    weights = strict.read_safetensors(json_yaml.inside(path, WEIGHTS))
    shapes = {"encoder.weight": (n, d_in), "encoder.bias": (n,), "W_dec": (n, d_in), "b_dec": (d_in,)}
    w = strict.arrays(path / WEIGHTS, weights, shapes | ({"W_skip": (d_in, d_in)} if skip else {}))
    extra = {"W_skip": w["W_skip"].T} if skip else {}
    params = strict.params(w["encoder.weight"].T, w["encoder.bias"], w["W_dec"], w["b_dec"], **extra)
    fields: dict[str, Any] = strict.transcoder(params) if skip or transcode else {}
    if fields and not transcode:
        params = strict.shifted(params, -1.0)
    multi = strict.choice(where, config, "multi_topk", (True, False), False)
    sparsifier = strict.build(where, "topk", params, k=k, multi_topk_alpha=1 / 8 if multi else 0.0, **fields)
    return SAE(sparsifier, params, {"path": str(path), "hook_name": path.name, "sparsify_config": config})


def export(sae: SAE, path: str | os.PathLike) -> pathlib.Path:
    """Writes a TopK SAE or transcoder so that `sparsify.SparseCoder.load_from_disk(path)` reads it.

    Args:
      sae: A TopK with a linear or tied encoder. Without a pre-encoder bias the encoder's bias takes it up. A transcoder
        must read and write as many numbers.
      path: Directory; made where missing. In a run of sparsify it is named after the hook.

    Returns:
      The directory.

    Raises:
      UserError: the architecture has no place in the format.
    """
    sparsifier = sae.sparsifier
    strict.check_linear(sparsifier, name, ("topk",), (Family.sae, Family.transcoder))
    if sparsifier.d_out != sparsifier.d_in:
        raise UserError(f"sae.sites={sparsifier.sites}: the sparsify format takes as much to read as to write")
    json_yaml = sparsifier.subtract_b_dec or not sparsifier.mirrors
    params = sae.params if json_yaml else strict.shifted(sae.params, 1.0)
    weights = {
        "encoder.weight": jnp.asarray(params.W_enc).T,
        "encoder.bias": params.b_enc,
        "W_dec": params.W_dec,
        "b_dec": params.b_dec,
    }
    if sparsifier.skip:
        weights["W_skip"] = params.extra["W_skip"].T
    path = paths.local(path, "path")
    arrays = {key: np.array(value, np.float32, order="C") for key, value in weights.items()}
    config: dict[str, Any] = {
        "activation": "topk",
        "expansion_factor": max(1, sparsifier.d_sae // sparsifier.d_in),
        "normalize_decoder": strict.unit_rows(params.W_dec),
        "num_latents": sparsifier.d_sae,
        "k": strict.own_k(sparsifier),
        "multi_topk": bool(getattr(sparsifier, "multi_topk_alpha", 0.0)),
        "skip_connection": sparsifier.skip,
        "transcode": not sparsifier.mirrors,
        "d_in": sparsifier.d_in,
    }
    with folder.filled(path, (CONFIG, WEIGHTS)) as part:
        safetensors.numpy.save_file(arrays, part / WEIGHTS)
        (part / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return path


def _d_sae(where: pathlib.Path, config: dict[str, Any], d_in: int) -> int:
    """Number of latents: `num_latents`, or where that is 0 `expansion_factor` times d_in."""
    if config.get("num_latents"):
        return strict.integer(where, config, "num_latents")
    if "expansion_factor" not in config:
        raise UserError(f"{where}: missing num_latents or expansion_factor")
    return strict.integer(where, config, "expansion_factor") * d_in
