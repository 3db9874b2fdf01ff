"""cfg.json of SAELens 6 and later: the keys of each architecture, their allowed values, and what saejax writes.

Sources:
  SAELens 6.54 (Bloom, Tigges, Duong, Chanin), `SAEConfig` and `TrainingSAEConfig` of every architecture.
"""

import dataclasses
import json
import pathlib
import re
from typing import Any

from saejax.errors import UserError
from saejax.fields import paths
from saejax.interop import strict
from saejax.sae.layout import Family
from saejax.sae.model import SAE

VERSION = "6.54.12"
"""What we say we are compatible with; readers take anything below 6.0.0 for the older flat config."""

_SHARED = {
    "architecture", "d_in", "d_sae", "dtype", "device", "apply_b_dec_to_input", "normalize_activations",
    "reshape_activations", "metadata",
}  # fmt: skip
_NOT_USED = {"device", "dtype", "reshape_activations"}
_TOPK = {"k", "rescale_acts_by_decoder_norm"}
_TRAINING_TOPK = {"use_sparse_activations", "aux_loss_coefficient", "decoder_init_norm"}
_MP = {"residual_threshold", "max_iterations", "stop_on_duplicate_support"}

TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")

OWN: dict[str, set[str]] = {
    "standard": set(),
    "gated": set(),
    "jumprelu": set(),
    "topk": _TOPK,
    "abstopk": _TOPK,
    "matching_pursuit": _MP,
    "batchtopk": _TOPK,
    "matryoshka_batchtopk": _TOPK | {"matryoshka_widths"},
    **{name: {"d_out"} for name in TRANSCODERS},
}
"""Keys that an architecture adds; batchtopk and matryoshka_batchtopk exist as training checkpoints only."""

_TRAINING: dict[str, set[str]] = {
    "standard": {"decoder_init_norm", "l1_coefficient", "lp_norm", "l1_warm_up_steps"},
    "gated": {"decoder_init_norm", "l1_coefficient", "l1_warm_up_steps"},
    "topk": _TRAINING_TOPK,
    "abstopk": _TRAINING_TOPK,
    "jumprelu": {
        "decoder_init_norm", "jumprelu_init_threshold", "jumprelu_bandwidth", "jumprelu_sparsity_loss_mode",
        "l0_coefficient", "l0_warm_up_steps", "pre_act_loss_coefficient", "jumprelu_tanh_scale",
        "jumprelu_ste_to_input", "target_l0",
    },
    "matching_pursuit": {"decoder_init_norm"},
    "batchtopk": _TRAINING_TOPK | {"topk_threshold_lr"},
    "matryoshka_batchtopk": _TRAINING_TOPK | {"topk_threshold_lr", "use_matryoshka_aux_loss"},
    **{name: set() for name in TRANSCODERS},
}  # fmt: skip
"""Keys that only training checkpoints have; what they say of training is kept in the provenance."""

_ELSEWHERE = {"temporal": "a temporal SAE, which attends over positions"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parsed:
    """Content of a checked cfg.json."""

    where: pathlib.Path
    """The file."""
    architecture: str
    """SAELens' name."""
    d_in: int
    """Width of the activations."""
    d_out: int
    """Width of the output; d_in except for transcoders."""
    d_sae: int
    """Number of latents."""
    k: float | None
    """Latents per row; a float where the architecture counts them on average."""
    subtract: bool
    """Whether the encoder reads x - b_dec."""
    rescale: bool
    """Whether decoder norms multiply pre-activations and divide latents in the decoder."""
    normalize: str
    """SAELens' name of the normalisation of activations."""
    own: dict[str, Any]
    """The architecture's other keys."""
    metadata: dict[str, Any]
    """Where the SAE comes from."""


def read(where: pathlib.Path) -> Parsed:
    """Returns a cfg.json, every key of which is known and allowed."""
    config = strict.read_json(where)
    _check_version(where, config)
    architecture = config.get("architecture")
    if not isinstance(architecture, str) or architecture not in OWN:
        reason = f", {_ELSEWHERE[architecture]}" if architecture == "temporal" else ""
        raise UserError(f"{where}: architecture must be one of {', '.join(OWN)}, got {architecture}{reason}")
    own, training = OWN[architecture], _TRAINING[architecture]
    strict.same_keys(where, set(config), _SHARED | own, optional=_NOT_USED | training)
    strict.choice(where, config, "reshape_activations", ("none", "hook_z"), "none")
    known = ("none", "expected_average_only_in", "covariance_whitening", "constant_norm_rescale", "layer_norm")
    transcodes = architecture in TRANSCODERS
    return Parsed(
        where=where,
        architecture=architecture,
        d_in=strict.integer(where, config, "d_in"),
        d_out=strict.integer(where, config, "d_out" if transcodes else "d_in"),
        d_sae=strict.integer(where, config, "d_sae"),
        k=_k(where, config, architecture) if "k" in own else None,
        subtract=strict.choice(where, config, "apply_b_dec_to_input", (False,) if transcodes else (True, False), None),
        rescale=strict.choice(where, config, "rescale_acts_by_decoder_norm", (True, False), False),
        normalize=strict.choice(where, config, "normalize_activations", known[:1] if transcodes else known, None),
        own={key: value for key, value in config.items() if key in own | training},
        metadata=config["metadata"],
    )


def written(sae: SAE, architecture: str, subtract: bool, own: dict[str, Any]) -> dict[str, Any]:
    """Returns the cfg.json of an SAE that is written in the data's own scale."""
    metadata = _metadata(sae)
    hook = metadata.get("hook_name") or ""
    return {
        "architecture": architecture,
        "d_in": sae.sparsifier.d_in,
        "d_sae": sae.sparsifier.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": subtract,
        "normalize_activations": "none",
        "reshape_activations": "hook_z" if hook.endswith("hook_z") else "none",
        "metadata": metadata,
        **own,
    }


def _check_version(where: pathlib.Path, config: dict[str, Any]) -> None:
    metadata = config.get("metadata")
    old = {"hook_point", "activation_fn_str", "activation_fn", "finetuning_scaling_factor"} & set(config)
    if old or not isinstance(metadata, dict):
        raise UserError(
            f"{where}: must hold a mapping `metadata`, as SAELens writes since 6.0.0; what the flat config of earlier "
            f"ones{f' ({min(old)})' if old else ''} means depends on the version: load it with SAELens 6 and save it"
        )
    version = str(metadata.get("sae_lens_version"))
    major = re.match(r"[0-9]{1,9}(?![^.])", version)
    if major is None or int(major[0]) < 6:
        raise UserError(f"{where}: metadata.sae_lens_version must be at least 6.0.0, got {version}")


def _k(where: pathlib.Path, config: dict[str, Any], architecture: str) -> float:
    if "batchtopk" in architecture:
        return strict.number(where, config, "k")
    return strict.integer(where, config, "k")


def _metadata(sae: SAE) -> dict[str, Any]:
    """SAELens' names for the SAE's provenance; the source of a run holds hook and model."""
    provenance = sae.provenance
    source = provenance.get("source") or {}
    source = source if isinstance(source, dict) else {}
    model = provenance.get("model") or source.get("model") or {}
    model = {"name": model} if isinstance(model, str) else model
    model = model if isinstance(model, dict) else {}
    hook, out = provenance.get("hook") or source.get("hook") or provenance.get("hook_name"), None
    hook = hook if isinstance(hook, str) else None
    if sae.sparsifier.family is Family.transcoder:
        hook, _, out = (hook or "").partition(",")
    found = {
        "model_name": model.get("name") or provenance.get("model_name"),
        "hook_name": hook or None,
        "hook_name_out": out or provenance.get("hook_name_out"),
        "context_size": source.get("context_length") or provenance.get("context_size"),
        "dataset_path": provenance.get("dataset_path"),
        "prepend_bos": provenance.get("prepend_bos"),
    }
    found = {key: value for key, value in found.items() if value is not None}
    plain = json.loads(json.dumps({k: v for k, v in provenance.items() if k != "saejax_provenance"}, default=str))
    return {
        "sae_lens_version": VERSION,
        **paths.unplaced(found),
        "training_library": "saejax",
        "training_architecture": sae.sparsifier.name,
        "saejax_provenance": paths.unplaced(plain),
    }
