r"""Llamascopium (Language-Model-SAEs) since 2025: config.json with sae_weights.safetensors.

.. math:: u = (s_{in}\, x) W_E + b_E, \quad f = \mathrm{act}(u \odot n) / n, \quad \hat x = (f W_D + b_D) / s_{out},
    \qquad n_i = \|W_{D,i}\|

(n = 1 where `sparsity_include_decoder_norm` is false). Here :math:`s = \sqrt d /` the average norm of a hook's rows
where `norm_activation` is dataset-wise, and :math:`\sqrt d / \|x\|` where it is token-wise. Both are folded or kept.
Decoder rows that gate are scaled to norm 1 in the unit of training, and latents by the old norms.

In a crosscoder every site gates with its own norms, :math:`f^s = \mathrm{act}(u \odot n^s)/n^s`. With ReLU the sites
agree, so each latent becomes one of saejax. With JumpReLU they do not: latent i of site s becomes latent s d_sae + i
here, which reads all sites and writes one. In a cross-layer transcoder the norm covers everything that a latent writes.

Sources:
  OpenMOSS/Llamascopium 2.0.0b34 (formerly Language-Model-SAEs, 95281ac7), `models/sparse_dictionary.py`,
  `models/sae.py`, `models/crosscoder.py`, `models/clt.py`, `activation_functions.py`. Scales are folded as the forward
  pass has them: its own `standardize_parameters_of_dataset_norm` leaves the thresholds of an SAE in their old unit.
"""

import os
import pathlib
from typing import Any

import numpy as np

from saejax.errors import UserError
from saejax.fields import paths
from saejax.interop import saelens_fold, strict
from saejax.kernels.row_norm import RowNorm
from saejax.sae import base, per_row
from saejax.sae.layout import Family
from saejax.sae.model import SAE
from saejax.storage import json_yaml

name = "llamascopium"
export = None
CONFIG, WEIGHTS = "config.json", "sae_weights.safetensors"

_NEEDED = {"sae_type", "d_model", "expansion_factor", "act_fn", "norm_activation", "sparsity_include_decoder_norm"}
_SHARED = {"use_decoder_bias", "top_k"}
_NOT_USED = {
    "use_triton_kernel", "sparsity_threshold_for_triton_spmm_kernel", "jumprelu_threshold_window",
    "sae_pretrained_name_or_path", "strict_loading",
}  # fmt: skip
_OWN: dict[str, tuple[set[str], set[str]]] = {
    "sae": ({"hook_point_in", "hook_point_out"}, {"use_glu_encoder"}),
    "crosscoder": ({"hook_points"}, set()),
    "clt": (
        {"hook_points_in", "hook_points_out"},
        {"init_cross_layer_decoder_all_zero", "decode_with_csr", "sparsity_threshold_for_csr"},
    ),
}
"""Keys of each sae_type: needed and optional."""
_Read = tuple[base.Sparsifier, base.SAEParams, list[str]]
_NORM, _THRESHOLD = "dataset_average_activation_norm.", "activation_function.log_jumprelu_threshold"


def detect(path: pathlib.Path) -> bool:
    """Returns whether `path` is a directory with both files."""
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def load(path: str | os.PathLike) -> SAE:
    """Reads one directory of `sae_type` sae (a transcoder where its two hooks differ), crosscoder or clt.

    Raises:
      UserError: a key is missing or unknown, or asks for what cannot be honoured; a wrong shape; a NaN.
    """
    path = paths.local(path, "path")
    where, file = json_yaml.inside(path, CONFIG), json_yaml.inside(path, WEIGHTS)
    config = strict.read_json(where)
    kind = strict.choice(where, config, "sae_type", tuple(_OWN), None)
    needed, optional = _OWN[kind]
    strict.same_keys(where, set(config), _NEEDED | needed, optional=_SHARED | _NOT_USED | optional)
    strict.choice(where, config, "use_glu_encoder", (False,), False)
    sparsifier, params, hooks = {"sae": _sae, "crosscoder": _crosscoder, "clt": _clt}[kind](where, file, config)
    origin = {"path": str(path), "hook_name": ",".join(dict.fromkeys(hooks)), "llamascopium_config": config}
    return SAE(sparsifier, params, origin)


def _sae(where: pathlib.Path, file: pathlib.Path, config: dict[str, Any]) -> _Read:
    hooks = [strict.text(where, config, key) for key in ("hook_point_in", "hook_point_out")]
    weights, scales = _read(where, file, config, hooks)
    d, n = _sizes(where, config)
    shapes = {"W_E": (d, n), "b_E": (n,), "W_D": (n, d)}
    if strict.choice(where, config, "use_decoder_bias", (True, False), True):
        shapes["b_D"] = (d,)
    act = _act(where, config, ("relu", "topk", "jumprelu"), shapes, (n,))
    w = strict.arrays(file, weights, shapes)
    params = strict.params(w["W_E"], w["b_E"], w["W_D"], w.get("b_D", np.zeros(d)), **_thresholds(w))
    if _gated(where, config):
        params = saelens_fold.decoder_norms(params, in_units=True)
    s_in, s_out = scales[hooks[0]], scales[hooks[1]]
    scaled = np.asarray(params.W_enc) * s_in, params.b_enc, np.asarray(params.W_dec) / s_out
    params = strict.params(*scaled, np.asarray(params.b_dec) / s_out, **params.extra)
    fields: dict[str, Any] = {"k": strict.integer(where, config, "top_k")} if act == "topk" else {}
    transcodes = hooks[0] != hooks[1]
    fields |= strict.transcoder(params) if transcodes else {"subtract_b_dec": False}
    sparsifier = strict.build(where, act, params, **fields)
    if config["norm_activation"] == "token-wise":
        if transcodes:
            raise UserError(
                f"{where}: norm_activation=token-wise of two hooks scales by the target, which is not given"
            )
        return per_row.LayerNormed.of(sparsifier, RowNorm.length), params, hooks
    return sparsifier, params, hooks


def _crosscoder(where: pathlib.Path, file: pathlib.Path, config: dict[str, Any]) -> _Read:
    hooks = _hooks(where, config, "hook_points")
    weights, scales = _read(where, file, config, hooks)
    (d, n), h = _sizes(where, config), len(hooks)
    shapes = {"W_E": (h, d, n), "b_E": (h, n), "W_D": (h, n, d), "b_D": (h, d)}
    act = _act(where, config, ("relu", "jumprelu"), shapes, (n,))
    if not _gated(where, config):
        raise UserError(f"{where}: sparsity_include_decoder_norm must be true for a crosscoder")
    w = strict.arrays(file, weights, shapes)
    s = np.array([scales[hook] for hook in hooks], np.float32)
    W_enc, b_enc = (w["W_E"] * s[:, None, None]).reshape(h * d, n), w["b_E"].sum(axis=0)
    by_site, b_dec = w["W_D"] / s[:, None, None], (w["b_D"] / s[:, None]).reshape(-1)
    fields: dict[str, Any] = {"family": Family.crosscoder, "sites": (d,) * h, "subtract_b_dec": False}
    if act == "l1":
        params = strict.params(W_enc, b_enc, np.moveaxis(by_site, 0, 1).reshape(n, h * d), b_dec)
        return strict.build(where, act, params, **fields), params, hooks
    W_dec = np.zeros((h, n, h, d), np.float32)
    W_dec[np.arange(h), :, np.arange(h)] = by_site
    norms = np.linalg.norm(w["W_D"], axis=2)
    highest = np.finfo(np.float32).max  # of a latent that writes nothing
    threshold = np.divide(np.exp(w[_THRESHOLD])[None, :], norms, out=np.full_like(norms, highest), where=norms > 0)
    repeated = np.tile(W_enc, (1, h)), np.tile(b_enc, h)
    params = strict.params(*repeated, W_dec.reshape(h * n, h * d), b_dec, threshold=threshold.reshape(-1))
    return strict.build(where, act, params, **fields), params, hooks


def _clt(where: pathlib.Path, file: pathlib.Path, config: dict[str, Any]) -> _Read:
    hooks_in, hooks_out = (_hooks(where, config, key) for key in ("hook_points_in", "hook_points_out"))
    if len(hooks_in) != len(hooks_out):
        raise UserError(f"{where}: hook_points_in and hook_points_out must be as many, got {hooks_in}, {hooks_out}")
    weights, scales = _read(where, file, config, hooks_in + hooks_out)
    (d, n), layers = _sizes(where, config), range(len(hooks_in))
    shapes = {"W_E": (len(layers), d, n), "b_E": (len(layers), n)}
    shapes |= {f"W_D.{i}": (i + 1, n, d) for i in layers} | {f"b_D.{i}": (d,) for i in layers}
    act = _act(where, config, ("relu", "layertopk", "jumprelu"), shapes, (len(layers), n))
    w = strict.arrays(file, weights, shapes)
    W_dec = np.zeros((len(layers), n, len(layers), d), np.float32)
    for i in layers:
        W_dec[: i + 1, :, i] = w[f"W_D.{i}"]
    W_enc, b_dec = np.moveaxis(w["W_E"], 0, 1).reshape(d, -1), np.concatenate([w[f"b_D.{i}"] for i in layers])
    extra = {key: array.reshape(-1) for key, array in _thresholds(w).items()}
    params = strict.params(W_enc, w["b_E"].reshape(-1), W_dec.reshape(len(layers) * n, -1), b_dec, **extra)
    if _gated(where, config):
        params = saelens_fold.decoder_norms(params, in_units=True)
    s_in = np.repeat(np.array([scales[hook] for hook in hooks_in], np.float32), n)[None, :]
    s_out = np.repeat(np.array([scales[hook] for hook in hooks_out], np.float32), d)
    scaled = np.asarray(params.W_enc) * s_in, params.b_enc, np.asarray(params.W_dec) / s_out[None, :]
    params = strict.params(*scaled, np.asarray(params.b_dec) / s_out, **params.extra)
    fields: dict[str, Any] = {"family": Family.clt, "sites": (d,) * (2 * len(layers)), "d_in": d * len(layers)}
    fields |= {"k": strict.integer(where, config, "top_k")} if act == "topk" else {}
    return strict.build(where, act, params, subtract_b_dec=False, **fields), params, hooks_in + hooks_out


def _hooks(where: pathlib.Path, config: dict[str, Any], key: str) -> list[str]:
    hooks = config[key]
    if not isinstance(hooks, list) or not hooks or not all(isinstance(hook, str) for hook in hooks):
        raise UserError(f"{where}: {key} must be a list of names, got {hooks!r}")
    return hooks


def _gated(where: pathlib.Path, config: dict[str, Any]) -> bool:
    return strict.choice(where, config, "sparsity_include_decoder_norm", (True, False), None)


def _thresholds(w: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"threshold": np.exp(w[_THRESHOLD])} if _THRESHOLD in w else {}


def _sizes(where: pathlib.Path, config: dict[str, Any]) -> tuple[int, int]:
    """(d_model, d_sae)."""
    d, n = strict.integer(where, config, "d_model"), strict.number(where, config, "expansion_factor")
    n *= d
    if abs(n - round(n)) > 1e-6 or min(d, round(n)) < 1:
        raise UserError(f"{where}: d_model * expansion_factor must be a positive whole number, got {n}")
    return d, round(n)


def _act(
    where: pathlib.Path,
    config: dict[str, Any],
    allowed: tuple[str, ...],
    shapes: dict[str, tuple[int, ...]],
    of_threshold: tuple[int, ...],
) -> str:
    """Our architecture for act_fn; where it has thresholds, their logarithms join the `shapes` of the weights."""
    if str(config["act_fn"]).startswith("batch"):
        raise UserError(
            f"{where}: act_fn={config['act_fn']} selects among all rows of a batch, and the file has no threshold to "
            "do it row by row: convert it to jumprelu with the mean of the smallest active latents, as its "
            "documentation advises"
        )
    act = strict.choice(where, config, "act_fn", allowed, None)
    if act == "jumprelu":
        shapes[_THRESHOLD] = of_threshold
    return {"relu": "l1", "layertopk": "topk"}.get(act, act)


def _read(
    where: pathlib.Path, file: pathlib.Path, config: dict[str, Any], hooks: list[str]
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """The weights, and what the rows of each hook are multiplied by."""
    weights = strict.read_safetensors(file)
    norms = {key: weights.pop(key) for key in list(weights) if key.startswith(_NORM)}
    modes = ("dataset-wise", "inference", *(("token-wise",) if config["sae_type"] == "sae" else ()))
    how = strict.choice(where, config, "norm_activation", modes, None)
    wanted = {_NORM + hook for hook in hooks}
    # The keys are written in any case; where training did not measure norms, with whatever was in memory.
    strict.same_keys(file, set(norms), wanted, optional=() if how == "dataset-wise" else wanted)
    if how != "dataset-wise":
        return weights, dict.fromkeys(hooks, 1.0)
    checked = strict.arrays(file, norms, dict.fromkeys(sorted(wanted), ()))
    for key, norm in checked.items():
        if not norm > 0:
            raise UserError(f"{file}: {key} must be above 0, got {float(norm)}")
    d = strict.integer(where, config, "d_model")
    return weights, {hook: d**0.5 / float(checked[_NORM + hook]) for hook in hooks}
