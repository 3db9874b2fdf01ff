"""Configuration of a decoder-only transformer: one set of switches covers every supported family.

`families.py` fills it from a Hugging Face `config.json`, `gguf_file.py` from GGUF metadata; `model.py` computes with
it. It is hashable, so it can be a static argument of compiled functions.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import numpy as np
from jaxtyping import Float

from saejax.errors import UserError

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary positions: the base wavelength, and how its frequencies are stretched to longer contexts."""

    theta: float
    """Base of the geometric row of wavelengths."""
    scaling: Literal["default", "linear", "llama3", "divisors"] = "default"
    """linear: every frequency / factor; llama3: only the low ones; divisors: each by its own number."""
    factor: float = 1.0
    """How much longer the context became (linear, llama3)."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths above original_context / low_freq_factor are stretched fully."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below original_context / high_freq_factor are kept."""
    original_context: int = 8192
    """llama3: tokens of context before stretching."""
    divisors: tuple[float, ...] = ()
    """divisors: one number per frequency, d_head / 2 of them, as GGUF files carry in `rope_freqs.weight`."""

    def frequencies(self, d_head: int) -> Float[np.ndarray, " d_half"]:
        """Radians per token of each pair of coordinates, theta^(-2i / d_head) before scaling.

        Args:
          d_head: width of one attention head.

        Returns:
          float32 [d_head / 2].

        Examples:
          >>> Rope(theta=100.0).frequencies(4)
          array([1. , 0.1], dtype=float32)
        """
        base = np.float32(self.theta) ** (np.arange(0, d_head, 2, dtype=np.float32) / np.float32(d_head))
        plain = (1.0 / base).astype(np.float32)
        if self.scaling == "linear":
            return plain / np.float32(self.factor)
        if self.scaling == "divisors":
            return plain / np.asarray(self.divisors, np.float32)
        if self.scaling == "llama3":
            return self._llama3(plain)
        return plain

    def _llama3(self, plain: Float[np.ndarray, " d_half"]) -> Float[np.ndarray, " d_half"]:
        """Blend kept and stretched frequencies, linearly in the turns inside the original context."""
        turns = self.original_context * plain / np.float32(2 * math.pi)
        kept = np.clip((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0, 1)
        return (kept * plain + (1 - kept) * plain / self.factor).astype(np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One decoder-only transformer; sizes are in units of coordinates, heads, layers or tokens as named."""

    family: str
    """`model_type` of Hugging Face: llama, mistral, gpt2, qwen2, qwen3, gemma2, gemma3_text."""
    d_model: int
    """Width of the residual stream."""
    n_layers: int
    """Blocks."""
    n_heads: int
    """Query heads per layer."""
    n_kv_heads: int
    """Key and value heads per layer; divides n_heads."""
    d_head: int
    """Width of one head."""
    d_mlp: int
    """Width of the hidden layer of the MLP."""
    vocab_size: int
    """Rows of the embedding."""
    context_length: int
    """Longest segment the model was trained for, tokens."""
    norm: Literal["rms", "layer"] = "rms"
    """rms: x / rms(x) * gain; layer: mean removed, gain and bias."""
    norm_eps: float = 1e-6
    """Added to the mean square (or variance) inside the root."""
    qk_norm: bool = False
    """RMS norm on every query and key head before the rotation (Qwen3, Gemma 3)."""
    qkv_bias: bool = False
    """Biases on the query, key and value projections."""
    out_bias: bool = False
    """Bias on the attention's output projection."""
    mlp_bias: bool = False
    """Biases in the MLP."""
    rope: Rope | None = None
    """Rotary positions of full-attention layers; None means a learned table of positions (GPT-2)."""
    rope_local: Rope | None = None
    """Rotary positions of sliding-window layers where they differ (Gemma 3)."""
    windows: tuple[int, ...] = ()
    """Per layer: tokens a query sees, itself included; 0 means all before it, empty means 0 everywhere."""
    attn_scale: float
    """Factor on query-key products, mostly 1 / sqrt(d_head)."""
    attn_softcap: float | None = None
    """Attention scores become cap * tanh(score / cap) (Gemma 2)."""
    logit_softcap: float | None = None
    """The same for logits (Gemma 2)."""
    gated_mlp: bool = True
    """act(gate) * in, then out; otherwise act(in), then out (GPT-2)."""
    activation: str = "silu"
    """One of silu, gelu, gelu_tanh, relu."""
    post_norms: bool = False
    """A norm on each branch's output too, before it joins the residual stream (Gemma 2 and 3)."""
    embed_scale: float = 1.0
    """Factor on embedded tokens: sqrt(d_model) in Gemma."""
    tied_head: bool = True
    """The unembedding is the transposed embedding."""
    bos_id: int | None = None
    """Token that begins a text, where the files name one."""
    eos_id: int | None = None
    """Token that ends a text, where the files name one."""

    def __post_init__(self) -> None:
        for name in (
            "d_model",
            "n_layers",
            "n_heads",
            "n_kv_heads",
            "d_head",
            "d_mlp",
            "vocab_size",
            "context_length",
        ):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name} must be at least 1, got {getattr(self, name)}")
        if self.n_heads % self.n_kv_heads:
            raise UserError(f"model.n_kv_heads={self.n_kv_heads} must divide n_heads={self.n_heads}")
        if self.activation not in ACTIVATIONS:
            raise UserError(f"model.activation={self.activation!r} is not one of {', '.join(ACTIVATIONS)}")
        if self.windows and len(self.windows) != self.n_layers:
            raise UserError(f"model.windows names {len(self.windows)} layers, the model has {self.n_layers}")
        if self.rope is not None and self.d_head % 2:
            raise UserError(f"model.d_head={self.d_head} must be even for rotary positions")
        for rope in (self.rope, self.rope_local):
            if rope is not None and rope.scaling == "divisors" and len(rope.divisors) != self.d_head // 2:
                raise UserError(f"rope_freqs.weight holds {len(rope.divisors)} numbers, allowed: {self.d_head // 2}")

    def window(self, layer: int) -> int:
        """Tokens that a query of `layer` sees; 0 means all before it."""
        return self.windows[layer] if self.windows else 0
