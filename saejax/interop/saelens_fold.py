"""Folding of SAELens' normalisations and decoder norms, so that an SAE works on the data itself.

After folding, latents and reconstructions equal SAELens' after its own folding.

Sources:
  SAELens 6.54, `SAE.fold_activation_norm_scaling_factor`, `fold_activation_whitening`, `fold_W_dec_norm`.
"""

import pathlib

import numpy as np

from saejax.errors import UserError
from saejax.interop import strict
from saejax.interop.saelens_config import Parsed
from saejax.kernels.row_norm import RowNorm
from saejax.sae import base
from saejax.storage import json_yaml

PER_ROW = {"layer_norm": RowNorm.deviation, "constant_norm_rescale": RowNorm.length}
"""Normalisations that depend on the row and have no place in weights: the architecture does them (`sae.per_row`)."""
SCALER, WHITENING = "activation_scaler.json", "activation_whitening.safetensors"


def data_scale(folder: pathlib.Path, config: Parsed, params: base.SAEParams) -> base.SAEParams:
    """Returns the parameters for x itself: decoder norms first (where the config has them), then normalisation."""
    if config.rescale:
        params = decoder_norms(params, in_units=True)
    if config.normalize in ("none", *PER_ROW):
        return params
    scaler = json_yaml.inside(folder, SCALER)
    if not scaler.is_file():
        raise UserError(
            f"{config.where}: normalize_activations={config.normalize} needs {SCALER} beside it, as training "
            "checkpoints have it; without the scale the SAE cannot be applied"
        )
    if config.normalize == "expected_average_only_in":
        scale = strict.number(scaler, strict.read_json(scaler), "scaling_factor")
        if scale <= 0:
            raise UserError(f"{scaler}: scaling_factor must be above 0, got {scale}")
        return _scaled(params, scale, config.rescale or config.architecture == "matching_pursuit")
    if config.architecture == "matching_pursuit":
        raise UserError(f"{config.where}: covariance_whitening cannot be folded into a tied encoder")
    d = config.d_in
    shapes = {"mean": (d,), "matrix": (d, d), "inverse_matrix": (d, d)}
    whitening = strict.arrays(folder / WHITENING, strict.read_safetensors(json_yaml.inside(folder, WHITENING)), shapes)
    return _whitened(params, whitening, config.subtract)


def decoder_norms(params: base.SAEParams, in_units: bool = False) -> base.SAEParams:
    """Returns parameters with decoder rows of norm 1 and latents times the old norms; zero rows stay.

    Args:
      params: Parameters.
      in_units: Whether thresholds already are in units of latents times norms.
    """
    W_enc, b_enc, W_dec = (np.asarray(a, np.float32) for a in (params.W_enc, params.b_enc, params.W_dec))
    norms = np.linalg.norm(W_dec, axis=1)
    some = np.where(norms > 0, norms, np.float32(1))
    of_latents = {
        name: np.asarray(value) * some if name in ("b_mag", "threshold") and not in_units else value
        for name, value in params.extra.items()
    }
    # With a norm of 0 the pre-activations of SAELens are 0 too.
    by = norms if in_units else some
    return strict.params(W_enc * by[None, :], b_enc * by, W_dec / some[:, None], params.b_dec, **of_latents)


def _scaled(params: base.SAEParams, scale: float, rescaled: bool) -> base.SAEParams:
    """For x from parameters of scale * x. Latents keep their unit, or carry the data's where `rescaled`.

    They do where SAELens multiplies by decoder norms, which its fold divides by the scale, and in matching pursuit,
    whose dictionary stays.
    """
    W_enc, b_enc, W_dec, b_dec = (np.asarray(a) for a in (params.W_enc, params.b_enc, params.W_dec, params.b_dec))
    if rescaled:
        extra = {name: np.asarray(value) / scale for name, value in params.extra.items()}
        return strict.params(W_enc, b_enc / scale, W_dec, b_dec / scale, **extra)
    return strict.params(W_enc * scale, b_enc, W_dec / scale, b_dec / scale, **params.extra)


def _whitened(params: base.SAEParams, whitening: dict[str, np.ndarray], subtract: bool) -> base.SAEParams:
    """For x from parameters of (x - mean) M, in float64."""
    mean, M, inverse = (whitening[name].astype(np.float64) for name in ("mean", "matrix", "inverse_matrix"))
    if not np.allclose(M @ inverse, np.eye(len(M)), atol=1e-2):
        raise UserError("activation_whitening.safetensors: inverse_matrix is not the inverse of matrix")
    W_enc = M @ np.asarray(params.W_enc, np.float64)
    b_enc, extra = np.asarray(params.b_enc, np.float64), dict(params.extra)
    if not subtract:
        shift = mean @ W_enc
        b_enc = b_enc - shift
        if "b_mag" in extra:
            extra["b_mag"] = extra["b_mag"] - shift * np.exp(np.asarray(extra["r_mag"], np.float64))
    W_dec = np.asarray(params.W_dec, np.float64) @ inverse
    b_dec = np.asarray(params.b_dec, np.float64) @ inverse + mean
    return strict.params(W_enc, b_enc, W_dec, b_dec, **extra)
