"""GGUF file reader: metadata under Hugging Face's keys, tensors dequantised.

GGUF has its own tensor names. It permutes llama's query and key rows, transposes GPT-2's matrices and adds 1 to
Gemma's norm gains. This module undoes all of it, so no later code knows the format.
"""

from __future__ import annotations

import pathlib
import re
from typing import Any

import gguf
import numpy as np

from saejax.activations.language_model import gguf_header, gguf_keys
from saejax.errors import UserError

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


class GGUFFile:
    """One GGUF file, memory-mapped; tensors are dequantised when they are read."""

    def __init__(self, path: pathlib.Path) -> None:
        self.name = path.name
        self.metadata, self._raw = gguf_header.read(path)
        self.architecture = gguf_keys.architecture(path.name, self.metadata)
        # Which of llama's files have; in another family it is an unknown tensor.
        self._divisors = gguf_keys.DIVISORS if self.architecture == "llama" else None
        self._names = {self._translated(name): name for name in self._raw if name != self._divisors}
        if len(self._names) < len(self._raw) - (self._divisors in self._raw):
            raise UserError(f"{path.name}: two tensors have names that mean the same weight")
        self._cache: dict[str, np.ndarray] = {}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every weight with its shape, under Hugging Face's names and orientation."""
        shapes = {name: self._raw[raw].shape for name, raw in self._names.items()}
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
        raw = gguf_keys.config(self.name, self.metadata, {name: tensor.shape for name, tensor in self._raw.items()})
        if self._divisors in self._raw:
            factor = raw.get("rope_scaling", {}).get("factor", 1.0)
            divisors = (self._dequantise(gguf_keys.DIVISORS).ravel().astype(np.float64) * factor).tolist()
            raw["rope_scaling"] = {"rope_type": "divisors", "divisors": divisors}
        return raw

    def _heads(self, key: str) -> int:
        """Heads that the rows of a projection are made of."""
        whole = self.metadata["llama.attention.head_count"]
        return self.metadata.get(f"llama.{key}", whole)

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
            found = gguf.quants.dequantize(tensor.bytes, tensor.kind)
        except NotImplementedError:
            raise UserError(f"{self.name}: {raw} is stored as {tensor.kind.name}, which is not supported") from None
        return np.asarray(found, np.float32).reshape(tensor.shape)

    def _dequantised(self, name: str) -> np.ndarray:
        found = self._dequantise(self._names[name])
        if self._is_conv1d(name):
            return found.T
        if self.architecture == "llama" and ".q_proj." in name:
            return _unpermuted(found, self._heads("attention.head_count"))
        if self.architecture == "llama" and ".k_proj." in name:
            return _unpermuted(found, self._heads("attention.head_count_kv"))
        if self.architecture.startswith("gemma") and name.endswith("norm.weight"):
            return found - 1
        return found


def _unpermuted(rows: np.ndarray, n_heads: int) -> np.ndarray:
    """Undo llama.cpp's order of rows: pairs side by side (0, 1) back to halves (i, i + d/2) in every head."""
    paired = rows.reshape(n_heads, -1, 2, *rows.shape[1:])
    return np.ascontiguousarray(paired.swapaxes(1, 2)).reshape(rows.shape)
