"""SAELens format, version 6 and later: a directory with cfg.json and sae_weights.safetensors.

Written weights work in the data's own scale (`normalize_activations` is none, unless single rows are normalised).
Where no selection changes, decoder rows get norm 1, as dashboards expect; this scales latents and leaves
reconstructions unchanged. Inference files and training checkpoints are read only if every key and shape is understood
and every number is finite.

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
import safetensors.numpy

from saejax.errors import UserError
from saejax.fields import paths
from saejax.interop import folder, saelens_config, saelens_fold, strict
from saejax.interop.saelens_config import Parsed
from saejax.kernels.row_norm import RowNorm
from saejax.sae import base, per_row
from saejax.sae.layout import Family
from saejax.sae.model import SAE
from saejax.storage import json_yaml

name = "saelens"
row_norms = True
CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"

_TO: dict[str, str] = {
    "l1": "standard",
    "p_anneal": "standard",
    "topk": "topk",
    "abs_topk": "abstopk",
    "batch_topk": "jumprelu",
    "jumprelu": "jumprelu",
    "gated": "gated",
    "matryoshka": "jumprelu",
    "matching_pursuit": "matching_pursuit",
}
"""SAELens' architecture for each of saejax, at inference; a matryoshka that selects by top-k becomes topk."""
_TO_TRANSCODER = {"standard": "transcoder", "jumprelu": "jumprelu_transcoder"}
_FAMILIES = (Family.sae, Family.transcoder)


def detect(path: pathlib.Path) -> bool:
    """Returns whether `path` looks like a SAELens directory."""
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def load(path: str | os.PathLike) -> SAE:
    """Reads a SAELens directory: an inference file or a training checkpoint.

    A `batchtopk` or `matryoshka_batchtopk` checkpoint keeps its architecture, with the running threshold; what
    SAELens exports of them is a `jumprelu`. Decoder norms and scales that SAELens would fold are folded.

    Raises:
      UserError: a file or key is missing, unknown, or asks for what cannot be honoured; a wrong shape; a NaN.
    """
    path = paths.local(path, "path")
    config = saelens_config.read(json_yaml.inside(path, CONFIG))
    weights = _read_weights(json_yaml.inside(path, WEIGHTS), config)
    params = saelens_fold.data_scale(path, config, _params(weights))
    if config.architecture == "matching_pursuit" and not config.subtract:
        params = dataclasses.replace(params, b_dec=jnp.zeros_like(params.b_dec))  # SAELens does not use it
    sparsifier = _sparsifier(config, params)
    if config.normalize in saelens_fold.PER_ROW:
        sparsifier = per_row.LayerNormed.of(sparsifier, saelens_fold.PER_ROW[config.normalize])
    described = {key: value for key, value in config.own.items() if key not in ("k",)}
    origin = {"path": str(path), "architecture": config.architecture, "saelens_config": described}
    return SAE(sparsifier, params, config.metadata | origin)


def export(sae: SAE, path: str | os.PathLike) -> pathlib.Path:
    """Writes an SAE so that SAELens 6 and later loads it with `SAE.load_from_disk(path)`.

    Args:
      sae: Of any saejax architecture with a linear or tied encoder; BatchTopK and Matryoshka become `jumprelu`. Of
        transcoders, those of one hook to one hook whose latents are chosen one by one.
      path: Directory; made where missing.

    Returns:
      The directory.

    Raises:
      UserError: SAELens has no architecture that computes the same.
    """
    normalize = "none"
    if isinstance(sae.sparsifier, per_row.LayerNormed):
        normalize = _per_row(sae.sparsifier.kind)
        sae = dataclasses.replace(sae, sparsifier=sae.sparsifier.inner)
    config, weights = converted(sae)
    config["normalize_activations"] = normalize
    path = paths.local(path, "path")
    with folder.filled(path, (CONFIG, WEIGHTS)) as part:
        safetensors.numpy.save_file(weights, part / WEIGHTS)
        (part / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return path


def converted(sae: SAE) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns what SAELens' files hold of an SAE: cfg.json as a dictionary, and the float32 weights.

    Raises:
      UserError: SAELens has no architecture that computes the same.
    """
    sparsifier = sae.sparsifier
    strict.check_linear(sparsifier, name, _TO, _FAMILIES)
    architecture = _TO[sparsifier.name]
    if sparsifier.name == "matryoshka" and sparsifier.k_sparse:
        architecture = "topk"
    if not sparsifier.mirrors:
        return _transcoder(sae, architecture)
    params, subtract, own = sae.params, sparsifier.subtract_b_dec, {}
    if architecture == "jumprelu":
        params = strict.with_thresholds(sparsifier, params)
    if architecture in ("standard", "jumprelu", "gated"):
        params = saelens_fold.decoder_norms(params)
    if architecture in ("topk", "abstopk"):
        # With norms of 1 both settings compute the same, and this one lets SAELens fold the (trivial) norms.
        own = {"k": strict.own_k(sparsifier), "rescale_acts_by_decoder_norm": strict.unit_rows(params.W_dec)}
    if architecture == "matching_pursuit":
        if np.any(np.asarray(params.b_enc)):
            raise UserError("sae.type=matching_pursuit: b_enc must be 0, as in training, for the saelens format")
        own = {
            "residual_threshold": 0.0,
            "max_iterations": strict.own_k(sparsifier),
            "stop_on_duplicate_support": False,
        }
    return saelens_config.written(sae, architecture, subtract, own), _weights(architecture, params)


def _per_row(kind: RowNorm) -> str:
    """SAELens' name of a normalisation of single rows."""
    names = {ours: theirs for theirs, ours in saelens_fold.PER_ROW.items()}
    if kind not in names:
        raise UserError(
            "format=saelens: this SAE normalises every row by itself (normalize.mode=layer_norm), by its variance "
            "where SAELens takes the unbiased deviation or the norm; train with unit, sqrt_d or whiten to export"
        )
    return names[kind]


def _transcoder(sae: SAE, architecture: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Config and weights of a transcoder; W_skip is [d_out, d_in] there."""
    sparsifier, params = sae.sparsifier, sae.params
    if architecture not in _TO_TRANSCODER:
        raise UserError(
            f"sae.type={sparsifier.name}: as transcoders the saelens format takes what selects latents one by one "
            "(l1, p_anneal, jumprelu, batch_topk)"
        )
    if architecture == "jumprelu":
        params = strict.with_thresholds(sparsifier, params)
    params = saelens_fold.decoder_norms(params)
    weights = _weights(architecture, params)
    kind = _TO_TRANSCODER[architecture]
    if sparsifier.skip:
        weights["W_skip"] = np.ascontiguousarray(weights["W_skip"].T)
        kind = kind.replace("transcoder", "skip_transcoder")
    return saelens_config.written(sae, kind, False, {"d_out": sparsifier.d_out}), weights


def _shapes(config: Parsed) -> dict[str, tuple[int, ...]]:
    d, n, out = config.d_in, config.d_sae, config.d_out
    shapes: dict[str, tuple[int, ...]] = {"W_dec": (n, out), "b_dec": (out,)}
    if config.architecture == "matching_pursuit":
        return shapes
    shapes["W_enc"] = (d, n)
    if config.architecture == "gated":
        return shapes | {"b_gate": (n,), "b_mag": (n,), "r_mag": (n,)}
    shapes["b_enc"] = (n,)
    if config.architecture.startswith("jumprelu"):
        shapes["threshold"] = (n,)
    if "skip" in config.architecture:
        shapes["W_skip"] = (out, d)
    if "batchtopk" in config.architecture:
        shapes["topk_threshold"] = ()
    return shapes


def _read_weights(where: pathlib.Path, config: Parsed) -> dict[str, np.ndarray]:
    weights = strict.read_safetensors(where)
    shapes = _shapes(config)
    logarithm = config.architecture == "jumprelu" and "log_threshold" in weights
    if logarithm:
        shapes["log_threshold"] = shapes.pop("threshold")
    weights = strict.arrays(where, weights, shapes)
    if logarithm:
        weights["threshold"] = np.exp(weights.pop("log_threshold"))
    return weights


def _params(weights: dict[str, np.ndarray]) -> base.SAEParams:
    """SAELens' names to saejax's."""
    if "W_enc" not in weights:
        tied = {"W_enc": weights["W_dec"].T, "b_enc": np.zeros(len(weights["W_dec"]), np.float32)}
        return strict.params(**tied, **weights)
    if "W_skip" in weights:
        weights["W_skip"] = weights["W_skip"].T
    if "b_gate" in weights:
        gate = weights.pop("b_gate")
        return strict.params(b_enc=gate, **weights)
    if "threshold" in weights:
        # relu(pre) * (pre > threshold) of a negative threshold is that of 0.
        return strict.params(**weights | {"threshold": np.maximum(weights["threshold"], 0)})
    if "topk_threshold" in weights:
        threshold = weights.pop("topk_threshold")
        return strict.params(threshold=threshold, **weights)
    return strict.params(**weights)


def _sparsifier(config: Parsed, params: base.SAEParams) -> base.Sparsifier:
    """Returns our architecture for SAELens'."""
    fields: dict[str, Any] = {"subtract_b_dec": config.subtract}
    own = config.architecture
    if own in saelens_config.TRANSCODERS:
        kind = "jumprelu" if own.startswith("jumprelu") else "l1"
        return strict.build(config.where, kind, params, **strict.transcoder(params))
    ours = {"standard": "l1", "abstopk": "abs_topk", "batchtopk": "batch_topk", "matryoshka_batchtopk": "matryoshka"}
    if config.k is not None:
        whole = config.k == int(config.k)
        if not whole:
            raise UserError(f"{config.where}: k must be a whole number, got {config.k}")
        fields["k"] = int(config.k)
    if own == "matryoshka_batchtopk":
        fields["prefixes"] = _widths(config)
    if own == "gated":
        fields["unit_decoder"] = True  # its training needs it; the weights are taken as they are
    if own == "matching_pursuit":
        fields = {"k": _steps(config), "unit_decoder": True}
    return strict.build(config.where, ours.get(own, own), params, **fields)


def _steps(config: Parsed) -> int:
    """Steps of a matching pursuit; saejax's has no other rule to stop."""
    where, own = config.where, config.own
    if strict.number(where, own, "residual_threshold") > 0:
        raise UserError(
            f"{where}: residual_threshold must be 0, got {own['residual_threshold']}: saejax always takes k steps"
        )
    strict.choice(where, own, "stop_on_duplicate_support", (False,), None)
    return strict.integer(where, own, "max_iterations")


def _widths(config: Parsed) -> tuple[int, ...]:
    widths = config.own["matryoshka_widths"]
    whole = isinstance(widths, list) and all(isinstance(w, int) and 0 < w <= config.d_sae for w in widths)
    if not whole or sorted(set(widths)) != widths:
        raise UserError(f"{config.where}: matryoshka_widths must be increasing numbers up to d_sae, got {widths}")
    return tuple(widths) if widths and widths[-1] == config.d_sae else (*widths, config.d_sae)


def _weights(architecture: str, params: base.SAEParams) -> dict[str, np.ndarray]:
    """Our names to SAELens'."""
    weights = {key: getattr(params, key) for key in ("W_enc", "b_enc", "W_dec", "b_dec")} | params.extra
    if architecture == "gated":
        weights["b_gate"] = weights.pop("b_enc")
    if architecture == "matching_pursuit":
        weights = {key: weights[key] for key in ("W_dec", "b_dec")}
    return {key: np.array(value, np.float32, order="C") for key, value in weights.items()}
