"""Model files written by hand, so that they can be wrong: a directory and a GGUF file of one tiny llama."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

D, MLP, VOCAB, CONTEXT = 16, 32, 259, 64
CONFIG = dict(
    model_type="llama", hidden_size=D, intermediate_size=MLP, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, head_dim=8, vocab_size=VOCAB, max_position_embeddings=CONTEXT, rms_norm_eps=1e-5,
    rope_theta=1e4, rope_scaling={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 24}, hidden_act="silu", attention_bias=False,
    mlp_bias=False, tie_word_embeddings=False, bos_token_id=0, eos_token_id=[1, 2], partial_rotary_factor=1.0,
)  # fmt: skip
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = ["<s>", "<pad>", *ALPHABET, "ab"]
_SHAPES = {"token_embd": (VOCAB, D), "output": (VOCAB, D), "output_norm": (D,)} | {
    f"blk.0.{name}": shape
    for name, shape in {
        **dict.fromkeys(("attn_norm", "ffn_norm"), (D,)),
        **dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (D, D)),
        **dict.fromkeys(("ffn_gate", "ffn_up"), (MLP, D)),
        "ffn_down": (D, MLP),
    }.items()
}
_HF_NAMES = {
    "token_embd": "embed_tokens", "output": "lm_head", "output_norm": "norm", "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
METADATA = {
    "llama.block_count": 1, "llama.context_length": CONTEXT, "llama.embedding_length": D,
    "llama.feed_forward_length": MLP, "llama.attention.head_count": 2, "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5, "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "default",
    "tokenizer.ggml.tokens": TOKENS, "tokenizer.ggml.token_type": [3, 3] + [1] * (VOCAB - 2),
    "tokenizer.ggml.merges": ["a b"], "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 1,
}  # fmt: skip


def weights() -> dict[str, np.ndarray]:
    """Random weights under the names that GGUF files give them."""
    rng = np.random.default_rng(0)
    return {f"{name}.weight": rng.normal(size=shape).astype(np.float32) for name, shape in _SHAPES.items()}


def write_directory(folder: pathlib.Path, raw: Mapping[str, Any] = CONFIG) -> pathlib.Path:
    """The model as a Hugging Face directory with a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    named = {}
    for name, array in weights().items():
        stem = name.removesuffix(".weight").removeprefix("blk.0.")
        layer = "layers.0." if name.startswith("blk.") else ""
        head = "" if stem == "output" else "model."
        named[f"{head}{layer}{_HF_NAMES[stem]}.weight"] = array
    save_file(named, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(raw))
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(TOKENS[:-1])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(False)
    tokenizer.add_special_tokens(TOKENS[:2])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def with_index(folder: pathlib.Path, weight_map: Any) -> pathlib.Path:
    """The directory with an index in front of its one file."""
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def write_gguf(
    path: pathlib.Path,
    changed: Mapping[str, Any] | None = None,
    *,
    architecture: str = "llama",
    extra: Mapping[str, np.ndarray] | None = None,
) -> pathlib.Path:
    """The model as a GGUF file.

    Args:
      path: of the file.
      changed: metadata beside or instead of METADATA; None leaves a key out.
      architecture: what the file says that it holds.
      extra: further tensors.
    """
    writer = gguf.GGUFWriter(path, architecture)
    writer.data_alignment = (changed or {}).get("general.alignment", writer.data_alignment)
    for key, value in {**METADATA, **(changed or {})}.items():
        key = key.replace("llama.", f"{architecture}.", 1) if key.startswith("llama.") else key
        if value is not None:
            writer.add_key_value(
                key, value, _type(value), sub_type=_type(value[0]) if isinstance(value, list) else None
            )
    for name, array in {**weights(), **(extra or {})}.items():
        writer.add_tensor(name, _as_llama_cpp_orders(name, array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _as_llama_cpp_orders(name: str, array: np.ndarray) -> np.ndarray:
    """Rows of queries and keys with coordinate i of each of two heads of 8 beside coordinate i + 4."""
    if not name.endswith(("attn_q.weight", "attn_k.weight")):
        return array
    return np.ascontiguousarray(array.reshape(2, 2, 4, D).swapaxes(1, 2)).reshape(array.shape)


def _type(value: Any) -> gguf.GGUFValueType:
    if isinstance(value, int) and not isinstance(value, bool):
        wide = gguf.GGUFValueType.INT64 if abs(value) >= 2**31 else gguf.GGUFValueType.INT32
        return gguf.GGUFValueType.UINT32 if 0 <= value < 2**32 else wide
    return gguf.GGUFValueType.get_type(value)
