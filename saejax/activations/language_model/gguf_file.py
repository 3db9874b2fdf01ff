"""A GGUF file as a source: metadata under Hugging Face's keys, tensors dequantised.

The file names tensors its own way, stores llama's query and key rows permuted, GPT-2's matrices transposed
and Gemma's norm gains with 1 added; all of that is undone here, so that nothing after this file knows the
format.
"""

from __future__ import annotations

import pathlib
import re
from typing import Any

import gguf
import numpy as np

from saejax.errors import UserError

_FAMILY = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "gpt2": "gpt2",
}
# Metadata key without the architecture -> key of config.json.
_KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "rope.freq_base": "rope_theta",
    "rope.freq_base_swa": "rope_local_base_freq",
    "expert_count": "num_experts",
}
_GPT2_KEYS = {
    "block_count": "n_layer",
    "context_length": "n_positions",
    "embedding_length": "n_embd",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}
_TOP = {"token_embd": "embed_tokens", "output_norm": "norm", "output": "lm_head"}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA_IN_LAYER = {
    **_IN_LAYER,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_GPT2_TOP = {"token_embd": "wte", "position_embd": "wpe", "output_norm": "ln_f", "output": "lm_head"}
_GPT2_IN_LAYER = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
_ROPE_DIVISORS = "rope_freqs.weight"


class GGUFFile:
    """One GGUF file, memory-mapped; tensors are dequantised when they are read."""

    def __init__(self, path: pathlib.Path) -> None:
        self.name = path.name
        try:
            reader = gguf.GGUFReader(path)
        except (ValueError, IndexError) as error:
            raise UserError(f"model={str(path)!r} is not a readable GGUF file: {error}") from None
        self.metadata: dict[str, Any] = {key: field.contents() for key, field in reader.fields.items()}
        self.architecture = str(self.metadata.get("general.architecture"))
        if self.architecture not in _FAMILY:
            raise UserError(f"{path.name}: general.architecture={self.architecture!r}, allowed: {', '.join(_FAMILY)}")
        self._raw = {tensor.name: tensor for tensor in reader.tensors}
        self._names = {self._translated(name): name for name in self._raw if name != _ROPE_DIVISORS}
        self._cache: dict[str, np.ndarray] = {}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every weight with its shape, under Hugging Face's names and orientation."""
        shapes = {name: tuple(int(n) for n in self._raw[raw].shape[::-1]) for name, raw in self._names.items()}
        return {name: shape[::-1] if self._is_conv1d(name) else shape for name, shape in shapes.items()}

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Part of a dequantised weight, float32."""
        kind = re.sub(r"\d+", "", name)
        if self._cache and kind != re.sub(r"\d+", "", next(iter(self._cache))):
            self._cache.clear()  # one leaf at a time: several shards of it share the dequantised layers
        if name not in self._cache:
            self._cache[name] = self._dequantised(name)
        return self._cache[name][index]

    def hf_config(self) -> dict[str, Any]:
        """The metadata as a `config.json` of the same model would say it.

        Returns:
          Fields that `families.model_config` reads.

        Raises:
          UserError: metadata that would change the numbers and has no translation.
        """
        keys = _GPT2_KEYS if self.architecture == "gpt2" else _KEYS
        raw = {ours: value for key, ours in keys.items() if (value := self._meta(key)) is not None}
        uneven = [key for key, ours in keys.items() if isinstance(raw.get(ours), list)]
        if uneven:
            raise UserError(f"{self.name}: {uneven[0]} differs between layers, allowed: one number for all")
        raw |= {
            "model_type": _FAMILY[self.architecture],
            "vocab_size": int(self._raw["token_embd.weight"].shape[1]),
            "tie_word_embeddings": "output.weight" not in self._raw,
            "attention_bias": "blk.0.attn_q.bias" in self._raw,
            "bos_token_id": self.metadata.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self.metadata.get("tokenizer.ggml.eos_token_id"),
        }
        if self.architecture != "gpt2":
            raw |= self._rope(raw) | self._windows(raw)
        if self.architecture.startswith("gemma"):
            # The format leaves the attention scale to the reader: the 27B models divide by d_model / n_heads.
            largest = raw["num_hidden_layers"] == {"gemma2": 46, "gemma3": 62}[self.architecture]
            per_head = raw["hidden_size"] // raw["num_attention_heads"]
            raw["query_pre_attn_scalar"] = per_head if largest else raw["head_dim"]
        return raw

    def _meta(self, key: str) -> Any:
        return self.metadata.get(f"{self.architecture}.{key}")

    def _rope(self, raw: dict[str, Any]) -> dict[str, Any]:
        d_head = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
        rotated = self._meta("rope.dimension_count")
        if rotated not in (None, d_head):
            raise UserError(f"{self.name}: rope.dimension_count={rotated} is not supported, allowed: {d_head}")
        kind = self._meta("rope.scaling.type")
        if _ROPE_DIVISORS in self._raw:
            divisors = self._dequantise(_ROPE_DIVISORS).ravel().tolist()
            return {"rope_scaling": {"rope_type": "divisors", "divisors": divisors}}
        if kind in (None, "none"):
            return {}
        return {"rope_scaling": {"rope_type": kind, "factor": self._meta("rope.scaling.factor")}}

    def _windows(self, raw: dict[str, Any]) -> dict[str, Any]:
        if raw.get("sliding_window") is None:
            return {"sliding_window": None}
        pattern = self._meta("attention.sliding_window_pattern")
        if isinstance(pattern, list):
            kinds = ["sliding_attention" if local else "full_attention" for local in pattern]
            return {"layer_types": kinds, "use_sliding_window": True}
        family = {"model_type": "mistral"} if self.architecture == "llama" else {}
        return {**family, "max_window_layers": 0, "use_sliding_window": True} | (
            {} if pattern is None else {"sliding_window_pattern": pattern}
        )

    def _translated(self, raw: str) -> str:
        """A tensor's name as Hugging Face writes it; one without translation stays and is refused later."""
        gpt2 = self.architecture == "gpt2"
        top = _GPT2_TOP if gpt2 else _TOP
        layer = _GPT2_IN_LAYER if gpt2 else _GEMMA_IN_LAYER if self.architecture.startswith("gemma") else _IN_LAYER
        stem, _, kind = raw.rpartition(".")
        if stem in top:
            return f"{top[stem]}.{kind}"
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
        if match is None or match[2] not in layer:
            return raw
        return f"{'h' if gpt2 else 'layers'}.{match[1]}.{layer[match[2]]}.{kind}"

    def _is_conv1d(self, name: str) -> bool:
        return self.architecture == "gpt2" and bool(re.search(r"\.c_\w+\.weight$", name))

    def _dequantise(self, raw: str) -> np.ndarray:
        tensor = self._raw[raw]
        try:
            found = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            raise UserError(
                f"{self.name}: {raw} is stored as {tensor.tensor_type.name}, which is not supported"
            ) from None
        return np.asarray(found, np.float32).reshape(tuple(int(n) for n in tensor.shape[::-1]))

    def _dequantised(self, name: str) -> np.ndarray:
        found = self._dequantise(self._names[name])
        if self._is_conv1d(name):
            return found.T
        if self.architecture == "llama" and ".q_proj." in name:
            return _unpermuted(found, self._meta("attention.head_count"))
        if self.architecture == "llama" and ".k_proj." in name:
            return _unpermuted(found, self._meta("attention.head_count_kv") or self._meta("attention.head_count"))
        if self.architecture.startswith("gemma") and name.endswith("norm.weight"):
            return found - 1
        return found


def _unpermuted(rows: np.ndarray, n_heads: int) -> np.ndarray:
    """Undo llama.cpp's order of rows: pairs side by side (0, 1) back to halves (i, i + d/2) in every head."""
    paired = rows.reshape(n_heads, -1, 2, *rows.shape[1:])
    return np.ascontiguousarray(paired.swapaxes(1, 2)).reshape(rows.shape)
