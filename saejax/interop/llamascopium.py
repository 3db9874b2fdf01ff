r"""Llamascopium (Language-Model-SAEs) since 2025: config.json with sae_weights.safetensors.

.. math:: u = (s_{in}\, x) W_E + b_E, \quad f = \mathrm{act}(u \odot n) / n, \quad \hat x = (f W_D + b_D) / s_{out},
    \qquad n_i = \|W_{D,i}\|

(n = 1 where `sparsity_include_decoder_norm` is false), with :math:`s = \sqrt d /` the average norm of a hook's rows
where `norm_activation` is dataset-wise, and :math:`\sqrt d / \|x\|` where it is token-wise. Both are folded here or
kept, and decoder rows that gate are scaled to norm 1 in the unit of training, latents times the old norms.

Sources:
  OpenMOSS/Llamascopium 2.0.0b34 (formerly Language-Model-SAEs, 95281ac7), `models/sparse_dictionary.py`,
  `models/sae.py`, `activation_functions.py`. Scales are folded as the forward pass has them: its own
  `standardize_parameters_of_dataset_norm` leaves the thresholds of an SAE in their old unit.
"""

import dataclasses
import os
import pathlib
from typing import Any

import numpy as np

from saejax.errors import UserError
from saejax.interop import saelens_fold, strict
from saejax.kernels.row_norm import RowNorm
from saejax.sae import base, per_row
from saejax.sae.model import SAE

name = "llamascopium"
export = None
CONFIG, WEIGHTS = "config.json", "sae_weights.safetensors"

_NEEDED = {"sae_type", "d_model", "expansion_factor", "act_fn", "norm_activation", "sparsity_include_decoder_norm"}
_SHARED = {"use_decoder_bias", "top_k"}
_NOT_USED = {
    "use_triton_kernel", "sparsity_threshold_for_triton_spmm_kernel", "jumprelu_threshold_window",
    "sae_pretrained_name_or_path", "strict_loading",
}  # fmt: skip
_OWN: dict[str, tuple[set[str], set[str]]] = {"sae": ({"hook_point_in", "hook_point_out"}, {"use_glu_encoder"})}
"""Keys of each sae_type: needed and optional."""
_NORM, _THRESHOLD = "dataset_average_activation_norm.", "activation_function.log_jumprelu_threshold"


def detect(path: pathlib.Path) -> bool:
    """Returns whether `path` is a directory with both files."""
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def load(path: str | os.PathLike) -> SAE:
    """Reads one directory of `sae_type` sae.

    Raises:
      UserError: a key is missing or unknown, or asks for what cannot be honoured; a wrong shape; a NaN.
    """
    path = pathlib.Path(path)
    where, file = path / CONFIG, path / WEIGHTS
    config = strict.read_json(where)
    kind = strict.choice(where, config, "sae_type", tuple(_OWN), None)
    needed, optional = _OWN[kind]
    strict.same_keys(where, set(config), _NEEDED | needed, optional=_SHARED | _NOT_USED | optional)
    strict.choice(where, config, "use_glu_encoder", (False,), False)
    sparsifier, params = _sae(where, file, config)
    origin = {"path": str(path), "hook_name": config["hook_point_in"], "llamascopium_config": config}
    return SAE(sparsifier, params, origin)


def _sae(where: pathlib.Path, file: pathlib.Path, config: dict[str, Any]) -> tuple[base.Sparsifier, base.SAEParams]:
    hooks = [config["hook_point_in"], config["hook_point_out"]]
    weights, scales = _read(where, file, config, hooks)
    d, n = _sizes(where, config)
    shapes = {"W_E": (d, n), "b_E": (n,), "W_D": (n, d)}
    if strict.choice(where, config, "use_decoder_bias", (True, False), True):
        shapes["b_D"] = (d,)
    act, extra = _act(where, config, shapes, (n,))
    w = strict.arrays(file, weights, shapes)
    extra = {name: np.exp(w[key]) for name, key in extra.items()}
    params = strict.params(w["W_E"], w["b_E"], w["W_D"], w.get("b_D", np.zeros(d)), **extra)
    if strict.choice(where, config, "sparsity_include_decoder_norm", (True, False), None):
        params = saelens_fold.decoder_norms(params, in_units=True)
    s_in, s_out = scales[hooks[0]], scales[hooks[1]]
    params = dataclasses.replace(
        params, W_enc=params.W_enc * s_in, W_dec=params.W_dec / s_out, b_dec=params.b_dec / s_out
    )
    fields = {"k": strict.integer(where, config, "top_k")} if act == "topk" else {}
    sparsifier = strict.build(where, act, params, subtract_b_dec=False, **fields)
    if config["norm_activation"] == "token-wise":
        if hooks[0] != hooks[1]:
            raise UserError(
                f"{where}: norm_activation=token-wise of two hooks scales by the target, which is not given"
            )
        return per_row.LayerNormed.of(sparsifier, RowNorm.length), params
    return sparsifier, params


def _sizes(where: pathlib.Path, config: dict[str, Any]) -> tuple[int, int]:
    """(d_model, d_sae)."""
    d, n = strict.integer(where, config, "d_model"), strict.number(where, config, "expansion_factor")
    n *= d
    if abs(n - round(n)) > 1e-6 or min(d, round(n)) < 1:
        raise UserError(f"{where}: d_model * expansion_factor must be a positive whole number, got {n}")
    return d, round(n)


def _act(
    where: pathlib.Path, config: dict[str, Any], shapes: dict[str, tuple[int, ...]], of_threshold: tuple[int, ...]
) -> tuple[str, dict[str, str]]:
    """Our architecture for act_fn and, where it has thresholds, the key of their logarithms, added to `shapes`."""
    act = strict.choice(where, config, "act_fn", ("relu", "topk", "jumprelu", "batchtopk"), None)
    if act == "batchtopk":
        raise UserError(
            f"{where}: act_fn=batchtopk selects among all rows of a batch, and the file has no threshold to do it row "
            "by row: convert it to jumprelu with the mean of the smallest active latents, as its documentation advises"
        )
    if act == "jumprelu":
        shapes[_THRESHOLD] = of_threshold
        return "jumprelu", {"threshold": _THRESHOLD}
    return ("l1" if act == "relu" else "topk"), {}


def _read(
    where: pathlib.Path, file: pathlib.Path, config: dict[str, Any], hooks: list[str]
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """The weights, and what the rows of each hook are multiplied by."""
    weights = strict.read_safetensors(file)
    norms = {key: weights.pop(key) for key in list(weights) if key.startswith(_NORM)}
    how = strict.choice(where, config, "norm_activation", ("dataset-wise", "inference", "token-wise"), None)
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
