"""Hugging Face `config.json` to `ModelConfig`; no field that changes the numbers is ignored.

`_FAMILIES` has one row per rotary family with the defaults that its files leave out; GPT-2 has its own reader. GGUF
metadata is translated to the same keys first (`gguf_file.py`), so each rule about a family is written once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from saejax.activations.language_model.config import ModelConfig, Rope
from saejax.activations.language_model.fields import FINITE, Fields, among
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
_LAYERS = ("sliding_attention", "full_attention")
_SCALINGS = ("default", "linear", "llama3", "divisors")
_MOST_LAYERS = 2**16
"""Of a model whose files are not at hand."""
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


def model_config(raw: Mapping[str, Any], where: str = "config.json", most_layers: int = _MOST_LAYERS) -> ModelConfig:
    """The switches of a model from the contents of its `config.json`.

    Args:
      raw: the parsed file; for `gemma3` the text model inside it is taken.
      where: the file, for messages.
      most_layers: tensors in the model's files, of which every layer has one: no count is believed beyond it.

    Returns:
      The configuration.

    Raises:
      UserError: unknown `model_type`, a missing field, or a field whose value is not implemented.
    """
    fields = Fields(where, raw)
    family = fields.choice("model_type", SUPPORTED)
    if family == "gemma3":
        inner = fields.part("text_config")
        family, raw, where = "gemma3_text", inner.raw, inner.where
    for field, allowed in _INERT.items():
        if not among(raw.get(field), allowed):
            raise Fields(where, raw).refuse(field, repr(allowed[-1]))
    # Where null is no statement ("no window"), it is an omission.
    stated = {key: value for key, value in raw.items() if value is not None or key in _NULLABLE}
    fields = Fields(where, {**_FAMILIES.get(family, {}), **stated}, f", needed for model_type={family!r}")
    try:
        return _gpt2(fields, most_layers) if family == "gpt2" else _rotary(family, fields, most_layers)
    except UserError as error:
        # What ModelConfig itself refuses does not know the file.
        raise UserError(str(error) if str(error).startswith(where) else f"{where}: {error}") from None


_NULLABLE = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping")


def _rotary(family: str, fields: Fields, most_layers: int) -> ModelConfig:
    """Llama, Mistral, Qwen and Gemma: RMS norms, rotary positions, gated MLP."""
    gemma = family.startswith("gemma")
    d_model, n_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    n_layers = fields.integer("num_hidden_layers", high=most_layers)
    d_head = fields.integer("head_dim", None) or _shared(fields, "num_attention_heads", n_heads, d_model)
    biased = family == "qwen2" or fields.flag("attention_bias", False)
    windows = _windows(family, fields, n_layers)
    activation = "hidden_activation" if fields.get("hidden_activation") is not None else "hidden_act"
    scale = fields.number("query_pre_attn_scalar", float(d_head)) if gemma else float(d_head)
    return ModelConfig(
        family=family,
        d_model=d_model,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=fields.integer("num_key_value_heads", n_heads),
        d_head=d_head,
        d_mlp=fields.integer("intermediate_size"),
        vocab_size=fields.integer("vocab_size"),
        context_length=fields.integer("max_position_embeddings"),
        norm_eps=fields.number("rms_norm_eps", zero=True, high=1.0),
        qk_norm=family in ("qwen3", "gemma3_text"),
        qkv_bias=biased,
        out_bias=biased and family != "qwen2",
        mlp_bias=fields.flag("mlp_bias", False),
        rope=_rope(fields, "full_attention"),
        rope_local=_rope(fields, "sliding_attention") if family == "gemma3_text" else None,
        windows=windows if any(windows) else (),
        attn_scale=scale**-0.5,
        attn_softcap=fields.number("attn_logit_softcapping", None) if gemma else None,
        logit_softcap=fields.number("final_logit_softcapping", None) if gemma else None,
        activation=_ACTIVATIONS[fields.choice(activation, _ACTIVATIONS, "silu")],
        post_norms=gemma,
        embed_scale=math.sqrt(d_model) if gemma else 1.0,
        tied_head=fields.flag("tie_word_embeddings"),
        bos_id=_one_id(fields, "bos_token_id"),
        eos_id=_one_id(fields, "eos_token_id"),
    )


def _gpt2(fields: Fields, most_layers: int) -> ModelConfig:
    """GPT-2: layer norms with biases, learned positions, plain MLP."""
    d_model, n_heads = fields.integer("n_embd"), fields.integer("n_head")
    d_head = _shared(fields, "n_head", n_heads, d_model)
    return ModelConfig(
        family="gpt2",
        d_model=d_model,
        n_layers=fields.integer("n_layer", high=most_layers),
        n_heads=n_heads,
        n_kv_heads=n_heads,
        d_head=d_head,
        d_mlp=fields.integer("n_inner", 4 * d_model),
        vocab_size=fields.integer("vocab_size"),
        context_length=fields.integer("n_positions"),
        norm="layer",
        norm_eps=fields.number("layer_norm_epsilon", 1e-5, zero=True, high=1.0),
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        attn_scale=d_head**-0.5,
        gated_mlp=False,
        activation=_ACTIVATIONS[fields.choice("activation_function", _ACTIVATIONS, "gelu_new")],
        tied_head=fields.flag("tie_word_embeddings", True),
        bos_id=_one_id(fields, "bos_token_id"),
        eos_id=_one_id(fields, "eos_token_id"),
    )


def _shared(fields: Fields, key: str, n_heads: int, d_model: int) -> int:
    """Coordinates of each head where the heads share the residual stream's."""
    if n_heads > d_model:
        raise fields.refuse(key, f"at most the model's width, {d_model}")
    return d_model // n_heads


def _windows(family: str, fields: Fields, n_layers: int) -> tuple[int, ...]:
    """Per layer the sliding window in tokens, 0 for full attention; empty where no layer has one."""
    size = fields.integer("sliding_window", None, low=0)
    if family == "llama" or not size or (family.startswith("qwen") and not fields.flag("use_sliding_window", False)):
        return ()
    kinds = fields.array("layer_types", (str,), f"{n_layers} words, {' or '.join(_LAYERS)}", None)
    if kinds is not None:
        if len(kinds) != n_layers or not set(kinds) <= set(_LAYERS):
            raise fields.refuse("layer_types", f"{n_layers} words, {' or '.join(_LAYERS)}")
        return tuple(size if kind == "sliding_attention" else 0 for kind in kinds)
    if family.startswith("qwen"):
        first = fields.integer("max_window_layers", low=0)
        return tuple(size if layer >= first else 0 for layer in range(n_layers))
    every = {"mistral": n_layers + 1, "gemma2": 2}.get(family) or fields.integer("sliding_window_pattern")
    return tuple(size if (layer + 1) % every else 0 for layer in range(n_layers))


def _rope(fields: Fields, kind: str) -> Rope:
    """Rotary positions of one kind of layer: `rope_parameters`, or `rope_theta` and `rope_scaling`."""
    local = kind == "sliding_attention"
    theta = fields.number("rope_local_base_freq" if local else "rope_theta")
    given = fields.part("rope_parameters", None)
    if given is None:
        given = None if local else fields.part("rope_scaling", None)
    elif any(layers in given.raw for layers in _LAYERS):
        given = given.part(kind, None)
    if given is None:
        return Rope(theta=theta)
    theta = given.number("rope_theta", theta)
    if given.number("partial_rotary_factor", 1.0) != 1.0:
        raise given.refuse("partial_rotary_factor", "1.0")
    older = given.get("type") if given.get("rope_type") is None else None
    named = {"rope_type": given.get("rope_type") if older is None else older}
    scaling = Fields(given.where, named).choice("rope_type", _SCALINGS, "default")
    if scaling == "divisors":
        divisors = given.array("divisors", (float,), "numbers")
        if not all(0 < divisor <= FINITE for divisor in divisors):
            raise given.refuse("divisors", "numbers above 0")
        return Rope(theta=theta, scaling="divisors", divisors=tuple(divisors))
    if scaling == "linear":
        return Rope(theta=theta, scaling="linear", factor=given.number("factor"))
    if scaling == "default":
        return Rope(theta=theta)
    low, high = given.number("low_freq_factor"), given.number("high_freq_factor")
    if low >= high:
        raise given.refuse("high_freq_factor", f"above low_freq_factor={low:g}")
    return Rope(
        theta=theta,
        scaling="llama3",
        factor=given.number("factor"),
        low_freq_factor=low,
        high_freq_factor=high,
        original_context=given.integer("original_max_position_embeddings"),
    )


def _one_id(fields: Fields, key: str) -> int | None:
    """Some files list several end tokens; the first is the one that ends a text."""
    if not isinstance(fields.get(key), list):
        return fields.integer(key, None, low=0)
    ids = fields.array(key, (int,), "token ids")
    return Fields(fields.where, {key: ids[0]}).integer(key, low=0) if ids else None
