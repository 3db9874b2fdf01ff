"""The dictionary_learning format: a directory per trainer with ae.pt (a state dict) and config.json.

It also reads a run's checkpoint (`checkpoints/ae_1000.pt` below such a directory). Only config.json names the class of
the weights: two classes with the same keys infer differently.

Sources:
  dictionary_learning (Marks, Karvonen, Mueller), `dictionary.py` and the `config` of every trainer.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from saejax.errors import UserError
from saejax.fields import paths
from saejax.interop import folder, saelens_fold, strict, torch_file
from saejax.sae import base
from saejax.sae.model import SAE
from saejax.storage import json_yaml

name = "dictionary_learning"
CONFIG, WEIGHTS = "config.json", "ae.pt"

_Weights = dict[str, np.ndarray]

_LINEAR = {"encoder.weight": ("n", "d"), "decoder.weight": ("d", "n")}
_OURS = {"W_enc": ("d", "n"), "b_enc": ("n",), "W_dec": ("n", "d"), "b_dec": ("d",)}
_TOPK = {**_LINEAR, "encoder.bias": ("n",), "b_dec": ("d",), "k": (), "threshold": ()}

KEYS: dict[str, dict[str, tuple[str, ...]]] = {
    "AutoEncoder": {**_LINEAR, "encoder.bias": ("n",), "bias": ("d",)},
    "AutoEncoderNew": {**_LINEAR, "encoder.bias": ("n",), "decoder.bias": ("d",)},
    "GatedAutoEncoder": {**_LINEAR, "decoder_bias": ("d",), "r_mag": ("n",), "gate_bias": ("n",), "mag_bias": ("n",)},
    "JumpReluAutoEncoder": {**_OURS, "threshold": ("n",)},
    "AutoEncoderTopK": _TOPK,
    "BatchTopKSAE": _TOPK,
    "MatryoshkaBatchTopKSAE": {**_OURS, "k": (), "threshold": (), "group_sizes": ("groups",)},
}
"""Every class of dictionary_learning with its keys and shapes; n = dict_size, d = activation_dim."""

_TRAINERS = {
    "AutoEncoder": "StandardTrainer",
    "AutoEncoderNew": "StandardTrainerAprilUpdate",
    "GatedAutoEncoder": "GatedSAETrainer",
    "JumpReluAutoEncoder": "JumpReluTrainer",
    "AutoEncoderTopK": "TopKTrainer",
    "BatchTopKSAE": "BatchTopKTrainer",
    "MatryoshkaBatchTopKSAE": "MatryoshkaBatchTopKTrainer",
}
_EXPORTED = ("l1", "p_anneal", "gated", "jumprelu", "topk", "batch_topk", "matryoshka")


def detect(path: pathlib.Path) -> bool:
    """Returns whether `path` is a trainer's directory, or a .pt file with the config of one beside or above it."""
    if path.is_dir():
        return (path / WEIGHTS).is_file()
    return path.suffix == ".pt" and path.is_file() and (path.name == WEIGHTS or _describes(path))


def load(path: str | os.PathLike) -> SAE:
    """Reads a trainer's directory, or one checkpoint of it, of any class in KEYS.

    Latents are those of the class as saved. Only `AutoEncoder.from_pretrained` would first scale decoder rows to norm 1
    and latents by the old norms.

    Raises:
      UserError: the file would run code; a key is missing or unknown; a wrong shape; a NaN; no config.
    """
    path = paths.local(path, "path")
    file = json_yaml.inside(path, WEIGHTS) if path.is_dir() else path
    found = torch_file.read(file)
    if isinstance(found, dict) and {"ae", "optimizer"} <= set(found):
        raise UserError(
            f"{file}: a backup of an unfinished run (step, ae, optimizer), in the scale of its normalised activations; "
            "take ae.pt of the finished run, or one of its checkpoints"
        )
    where, trainer = _trainer(file)
    kind = trainer.get("dict_class")
    if not isinstance(kind, str) or kind not in KEYS:
        raise UserError(f"{where}: trainer.dict_class must be one of {', '.join(KEYS)}, got {kind}")
    w = _checked(file, kind, torch_file.read_state_dict(file))
    _agree(where, trainer, kind, w)
    params, ours, fields = _TAKEN[kind](file, w)
    sparsifier = strict.build(file, ours, params, **fields)
    origin = {"path": str(path), "architecture": kind, "dictionary_learning_config": trainer}
    model, hook = trainer.get("lm_name"), trainer.get("submodule_name")
    origin |= {key: value for key, value in {"model_name": model, "hook_name": hook}.items() if value}
    return SAE(sparsifier, params, origin)


def export(sae: SAE, path: str | os.PathLike) -> pathlib.Path:
    """Writes an SAE so that `dictionary_learning.utils.load_dictionary(path, device)` reads it.

    Args:
      sae: An L1, PAnneal, Gated, JumpReLU, TopK, BatchTopK or Matryoshka SAE with a linear or tied encoder.
      path: Directory; made where missing.

    Returns:
      The directory.

    Raises:
      UserError: the architecture has no place in the format.
    """
    sparsifier = sae.sparsifier
    strict.check_linear(sparsifier, name, _EXPORTED)
    kind, state = _state(sparsifier, sae.params)
    state = {key: value if key in ("k", "group_sizes") else _plain(value) for key, value in state.items()}
    trainer: dict[str, Any] = {
        "trainer_class": _TRAINERS[kind],
        "dict_class": kind,
        "activation_dim": sparsifier.d_in,
        "dict_size": sparsifier.d_sae,
        "layer": sae.provenance.get("layer"),
        "lm_name": paths.unplaced(sae.provenance.get("model_name")),
        "submodule_name": sae.provenance.get("hook_name"),
        "wandb_name": kind,
    }
    if "k" in state:
        trainer["k"] = int(state["k"])
    path = paths.local(path, "path")
    config = {"trainer": trainer, "buffer": {}, "training_library": "saejax"}
    with folder.filled(path, (CONFIG, WEIGHTS)) as part:
        torch_file.write_state_dict(part / WEIGHTS, state)
        (part / CONFIG).write_text(json.dumps(config, indent=2, default=str) + "\n", encoding="utf-8")
    return path


def _config_of(file: pathlib.Path) -> pathlib.Path | None:
    """The config.json of a weights file: beside it, or above `checkpoints/`."""
    folders = [file.parent, *([file.parent.parent] if file.parent.name == "checkpoints" else [])]
    return next((json_yaml.inside(folder, CONFIG) for folder in folders if (folder / CONFIG).is_file()), None)


def _describes(file: pathlib.Path) -> bool:
    """Whether the config.json of a weights file is a trainer's: other tools have files of that name too."""
    try:
        where = _config_of(file)
        return where is not None and "trainer" in strict.read_json(where)
    except (UserError, OSError):
        return False


def _trainer(file: pathlib.Path) -> tuple[pathlib.Path, dict[str, Any]]:
    where = _config_of(file)
    if where is None:
        raise UserError(
            f"{file}: needs {CONFIG} beside it (trainer.dict_class, one of {', '.join(KEYS)}): the weights alone do "
            "not say whether they infer with a threshold or with the k largest"
        )
    trainer = strict.read_json(where).get("trainer")
    if not isinstance(trainer, dict):
        raise UserError(f"{where}: must hold a mapping `trainer`")
    return where, trainer


def _checked(file: pathlib.Path, kind: str, state: _Weights) -> _Weights:
    """The tensors, all of the class's keys and shapes."""
    main, transposed = ("encoder.weight", True) if "encoder.weight" in KEYS[kind] else ("W_enc", False)
    strict.same_keys(file, set(state), set(KEYS[kind]))
    d, n = strict.sizes(file, state, main, transposed)
    axes = {"d": d, "n": n, "groups": state["group_sizes"].size if "group_sizes" in state else 0}
    shapes = {key: tuple(axes[axis] for axis in shape) for key, shape in KEYS[kind].items()}
    return strict.arrays(file, state, shapes, integers={"k", "group_sizes"} & set(shapes))


def _agree(where: pathlib.Path, trainer: dict[str, Any], kind: str, w: _Weights) -> None:
    """Refuses a config that says other sizes than the weights have."""
    n, d = w["encoder.weight"].shape if "encoder.weight" in w else w["W_dec"].shape
    has = {"activation_dim": d, "dict_size": n} | ({"k": int(w["k"])} if "k" in w else {})
    for key, value in has.items():
        if key in trainer and trainer[key] != value:
            raise UserError(f"{where}: trainer.{key} is {trainer[key]}, but the weights of {kind} have {value}")


def _from_linear(w: _Weights, b_enc: str, b_dec: str, **extra: Any) -> base.SAEParams:
    return strict.params(w["encoder.weight"].T, w[b_enc], w["decoder.weight"].T, w[b_dec], **extra)


def _take_autoencoder(file: pathlib.Path, w: _Weights):
    return _from_linear(w, "encoder.bias", "bias"), "l1", {"subtract_b_dec": True}


def _take_april(file: pathlib.Path, w: _Weights):
    return _from_linear(w, "encoder.bias", "decoder.bias"), "l1", {"subtract_b_dec": False}


def _take_gated(file: pathlib.Path, w: _Weights):
    params = _from_linear(w, "gate_bias", "decoder_bias", r_mag=w["r_mag"], b_mag=w["mag_bias"])
    return params, "gated", {"subtract_b_dec": True, "unit_decoder": True}


def _take_jumprelu(file: pathlib.Path, w: _Weights):
    # relu(pre * (pre > threshold)) of a negative threshold is that of 0.
    params = strict.params(**w | {"threshold": np.maximum(w["threshold"], 0)})
    return params, "jumprelu", {"subtract_b_dec": False}


def _take_topk(file: pathlib.Path, w: _Weights):
    # The stored threshold is not used at inference: the class keeps the k largest of every row.
    return _from_linear(w, "encoder.bias", "b_dec"), "topk", {"k": int(w["k"]), "subtract_b_dec": True}


def _take_batch_topk(file: pathlib.Path, w: _Weights):
    params = _from_linear(w, "encoder.bias", "b_dec", threshold=_threshold(file, w))
    return params, "batch_topk", {"k": int(w["k"]), "subtract_b_dec": True}


def _take_matryoshka(file: pathlib.Path, w: _Weights):
    sizes = [int(size) for size in w["group_sizes"]]
    if min(sizes, default=0) < 1 or sum(sizes) != len(w["b_enc"]):
        raise UserError(f"{file}: group_sizes must be positive and sum to dict_size={len(w['b_enc'])}, got {sizes}")
    ours = {key: w[key] for key in _OURS}
    prefixes = tuple(int(end) for end in np.cumsum(sizes))
    fields = {"k": int(w["k"]), "subtract_b_dec": True, "prefixes": prefixes}
    return strict.params(**ours, threshold=_threshold(file, w)), "matryoshka", fields


_TAKEN: dict[str, Callable[[pathlib.Path, _Weights], tuple[base.SAEParams, str, dict[str, Any]]]] = {
    "AutoEncoder": _take_autoencoder,
    "AutoEncoderNew": _take_april,
    "GatedAutoEncoder": _take_gated,
    "JumpReluAutoEncoder": _take_jumprelu,
    "AutoEncoderTopK": _take_topk,
    "BatchTopKSAE": _take_batch_topk,
    "MatryoshkaBatchTopKSAE": _take_matryoshka,
}


def _threshold(file: pathlib.Path, w: _Weights) -> np.ndarray:
    if w["threshold"] <= 0:
        raise UserError(
            f"{file}: threshold is {float(w['threshold']):g}, that is, not measured yet (the trainer does from "
            "threshold_start_step on); every positive latent would be active"
        )
    return w["threshold"]


def _state(sparsifier: base.Sparsifier, params: base.SAEParams) -> tuple[str, dict[str, Any]]:
    """Our parameters under the names of the class that computes the same."""
    ours, subtract = sparsifier.name, sparsifier.subtract_b_dec
    if ours in ("l1", "p_anneal"):
        p = saelens_fold.decoder_norms(params)
        kind, bias = ("AutoEncoder", "bias") if subtract else ("AutoEncoderNew", "decoder.bias")
        return kind, {**_linear(p), "encoder.bias": p.b_enc, bias: p.b_dec}
    if ours == "jumprelu":
        p = strict.shifted(params, -1.0) if subtract else params
        return "JumpReluAutoEncoder", {key: getattr(p, key) for key in _OURS} | {"threshold": p.extra["threshold"]}
    if ours == "gated":
        p = params if subtract else _gated_with_bias(params)
        biases = {"decoder_bias": p.b_dec, "gate_bias": p.b_enc, "mag_bias": p.extra["b_mag"]}
        return "GatedAutoEncoder", {**_linear(p), **biases, "r_mag": p.extra["r_mag"]}
    p = params if subtract else strict.shifted(params, 1.0)
    k = np.asarray(strict.own_k(sparsifier), np.int32)
    if ours == "topk" or sparsifier.k_sparse:
        state = {**_linear(p), "encoder.bias": p.b_enc, "b_dec": p.b_dec, "k": k, "threshold": np.float32(-1)}
        return "AutoEncoderTopK", state
    threshold = np.asarray(strict.with_thresholds(sparsifier, p).extra["threshold"])[0]
    if ours == "batch_topk":
        state = {**_linear(p), "encoder.bias": p.b_enc, "b_dec": p.b_dec, "k": k, "threshold": threshold}
        return "BatchTopKSAE", state
    sizes = np.diff(np.asarray(getattr(sparsifier, "widths"), np.int64), prepend=0)  # noqa: B009
    weights = {key: getattr(p, key) for key in _OURS}
    return "MatryoshkaBatchTopKSAE", {**weights, "k": k, "threshold": threshold, "group_sizes": sizes}


def _linear(p: base.SAEParams) -> dict[str, np.ndarray]:
    return {"encoder.weight": np.asarray(p.W_enc).T, "decoder.weight": np.asarray(p.W_dec).T}


def _gated_with_bias(params: base.SAEParams) -> base.SAEParams:
    """Takes b_dec off the input, which the class does, out of both biases."""
    shift = np.asarray(params.b_dec, np.float64) @ np.asarray(params.W_enc, np.float64)
    b_mag = params.extra["b_mag"] + shift * np.exp(np.asarray(params.extra["r_mag"], np.float64))
    return dataclasses.replace(params, b_enc=params.b_enc + shift, extra=params.extra | {"b_mag": b_mag})


def _plain(value: Any) -> np.ndarray:
    return np.array(value, np.float32, order="C")
