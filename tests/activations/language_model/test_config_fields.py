"""Every field of every family's config.json with every wrong value: one line that names it, or a model that loads."""

import json
import pathlib
from typing import Any

import pytest
from model_files import CONFIG, VOCAB, write_directory

from saejax.activations import language_model
from saejax.activations.language_model import families
from saejax.errors import UserError

NAN, INFINITE = float("nan"), float("inf")
WRONG = ["32", "x", "", -1, 0, NAN, INFINITE, True, 32.5, [1], [], {"a": 1}, 10**9, 2**31, 10**30, None]
NEVER_NUMBERS: tuple[Any, ...] = ("32", "x", "", -1, NAN, INFINITE, True, [1], {"a": 1})

SIZES = {key: CONFIG[key] for key in (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "max_position_embeddings", "rms_norm_eps", "rope_theta", "tie_word_embeddings", "bos_token_id",
    "eos_token_id",
)}  # fmt: skip
GEMMA = SIZES | dict(
    query_pre_attn_scalar=24, sliding_window=7, final_logit_softcapping=3.0, hidden_activation="gelu_pytorch_tanh"
)
ROPES = dict(
    full_attention=dict(rope_type="linear", factor=8.0, rope_theta=1e6),
    sliding_attention=dict(rope_type="default", rope_theta=1e4),
)
GEMMA3 = GEMMA | dict(model_type="gemma3_text", rope_parameters=ROPES, layer_types=["sliding_attention"])
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": CONFIG,
    "mistral": SIZES | dict(model_type="mistral", sliding_window=7),
    "qwen2": SIZES | dict(model_type="qwen2", use_sliding_window=True, sliding_window=7, max_window_layers=0),
    "qwen3": SIZES | dict(model_type="qwen3", rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=1e6)),
    "gemma2": GEMMA | dict(model_type="gemma2", attn_logit_softcapping=2.0),
    "gemma3_text": GEMMA3,
    "gemma3_old": GEMMA | dict(model_type="gemma3_text", rope_local_base_freq=1e4, sliding_window_pattern=6),
    "gemma3": dict(model_type="gemma3", text_config=GEMMA3),
    "gpt2": dict(
        model_type="gpt2", n_embd=16, n_layer=1, n_head=2, n_positions=64, n_inner=32, vocab_size=VOCAB,
        layer_norm_epsilon=1e-5, activation_function="gelu_new", tie_word_embeddings=True, bos_token_id=0,
        eos_token_id=0,
    ),
}  # fmt: skip


def places(tree: dict[str, Any], above: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The path of every field, those of mappings inside included."""
    found = [(*above, key) for key in tree]
    return found + [place for key, value in tree.items() if isinstance(value, dict)
                    for place in places(value, (*above, key))]  # fmt: skip


def changed(tree: dict[str, Any], place: tuple[str, ...], value: Any) -> dict[str, Any]:
    """The same mapping with another value at one place."""
    inner = value if len(place) == 1 else changed(tree[place[0]], place[1:], value)
    return {**tree, place[0]: inner}


def at(tree: dict[str, Any], place: tuple[str, ...]) -> Any:
    """The value at a place."""
    return tree if not place else at(tree[place[0]], place[1:])


def refusal(act) -> str | None:
    """The one line that an action ends in; None where it is done; any other exception passes through."""
    try:
        act()
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 1200
        return str(error)
    return None


@pytest.mark.parametrize("family", FAMILIES)
def test_each_field_with_each_wrong_value(family: str) -> None:
    raw = FAMILIES[family]
    families.model_config(raw)
    for place in places(raw):
        number = type(at(raw, place)) in (int, float)
        for value in WRONG:
            said = refusal(lambda place=place, value=value: families.model_config(changed(raw, place, value)))
            if number and any(value is one for one in NEVER_NUMBERS):
                # A list of ids is allowed for the tokens alone.
                assert (said is not None and place[-1] in said) or (place[-1].endswith("token_id") and value == [1])
            if value == {"a": 1} and said is not None:
                assert place[-1] in said and "allowed" in said
    assert refusal(lambda: families.model_config({**raw, "model_type": ["llama"]})) is not None


def test_each_field_through_the_front_door(tmp_path: pathlib.Path) -> None:
    """The same of a directory, where sizes are compared with the weights as well."""
    folder, loaded = write_directory(tmp_path / "m"), 0
    language_model.load(folder)
    for place in places(CONFIG):
        for value in (*WRONG, 2**31 - 1, 3):
            (folder / "config.json").write_text(json.dumps(changed(CONFIG, place, value)))
            said = refusal(lambda: language_model.load(folder))
            loaded += said is None
            if said is None:
                # Only what no weight depends on, or what is as it was.
                assert place[-1] not in ("hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size")
    assert loaded > 20


@pytest.mark.parametrize("value", ["32", [32], 32.5, True, None, float("nan"), -32])
def test_the_line_names_file_field_value_and_what_is_allowed(value: Any, tmp_path: pathlib.Path) -> None:
    folder = write_directory(tmp_path / "m", CONFIG | {"hidden_size": value})
    with pytest.raises(UserError, match=r"m/config\.json: hidden_size.*allowed: a whole number from 1 to") as caught:
        language_model.read_config(folder)
    assert value is None or f"hidden_size={value!r}" in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_scaling": CONFIG["rope_scaling"] | {"high_freq_factor": 1.0}}, "high_freq_factor=1.0"),
        ({"num_attention_heads": 32, "head_dim": None}, "num_attention_heads=32"),
        ({"rms_norm_eps": 2.0}, "rms_norm_eps=2.0.*at most 1"),
        ({"eos_token_id": ["</s>"]}, "eos_token_id"),
        ({"hidden_act": {"a": 1}}, "hidden_act"),
        ({"rope_scaling": [1]}, r"rope_scaling=\[1\].*a mapping"),
        ({"rope_scaling": {"rope_type": 3}}, "rope_type=3"),
        ({"model_type": "gemma3"}, "text_config is missing"),
        ({"model_type": "gemma3", "text_config": "x"}, "text_config='x'"),
        ({"model_type": "mistral", "sliding_window": 4, "layer_types": ["full_attention"] * 2}, "layer_types"),
        ({"model_type": "mistral", "sliding_window": 4, "layer_types": [["a"]]}, "layer_types"),
    ],
)
def test_values_that_fit_their_type_and_not_the_model(fields: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        families.model_config(CONFIG | fields)
