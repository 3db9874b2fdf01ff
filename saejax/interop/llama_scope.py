r"""Llama Scope (2024): hyperparams.json with checkpoints/final.safetensors, one threshold for all latents.

.. math:: u = (x W^T + b s_{in}^{-1}) \odot n, \quad f = u\, 1[u > \theta], \quad
    \hat x = \sum_i f_i\, d_i / \|d_i\| + c\, s_{out}^{-1}

with :math:`s = \sqrt d /` (average norm of the hook's rows), d_i the columns of the decoder and n_i = ||d_i|| s_in /
s_out. The original loader folds the two scales into the weights first, then the decoder norms (n = 1 where
`sparsity_include_decoder_norm` is false). Only then does it apply the threshold, which is in the unit of the data.

Sources:
  He et al., Llama Scope, 2024 (arXiv:2410.20526); OpenMOSS/Language-Model-SAEs at 4ec6f0aa (October 2024),
  `SparseAutoEncoder.from_config`, `standardize_parameters_of_dataset_activation_scaling`,
  `transform_to_unit_decoder_norm`; SAELens 6.54, `llama_scope_sae_huggingface_loader`.
"""

import dataclasses
import os
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np

from saejax.errors import UserError
from saejax.fields import paths
from saejax.interop import saelens_fold, strict
from saejax.sae import base
from saejax.sae.model import SAE
from saejax.storage import json_yaml

name = "llama_scope"
export = None
CONFIG, WEIGHTS = "hyperparams.json", "checkpoints/final.safetensors"

_NEEDED = {"d_model", "d_sae", "act_fn", "hook_point_in"}
_READ = {
    "hook_point_out", "expansion_factor", "jump_relu_threshold", "norm_activation", "dataset_average_activation_norm",
    "sparsity_include_decoder_norm", "use_decoder_bias", "apply_decoder_bias_to_pre_encoder", "use_glu_encoder",
    "top_k",
}  # fmt: skip
_NOT_USED = {
    "device", "dtype", "seed", "sae_pretrained_name_or_path", "strict_loading", "bias_init_method",
    "decoder_exactly_fixed_norm", "init_decoder_norm", "init_encoder_norm", "init_encoder_with_decoder_transpose", "lp",
    "l1_coefficient", "l1_coefficient_warmup_steps", "k_warmup_steps", "use_batch_norm_mse", "use_ghost_grads",
    "tp_size", "ddp_size",
}  # fmt: skip
"""What says how it was trained or loaded."""


def detect(path: pathlib.Path) -> bool:
    """Returns whether `path` is the directory of one."""
    return (path / CONFIG).is_file()


def load(path: str | os.PathLike) -> SAE:
    """Reads one directory, of activation `jumprelu`, `relu` or `topk`; a transcoder where its two hooks differ.

    Latents carry the data's unit and decoder rows have norm 1 (unless `sparsity_include_decoder_norm` is false).

    Raises:
      UserError: a key is missing or unknown, or asks for what cannot be honoured; a wrong shape; a NaN.
    """
    path = paths.local(path, "path")
    where, file = json_yaml.inside(path, CONFIG), json_yaml.inside(path, WEIGHTS)
    config = strict.read_json(where)
    strict.same_keys(where, set(config), _NEEDED, optional=_READ | _NOT_USED)
    d, n = strict.integer(where, config, "d_model"), strict.integer(where, config, "d_sae")
    strict.choice(where, config, "use_glu_encoder", (False,), False)
    strict.choice(where, config, "apply_decoder_bias_to_pre_encoder", (False,), False)
    act = strict.choice(where, config, "act_fn", ("jumprelu", "relu", "topk"), None)
    s_in, s_out = _scales(where, config)
    biased = strict.choice(where, config, "use_decoder_bias", (True, False), True)
    shapes = {"encoder.weight": (n, d), "encoder.bias": (n,), "decoder.weight": (d, n)}
    w = strict.arrays(file, strict.read_safetensors(file), shapes | ({"decoder.bias": (d,)} if biased else {}))
    b_dec = w.get("decoder.bias", np.zeros(d, np.float32)) / s_out
    params = strict.params(w["encoder.weight"].T, w["encoder.bias"] / s_in, w["decoder.weight"].T * s_in / s_out, b_dec)
    if strict.choice(where, config, "sparsity_include_decoder_norm", (True, False), True):
        params = saelens_fold.decoder_norms(params)
    sparsifier, params = _architecture(where, config, act, params)
    origin = {"path": str(path), "hook_name": config["hook_point_in"], "llama_scope_config": config}
    return SAE(sparsifier, params, origin)


def _scales(where: pathlib.Path, config: dict[str, Any]) -> tuple[float, float]:
    """Scales of the rows read and of the rows written in training."""
    if strict.choice(where, config, "norm_activation", ("dataset-wise", "inference"), "dataset-wise") == "inference":
        return 1.0, 1.0
    norms = config.get("dataset_average_activation_norm")
    norms = norms if isinstance(norms, dict) else {}
    same = config.get("hook_point_out") in (None, config["hook_point_in"])
    keys = {f"dataset_average_activation_norm.{key}" for key in norms}
    needed = {"dataset_average_activation_norm.in", "dataset_average_activation_norm.out"}
    strict.same_keys(where, keys, needed, optional={"dataset_average_activation_norm.out"} if same else ())
    found = [strict.number(where, norms, key) for key in ("in", "out" if "out" in norms else "in")]
    if min(found) <= 0:
        raise UserError(f"{where}: dataset_average_activation_norm must be above 0, got {norms}")
    return config["d_model"] ** 0.5 / found[0], config["d_model"] ** 0.5 / found[1]


def _architecture(
    where: pathlib.Path, config: dict[str, Any], act: str, params: base.SAEParams
) -> tuple[base.Sparsifier, base.SAEParams]:
    transcodes = config.get("hook_point_out") not in (None, config["hook_point_in"])
    fields = strict.transcoder(params) if transcodes else {"subtract_b_dec": False}
    if act == "relu":
        return strict.build(where, "l1", params, **fields), params
    if act == "topk":
        return strict.build(where, "topk", params, k=strict.integer(where, config, "top_k"), **fields), params
    threshold = max(strict.number(where, config, "jump_relu_threshold"), 0.0)
    params = dataclasses.replace(
        params, extra={"threshold": jnp.asarray(np.full(len(params.b_enc), threshold, np.float32))}
    )
    return strict.build(where, "jumprelu", params, **fields), params
