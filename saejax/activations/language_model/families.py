"""Reads a Hugging Face `config.json` into `ModelConfig`, ignoring no field that would change the numbers.

One row of `_FAMILIES` per rotary family says what its files leave out; GPT-2 has its own reader. GGUF
metadata is translated to the same keys first (`gguf_file.py`), so every rule about a family stands here
once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from saejax.activations.language_model.config import ModelConfig, Rope
from saejax.errors import UserError

# What released config.json files of a family leave to the family's defaults.
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False, "rope_theta": 1e4, "rms_norm_eps": 1e-6},
    "mistral": {"tie_word_embeddings": False, "rope_theta": 1e4, "rms_norm_eps": 1e-6},
    "qwen2": {"tie_word_embeddings": False, "rope_theta": 1e4, "rms_norm_eps": 1e-6},
    "qwen3": {"tie_word_embeddings": False, "rope_theta": 1e4, "rms_norm_eps": 1e-6, "head_dim": 128},
    "gemma2": {
        "tie_word_embeddings": True,
        "rope_theta": 1e4,
        "rms_norm_eps": 1e-6,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "gemma3_text": {
        "tie_word_embeddings": True,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rms_norm_eps": 1e-6,
        "head_dim": 256,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 262_208,
        "max_position_embeddings": 131_072,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "hidden_activation": "gelu_pytorch_tanh",
    },
}
SUPPORTED = (*_FAMILIES, "gpt2", "gemma3")
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
# Fields that change the numbers and are not implemented, with the values under which they do nothing.
_INERT: dict[str, tuple[Any, ...]] = {
    "partial_rotary_factor": (None, 1.0),
    "use_bidirectional_attention": (None, False),
    "scale_attn_weights": (None, True),
    "scale_attn_by_inverse_layer_idx": (None, False),
    "reorder_and_upcast_attn": (None, False),
    "add_cross_attention": (None, False),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "quantization_config": (None,),
}


def model_config(raw: Mapping[str, Any]) -> ModelConfig:
    """The switches of a model from the contents of its `config.json`.

    Args:
      raw: the parsed file; for `gemma3` the text model inside it is taken.

    Returns:
      The configuration.

    Raises:
      UserError: unknown `model_type`, a missing field, or a field whose value is not implemented.
    """
    family = raw.get("model_type")
    if family == "gemma3":
        raw = {**_need(raw, "text_config"), "model_type": "gemma3_text"}
        family = "gemma3_text"
    for field, allowed in _INERT.items():
        if raw.get(field) not in allowed:
            raise UserError(f"config.json: {field}={raw[field]!r} is not supported, allowed: {allowed[-1]!r}")
    if family == "gpt2":
        return _gpt2(raw)
    if family in _FAMILIES:
        return _rotary(
            family, {**_FAMILIES[family], **{k: v for k, v in raw.items() if v is not None or k in _NULLABLE}}
        )
    raise UserError(f"config.json: model_type={family!r} is not supported, allowed: {', '.join(SUPPORTED)}")


# null is a statement here ("no window", "no cap"), not an omission.
_NULLABLE = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping")


def _rotary(family: str, raw: Mapping[str, Any]) -> ModelConfig:
    """Llama, Mistral, Qwen and Gemma: RMS norms, rotary positions, gated MLP."""
    gemma = family.startswith("gemma")
    d_model, n_heads = _need(raw, "hidden_size"), _need(raw, "num_attention_heads")
    d_head = raw.get("head_dim") or d_model // n_heads
    biased = family == "qwen2" or bool(raw.get("attention_bias"))
    windows = _windows(family, raw)
    local = _rope(raw, "sliding_attention") if family == "gemma3_text" else None
    return ModelConfig(
        family=family,
        d_model=d_model,
        n_layers=_need(raw, "num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=raw.get("num_key_value_heads") or n_heads,
        d_head=d_head,
        d_mlp=_need(raw, "intermediate_size"),
        vocab_size=_need(raw, "vocab_size"),
        context_length=_need(raw, "max_position_embeddings"),
        norm_eps=raw["rms_norm_eps"],
        qk_norm=family in ("qwen3", "gemma3_text"),
        qkv_bias=biased,
        out_bias=biased and family != "qwen2",
        mlp_bias=bool(raw.get("mlp_bias")),
        rope=_rope(raw, "full_attention"),
        rope_local=local,
        windows=windows if any(windows) else (),
        attn_scale=float(raw.get("query_pre_attn_scalar", d_head) if gemma else d_head) ** -0.5,
        attn_softcap=raw.get("attn_logit_softcapping") if gemma else None,
        logit_softcap=raw.get("final_logit_softcapping") if gemma else None,
        activation=_activation(raw.get("hidden_activation") or raw.get("hidden_act") or "silu"),
        post_norms=gemma,
        embed_scale=math.sqrt(d_model) if gemma else 1.0,
        tied_head=bool(raw["tie_word_embeddings"]),
        bos_id=_one_id(raw.get("bos_token_id")),
        eos_id=_one_id(raw.get("eos_token_id")),
    )


def _gpt2(raw: Mapping[str, Any]) -> ModelConfig:
    """GPT-2: layer norms with biases, learned positions, plain MLP."""
    d_model, n_heads = _need(raw, "n_embd"), _need(raw, "n_head")
    return ModelConfig(
        family="gpt2",
        d_model=d_model,
        n_layers=_need(raw, "n_layer"),
        n_heads=n_heads,
        n_kv_heads=n_heads,
        d_head=d_model // n_heads,
        d_mlp=raw.get("n_inner") or 4 * d_model,
        vocab_size=_need(raw, "vocab_size"),
        context_length=_need(raw, "n_positions"),
        norm="layer",
        norm_eps=raw.get("layer_norm_epsilon", 1e-5),
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        attn_scale=(d_model // n_heads) ** -0.5,
        gated_mlp=False,
        activation=_activation(raw.get("activation_function", "gelu_new")),
        tied_head=bool(raw.get("tie_word_embeddings", True)),
        bos_id=_one_id(raw.get("bos_token_id")),
        eos_id=_one_id(raw.get("eos_token_id")),
    )


def _windows(family: str, raw: Mapping[str, Any]) -> tuple[int, ...]:
    """Per layer the sliding window in tokens, 0 for full attention."""
    n_layers, size = _need(raw, "num_hidden_layers"), raw.get("sliding_window")
    if family == "llama" or not size or (family.startswith("qwen") and not raw.get("use_sliding_window")):
        return (0,) * n_layers
    if raw.get("layer_types") is not None:
        kinds = raw["layer_types"]
        unknown = set(kinds) - {"sliding_attention", "full_attention"}
        if unknown:
            raise UserError(
                f"config.json: layer_types={sorted(unknown)[0]!r}, allowed: sliding_attention, full_attention"
            )
        return tuple(size if kind == "sliding_attention" else 0 for kind in kinds)
    if family.startswith("qwen"):
        first = _need(raw, "max_window_layers")
        return tuple(size if layer >= first else 0 for layer in range(n_layers))
    every = {"mistral": n_layers + 1, "gemma2": 2}.get(family) or raw["sliding_window_pattern"]
    return tuple(size if (layer + 1) % every else 0 for layer in range(n_layers))


def _rope(raw: Mapping[str, Any], kind: str) -> Rope:
    """Rotary positions of one kind of layer: `rope_parameters`, or `rope_theta` and `rope_scaling`."""
    local = kind == "sliding_attention"
    theta = raw["rope_local_base_freq"] if local else raw["rope_theta"]
    given = raw.get("rope_parameters")
    if given is None:
        given = {} if local else (raw.get("rope_scaling") or {})
    elif kind in given or "sliding_attention" in given or "full_attention" in given:
        given = given.get(kind) or {}
    scaling = given.get("rope_type", given.get("type", "default"))
    theta = float(given.get("rope_theta", theta))
    if given.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"config.json: partial_rotary_factor={given['partial_rotary_factor']}, allowed: 1.0")
    if scaling == "default":
        return Rope(theta=theta)
    if scaling == "divisors":
        return Rope(theta=theta, scaling="divisors", divisors=tuple(float(d) for d in _need(given, "divisors")))
    if scaling == "linear":
        return Rope(theta=theta, scaling="linear", factor=float(_need(given, "factor")))
    if scaling == "llama3":
        return Rope(
            theta=theta,
            scaling="llama3",
            factor=float(_need(given, "factor")),
            low_freq_factor=float(_need(given, "low_freq_factor")),
            high_freq_factor=float(_need(given, "high_freq_factor")),
            original_context=int(_need(given, "original_max_position_embeddings")),
        )
    raise UserError(
        f"config.json: rope scaling rope_type={scaling!r} is not supported, allowed: default, linear, llama3"
    )


def _activation(name: str) -> str:
    if name not in _ACTIVATIONS:
        raise UserError(f"config.json: activation {name!r} is not supported, allowed: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _one_id(value: int | list[int] | None) -> int | None:
    """Some files list several end tokens; the first is the one that ends a text."""
    return value[0] if isinstance(value, list) else value


def _need(raw: Mapping[str, Any], field: str) -> Any:
    if raw.get(field) is None:
        raise UserError(f"config.json: {field} is missing, needed for model_type={raw.get('model_type')!r}")
    return raw[field]
