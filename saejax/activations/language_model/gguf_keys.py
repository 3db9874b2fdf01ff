"""GGUF metadata to `config.json` keys; every key that changes the numbers is read or refused.

Each key is read here, is known to mean nothing (for any value, or for one), or ends in one line that names it. Absent
keys take llama.cpp's defaults.

Sources, llama.cpp of 2026: `src/llama-model.cpp` (load_hparams), `src/llama-context.cpp` (what scales the rotation),
`src/models/{llama,qwen2,qwen3,gemma2,gemma3,gpt2}.cpp`, and `conversion/*.py` for what files of these families hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from saejax.activations.language_model.fields import Fields, among
from saejax.errors import UserError

FAMILIES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "gpt2": "gpt2",
}
"""`general.architecture` -> `model_type`."""
DIVISORS = "rope_freqs.weight"
"""The tensor of llama's files that divides each frequency of the rotation."""

# Where a file came from and how its text is cut: `gguf_tokenizer.py` reads the tokenizer's keys.
_NO_NUMBERS = ("general.", "tokenizer.", "split.", "quantize.", "mradermacher.")
# Keys without the architecture that are read below, those of every family first.
_READ = {"block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count"}
_READ_ROTARY = {
    *_READ, "attention.head_count_kv", "attention.key_length", "attention.layer_norm_rms_epsilon",
    "attention.sliding_window", "attention.sliding_window_pattern", "rope.freq_base", "rope.scale_linear",
    "rope.scaling.type", "rope.scaling.factor", "attention.value_length", "rope.dimension_count",
    "attention.key_length_swa", "attention.value_length_swa", "rope.dimension_count_swa",
}  # fmt: skip
_READ_BY = {
    "gpt2": _READ | {"attention.head_count_kv", "attention.layer_norm_epsilon"},
    "gemma2": _READ_ROTARY | {"attn_logit_softcapping", "final_logit_softcapping", "rope.freq_base_swa"},
    "gemma3": _READ_ROTARY | {"final_logit_softcapping", "rope.freq_base_swa"},
}
# Keys that change nothing, whatever they say: the embedding says how many tokens there are, poolings and labels are of
# what follows the model, and only YaRN, which is not implemented, looks at the context before stretching.
_WITHOUT_EFFECT = {
    "vocab_size", "tensor_data_layout", "pooling_type", "classifier.output_labels",
    "rope.scaling.original_context_length", "rope.scaling.finetuned",
}  # fmt: skip
# Keys that change the numbers and are not implemented, with the values under which they do nothing.
_INERT: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("logit_scale", "residual_scale", "embedding_scale"), (0.0, 1.0)),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping", "router_logit_softcapping"), (0.0,)),
    **dict.fromkeys(("attention.scale", "attention.clamp_kqv", "attention.max_alibi_bias"), (0.0,)),
    **dict.fromkeys(("attention.output_scale", "attention.temperature_scale"), (0.0,)),
    **dict.fromkeys(("expert_count", "expert_used_count", "expert_shared_count", "expert_group_count"), (0,)),
    **dict.fromkeys(("leading_dense_block_count", "nextn_predict_layers", "attention.shared_kv_layers"), (0,)),
    "attention.causal": (True,),
    "use_parallel_residual": (False,),
    "rope.dimension_sections": ([0, 0, 0, 0],),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.alpha": (0.0,),
    "rope.scaling.yarn_ext_factor": (0.0,),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "rope.scaling.yarn_beta_fast": (32.0,),
    "rope.scaling.yarn_beta_slow": (1.0,),
}


def config(name: str, metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The fields that `families.model_config` reads.

    Args:
      name: of the file, for messages.
      metadata: its keys.
      shapes: of its tensors, under the file's names.

    Raises:
      UserError: a key is missing, has another type than it must have, or would change the numbers and is not known.
    """
    arch = architecture(name, metadata)
    _check_keys(name, arch, metadata)
    fields, texts = Fields(name, metadata, prefix=f"{arch}."), Fields(name, metadata, prefix="tokenizer.ggml.")
    texts.flag("add_bos_token", None)  # `bos.py` believes it
    if len(shapes.get("token_embd.weight", ())) != 2:
        raise UserError(f"{name}: token_embd.weight is missing, allowed: a tensor with two axes")
    shared = {
        "model_type": FAMILIES[arch],
        "vocab_size": shapes["token_embd.weight"][0],
        "tie_word_embeddings": "output.weight" not in shapes,
        **{f"{end}_token_id": texts.integer(f"{end}_token_id", None, low=0) for end in ("bos", "eos")},
    }
    n_layers = fields.integer("block_count", high=max(1, len(shapes)))
    return shared | (_gpt2(fields, n_layers) if arch == "gpt2" else _rotary(arch, fields, n_layers, shapes))


def architecture(name: str, metadata: Mapping[str, Any]) -> str:
    """Model family of a file.

    Raises:
      UserError: an architecture that is not supported, a part of a file, or no model.
    """
    fields = Fields(name, metadata)
    found = fields.choice("general.architecture", FAMILIES)
    fields.choice("general.type", ("model",), "model")
    if fields.integer("split.count", 1, low=0) > 1:
        raise fields.refuse("split.count", "1; join the parts of the file with: llama-gguf-split --merge")
    return found


def _check_keys(name: str, arch: str, metadata: Mapping[str, Any]) -> None:
    """Refuses the first key that is neither read nor known to change nothing."""
    read = _READ_BY.get(arch, _READ_ROTARY)
    for key in metadata:
        own = key.removeprefix(f"{arch}.")
        if key.startswith(_NO_NUMBERS) or (own != key and (own in read or own in _WITHOUT_EFFECT)):
            continue
        allowed = _INERT.get(own, ()) if own != key else ()
        if not among(metadata[key], allowed):
            told = repr(allowed[-1]) if allowed else "a file without this key, which may change the numbers"
            raise Fields(name, metadata).refuse(key, told)


def _gpt2(fields: Fields, n_layers: int) -> dict[str, Any]:
    n_heads = fields.integer("attention.head_count")
    _same(fields, "attention.head_count_kv", n_heads)
    return {
        "n_layer": n_layers,
        "n_positions": fields.integer("context_length"),
        "n_embd": fields.integer("embedding_length"),
        "n_inner": fields.integer("feed_forward_length"),
        "n_head": n_heads,
        "layer_norm_epsilon": fields.number("attention.layer_norm_epsilon", zero=True, high=1.0),
    }


def _rotary(arch: str, fields: Fields, n_layers: int, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    d_model, n_heads = fields.integer("embedding_length"), fields.integer("attention.head_count")
    d_head = fields.integer("attention.key_length", max(1, d_model // n_heads))
    for key in ("attention.value_length", "attention.key_length_swa", "attention.value_length_swa"):
        _same(fields, key, d_head)
    for key in ("rope.dimension_count", "rope.dimension_count_swa"):
        _same(fields, key, d_head)
    raw: dict[str, Any] = {
        "num_hidden_layers": n_layers,
        "max_position_embeddings": fields.integer("context_length"),
        "hidden_size": d_model,
        "intermediate_size": fields.integer("feed_forward_length"),
        "num_attention_heads": n_heads,
        "num_key_value_heads": fields.integer("attention.head_count_kv", n_heads),
        "head_dim": d_head,
        "rms_norm_eps": fields.number("attention.layer_norm_rms_epsilon", zero=True, high=1.0),
        "attention_bias": "blk.0.attn_q.bias" in shapes,
    }
    raw |= _rope(arch, fields) | _windows(arch, fields, n_layers)
    if arch.startswith("gemma"):
        # The format leaves the attention scale to the reader: the 27B models divide by d_model / n_heads.
        largest = n_layers == {"gemma2": 46, "gemma3": 62}[arch]
        raw["query_pre_attn_scalar"] = max(1, d_model // n_heads) if largest else d_head
        raw |= _softcaps(arch, fields)
    return raw


def _softcaps(arch: str, fields: Fields) -> dict[str, Any]:
    """Bounds of attention scores and logits; Gemma 3 has none unless its file says so."""
    if arch == "gemma3":
        cap = fields.number("final_logit_softcapping", 0.0, zero=True)
        return {"attn_logit_softcapping": None, "final_logit_softcapping": cap or None}
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    return {key: fields.number(key, default) for key, default in caps.items()}


def _rope(arch: str, fields: Fields) -> dict[str, Any]:
    """Base and scaling of the rotation.

    Without a type the scaling is linear. `rope.scaling.factor` gives the factor, else the older `rope.scale_linear`; 0
    is 1, and beside type none it means nothing.
    """
    theta = fields.number("rope.freq_base", 1e4)
    found: dict[str, Any] = {"rope_theta": theta}
    if arch == "gemma3":
        found["rope_local_base_freq"] = fields.number("rope.freq_base_swa", 1e4)
    elif fields.number("rope.freq_base_swa", theta) != theta:
        raise fields.refuse("rope.freq_base_swa", f"rope.freq_base, {theta:g}")
    kind = fields.choice("rope.scaling.type", ("linear", "none"), "linear")
    older = fields.number("rope.scale_linear", 0.0, zero=True)
    factor = fields.number("rope.scaling.factor", older, zero=True)
    if kind == "none" or factor in (0.0, 1.0):
        return found
    return found | {"rope_scaling": {"rope_type": "linear", "factor": factor}}


def _windows(arch: str, fields: Fields, n_layers: int) -> dict[str, Any]:
    """Sliding windows: which layers have one, and of how many tokens."""
    size = fields.integer("attention.sliding_window", 4096 if arch == "gemma2" else None, low=0)
    if not size:
        return {"sliding_window": None}
    found, pattern = {"sliding_window": size, "use_sliding_window": True}, "attention.sliding_window_pattern"
    if isinstance(fields.get(pattern), list):
        local = fields.array(pattern, (bool,), f"{n_layers} times true or false")
        if len(local) != n_layers:
            raise fields.refuse(pattern, f"{n_layers} times true or false")
        family = {"model_type": "mistral"} if arch == "llama" else {}
    elif arch.startswith("gemma"):
        every = fields.integer(pattern, 2 if arch == "gemma2" else 6)
        local, family = [(layer + 1) % every > 0 for layer in range(n_layers)], {}
    elif fields.get(pattern) is not None:
        raise fields.refuse(pattern, f"{n_layers} times true or false")
    else:
        # Every layer has one.
        family = {"model_type": "mistral"} if arch == "llama" else {"max_window_layers": 0}
        return found | family
    return found | family | {"layer_types": ["sliding_attention" if one else "full_attention" for one in local]}


def _same(fields: Fields, key: str, wanted: int) -> None:
    """A key that may only repeat what another says."""
    if fields.integer(key, wanted) != wanted:
        raise fields.refuse(key, str(wanted))
