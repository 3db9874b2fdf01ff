"""The SAELens format, version 6 and later: a directory with cfg.json and sae_weights.safetensors.

One file of interop. What is written is always in the data's own scale (`normalize_activations` is none) and
in the form that dashboards expect: decoder rows of norm 1, which changes latents by a factor and
reconstructions not at all. What is read is refused unless every key and every shape is understood.

Sources:
  SAELens 6.54 (Bloom, Tigges, Duong, Chanin), `SAE.save_model` and `SAE.load_from_disk`, for the keys.
"""

import dataclasses
import json
import os
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.flax
from safetensors import SafetensorError

from saejax.errors import UserError
from saejax.sae import base
from saejax.sae.l1 import L1
from saejax.sae.model import SAE
from saejax.sae.topk import TopK

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
VERSION = "6.54.12"
"""What we say we are compatible with; readers take anything below 6.0.0 for the older flat config."""

_KEYS = {
    "architecture", "d_in", "d_sae", "dtype", "device", "apply_b_dec_to_input", "normalize_activations",
    "reshape_activations", "metadata",
}  # fmt: skip
_TOPK_KEYS = {"k", "rescale_acts_by_decoder_norm"}
_ARCHITECTURES = ("standard", "topk")


def detect(path: pathlib.Path) -> bool:
    """Returns whether `path` looks like a SAELens directory."""
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def export(sae: SAE, path: str | os.PathLike) -> pathlib.Path:
    """Writes an SAE so that SAELens 6 and later loads it with `SAE.load_from_disk(path)`.

    Args:
      sae: A TopK (written as `topk`) or an L1 (written as `standard`) SAE.
      path: Directory; made where missing.

    Returns:
      The directory.

    Raises:
      UserError: SAELens has no architecture that computes the same.
    """
    sparsifier = sae.sparsifier
    if not isinstance(sparsifier, (TopK, L1)):
        known = ", ".join(name for name in ("topk", "l1"))
        raise UserError(f"sae.type={sparsifier.name}: the saelens format takes {known}")
    if sae.params.extra:
        raise UserError(f"SAE parameters {', '.join(sae.params.extra)} have no place in the saelens format")
    params = sparsifier.with_unit_decoder(sae.params) if isinstance(sparsifier, L1) else sae.params
    weights = {name: jnp.asarray(getattr(params, name), jnp.float32) for name in _shapes(sparsifier)}
    path = pathlib.Path(path)
    path.mkdir(parents=True, exist_ok=True)
    safetensors.flax.save_file(weights, path / WEIGHTS)
    (path / CONFIG).write_text(json.dumps(_config(sae), indent=2) + "\n", encoding="utf-8")
    return path


def load(path: str | os.PathLike) -> SAE:
    """Reads a SAELens directory with a `standard` or `topk` SAE.

    Decoder norms and the decoder's bias on the input are folded where our architectures have another
    convention, so that latents and reconstructions are those of SAELens.

    Raises:
      UserError: a file or key is missing, unknown, or asks for what cannot be honoured; a wrong shape.
    """
    path = pathlib.Path(path)
    config = _read_config(path / CONFIG)
    sparsifier = _sparsifier(path, config)
    params = _read_weights(path / WEIGHTS, sparsifier)
    if isinstance(sparsifier, TopK):
        params = _to_topk(params, config)
    elif config["apply_b_dec_to_input"]:
        params = _shifted(params, -1.0)
    return SAE(sparsifier, params, {"format": "saelens", "path": str(path), **config["metadata"]})


def _config(sae: SAE) -> dict[str, Any]:
    sparsifier, topk = sae.sparsifier, isinstance(sae.sparsifier, TopK)
    metadata = _metadata(sae.provenance)
    hook = metadata.get("hook_name") or ""
    config: dict[str, Any] = {
        "architecture": "topk" if topk else "standard",
        "d_in": sparsifier.d_in,
        "d_sae": sparsifier.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": topk,
        "normalize_activations": "none",
        "reshape_activations": "hook_z" if hook.endswith("hook_z") else "none",
        "metadata": metadata,
    }
    if isinstance(sparsifier, TopK):
        norms = np.linalg.norm(np.asarray(sae.params.W_dec, np.float64), axis=1)
        unit = bool(np.all(np.abs(norms - 1) < 1e-5))
        # With norms of 1 both settings compute the same, and this one lets SAELens fold the (trivial) norms.
        config |= {"k": sparsifier.k, "rescale_acts_by_decoder_norm": unit}
    return config


def _metadata(provenance: dict[str, Any]) -> dict[str, Any]:
    """SAELens' names for what the SAE knows of its origin; the source of a run holds hook and model."""
    source = provenance.get("source") or {}
    source = source if isinstance(source, dict) else {}
    model = provenance.get("model") or source.get("model") or {}
    model = {"name": model} if isinstance(model, str) else model
    found = {
        "model_name": model.get("name") or provenance.get("model_name"),
        "hook_name": provenance.get("hook") or source.get("hook") or provenance.get("hook_name"),
        "context_size": source.get("context_length") or provenance.get("context_size"),
        "dataset_path": provenance.get("dataset_path"),
        "prepend_bos": provenance.get("prepend_bos"),
    }
    found = {key: value for key, value in found.items() if value is not None}
    plain = json.loads(json.dumps(provenance, default=str))
    return {"sae_lens_version": VERSION, **found, "training_library": "saejax", "saejax_provenance": plain}


def _read_config(path: pathlib.Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except ValueError as error:
        raise UserError(f"{path}: no valid JSON ({error})") from None
    if not isinstance(config, dict) or not isinstance(config.get("metadata"), dict):
        raise UserError(f"{path}: must hold a mapping with a mapping `metadata`; SAELens writes it since 6.0.0")
    version = str(config["metadata"].get("sae_lens_version"))
    if not version.split(".")[0].isdigit() or int(version.split(".")[0]) < 6:
        raise UserError(f"{path}: metadata.sae_lens_version must be at least 6.0.0, got {version}")
    return config


def _sparsifier(path: pathlib.Path, config: dict[str, Any]) -> base.Sparsifier:
    """Checks every key of cfg.json and returns the architecture."""
    where = path / CONFIG
    architecture = config.get("architecture")
    if architecture not in _ARCHITECTURES:
        raise UserError(f"{where}: architecture must be one of {', '.join(_ARCHITECTURES)}, got {architecture}")
    allowed = _KEYS | (_TOPK_KEYS if architecture == "topk" else set())
    _same_keys(where, set(config), allowed, optional={"device", "dtype", "reshape_activations"})
    for key, fits in (
        ("normalize_activations", ("none",)),
        ("reshape_activations", ("none", "hook_z")),
        ("apply_b_dec_to_input", (True, False)),
        ("rescale_acts_by_decoder_norm", (True, False)),
    ):
        value = config.get(key, fits[0])
        if not any(value is f or (isinstance(f, str) and value == f) for f in fits):
            raise UserError(f"{where}: {key} must be {' or '.join(json.dumps(f) for f in fits)}, got {value!r}")
    sizes = {key: config[key] for key in ("d_in", "d_sae", "k") if key in config}
    for key, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise UserError(f"{where}: {key} must be an integer, got {value!r}")
    try:
        return TopK(**sizes) if architecture == "topk" else L1(**sizes)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _read_weights(path: pathlib.Path, sparsifier: base.Sparsifier) -> base.SAEParams:
    try:
        weights = safetensors.flax.load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except SafetensorError as error:
        raise UserError(f"{path}: no safetensors file ({error})") from None
    shapes = _shapes(sparsifier)
    _same_keys(path, set(weights), set(shapes))
    for name, shape in shapes.items():
        if weights[name].shape != shape:
            raise UserError(f"{path}: {name} must have shape {shape}, got {weights[name].shape}")
        if not jnp.issubdtype(weights[name].dtype, jnp.floating):
            raise UserError(f"{path}: {name} must be floating point, got {weights[name].dtype}")
    W_enc, b_enc, W_dec, b_dec = (weights[name].astype(jnp.float32) for name in shapes)
    return base.SAEParams(W_enc=W_enc, b_enc=b_enc, W_dec=W_dec, b_dec=b_dec)


def _same_keys(where: pathlib.Path, found: set[str], wanted: set[str], optional: set[str] | None = None) -> None:
    unknown, missing = sorted(found - wanted), sorted(wanted - found - (optional or set()))
    if unknown or missing:
        wrong = [f"unknown {', '.join(unknown)}"] * bool(unknown) + [f"missing {', '.join(missing)}"] * bool(missing)
        raise UserError(f"{where}: {'; '.join(wrong)} (allowed: {', '.join(sorted(wanted))})")


def _shapes(sparsifier: base.Sparsifier) -> dict[str, tuple[int, ...]]:
    d_in, d_sae = sparsifier.d_in, sparsifier.d_sae
    return {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}


def _to_topk(params: base.SAEParams, config: dict[str, Any]) -> base.SAEParams:
    """Folds what SAELens may do and our TopK does not: norms of the decoder, no bias on the input."""
    if config["rescale_acts_by_decoder_norm"]:
        norms = jnp.linalg.norm(params.W_dec, axis=1)
        some = jnp.where(norms > 0, norms, 1.0)
        params = dataclasses.replace(
            params,
            W_enc=params.W_enc * norms[None, :],
            b_enc=params.b_enc * norms,
            W_dec=params.W_dec / some[:, None],
        )
    return params if config["apply_b_dec_to_input"] else _shifted(params, 1.0)


def _shifted(params: base.SAEParams, sign: float) -> base.SAEParams:
    """Moves b_dec on the input into b_enc: (x - b_dec) W + b = x W + (b - b_dec W), and back for sign +1."""
    shift = jnp.matmul(params.b_dec, params.W_enc, precision="highest")
    return dataclasses.replace(params, b_enc=params.b_enc + sign * shift)
