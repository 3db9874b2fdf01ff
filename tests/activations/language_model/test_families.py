"""Every family against transformers: logits, hidden states and the activations inside blocks.

Tolerance: float32 keeps 6e-8 relative; three layers of sums of 32 to 96 terms in another order give errors
of some 1e-6 on values up to about 10. 1e-4 absolute leaves a margin of ten and is far below any wrong
formula.
"""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import MODELS

from saejax.activations import language_model
from saejax.activations.language_model import families, hooks
from saejax.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore")
TOLERANCE = 1e-4


def _torch_activations(model, tokens: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits and, under our hook names, what torch hooks see in the independent model."""
    import torch

    seen: dict[str, np.ndarray] = {}
    gpt2 = model.config.model_type == "gpt2"
    gemma = model.config.model_type.startswith("gemma")
    layers = model.transformer.h if gpt2 else model.model.layers
    handles = []

    def keep(name: str, module, *, given: bool) -> None:
        def hook(_module, args, kwargs, output):
            value = (args[0] if args else kwargs["hidden_states"]) if given else output
            value = value[0] if isinstance(value, tuple) else value
            seen[name] = value.detach().numpy().reshape(*tokens.shape, -1).copy()

        handles.append(module.register_forward_hook(hook, with_kwargs=True))

    for i, layer in enumerate(layers):
        attention = layer.attn if gpt2 else layer.self_attn
        keep(f"blocks.{i}.hook_resid_pre", layer, given=True)
        keep(f"blocks.{i}.hook_resid_post", layer, given=False)
        keep(f"blocks.{i}.attn.hook_z", attention.c_proj if gpt2 else attention.o_proj, given=True)
        keep(f"blocks.{i}.mlp.hook_post", layer.mlp.c_proj if gpt2 else layer.mlp.down_proj, given=True)
        keep(f"blocks.{i}.hook_attn_out", layer.post_attention_layernorm if gemma else attention, given=False)
        keep(f"blocks.{i}.hook_mlp_out", layer.post_feedforward_layernorm if gemma else layer.mlp, given=False)
        before_mlp = (
            layer.ln_2 if gpt2 else layer.pre_feedforward_layernorm if gemma else layer.post_attention_layernorm
        )
        keep(f"blocks.{i}.hook_resid_mid", before_mlp, given=True)
        keep(f"blocks.{i}.ln1.hook_normalized", layer.ln_1 if gpt2 else layer.input_layernorm, given=False)
        keep(f"blocks.{i}.ln2.hook_normalized", before_mlp, given=False)
    with torch.no_grad():
        logits = model(input_ids=torch.as_tensor(tokens, dtype=torch.long), use_cache=False).logits.numpy()
    for handle in handles:
        handle.remove()
    for i, layer in enumerate(
        () if gpt2 else layers
    ):  # what torch sees of an RMS norm holds its gain, our hook does not
        before_mlp = layer.pre_feedforward_layernorm if gemma else layer.post_attention_layernorm
        for name, norm in (("ln1", layer.input_layernorm), ("ln2", before_mlp)):
            gain = norm.weight.detach().numpy() + (1 if gemma else 0)
            assert np.abs(gain - 1).max() > 0.1 and np.abs(gain).min() > 0.1  # the gain is seen, and can be undone
            seen[f"blocks.{i}.{name}.hook_normalized"] /= gain
    return logits, seen


@pytest.mark.parametrize("name", MODELS)
def test_matches_transformers(name: str, tiny, tokens: np.ndarray) -> None:
    path, reference = tiny(name)
    model = language_model.load(path)
    logits, wanted = _torch_activations(reference, tokens)
    assert np.abs(logits).max() > 1  # the comparison has something to compare
    np.testing.assert_allclose(model.logits(tokens, np.ones_like(tokens)), logits, atol=TOLERANCE, rtol=0)
    found = model.capture(tokens, np.ones_like(tokens), tuple(wanted))
    assert len(wanted) == len(hooks.SITES) * 3
    for hook, value in wanted.items():
        assert found[hook].shape == (*tokens.shape, model.hook_width(hook))
        np.testing.assert_allclose(found[hook], value, atol=TOLERANCE, rtol=0, err_msg=hook)


def test_old_rope_fields_mean_the_same(tiny, tokens: np.ndarray, tmp_path) -> None:
    path, _ = tiny("llama-llama3")
    new = language_model.load(path)
    shutil.copytree(path, tmp_path / "old")
    raw = json.loads((path / "config.json").read_text())
    given = raw.pop("rope_parameters")
    raw |= {"rope_theta": given.pop("rope_theta"), "rope_scaling": given}
    (tmp_path / "old" / "config.json").write_text(json.dumps(raw))
    assert language_model.load(tmp_path / "old").config == new.config
    raw = json.loads((tiny("gemma3")[0] / "config.json").read_text())
    wanted = families.model_config(raw)
    given = raw.pop("rope_parameters")
    raw |= {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": given["full_attention"]}
    assert families.model_config(raw) == wanted


def test_gemma3_text_inside_the_multimodal_directory(tiny, tokens: np.ndarray, tmp_path) -> None:
    from safetensors.numpy import load_file, save_file

    path, _ = tiny("gemma3")
    raw = json.loads((path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": raw, "vision_config": {}}))
    weights = {
        k.replace("model.", "language_model.model.", 1): v for k, v in load_file(path / "model.safetensors").items()
    }
    weights["vision_tower.patch.weight"] = np.zeros((2, 2), np.float32)
    save_file(weights, tmp_path / "model.safetensors")
    one, two = (language_model.load(p).logits(tokens, np.ones_like(tokens)) for p in (path, tmp_path))
    np.testing.assert_array_equal(one, two)


def test_sharded_index_and_bfloat16(tiny, tokens: np.ndarray, tmp_path) -> None:
    path, reference = tiny("llama")
    reference.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    whole, parts = (language_model.load(p) for p in (path, tmp_path))
    np.testing.assert_array_equal(
        whole.logits(tokens, np.ones_like(tokens)), parts.logits(tokens, np.ones_like(tokens))
    )
    assert sorted(parts.provenance["sha256"])[0] == "config.json"
    # bfloat16 keeps 8 bits: 2^-8 relative per operation, some ten operations deep on values of O(1).
    rounded = language_model.load(tmp_path, dtype="bfloat16")
    assert rounded.dtype == jnp.bfloat16
    error = np.abs(rounded.logits(tokens, np.ones_like(tokens)) - whole.logits(tokens, np.ones_like(tokens)))
    assert error.mean() < 10 * 2**-8


def _change_config(path, target, **fields) -> None:
    shutil.copytree(path, target)
    raw = json.loads((path / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(raw | fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "mamba"}, "model_type='mamba'.*llama"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type='yarn'"),
        (
            {"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope_type='dynamic'",
        ),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor is missing"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"hidden_act": "mish"}, "'mish'"),
        ({"num_hidden_layers": 4}, "layers.3.input_layernorm.weight.*missing"),
        ({"num_hidden_layers": 2}, "layers.2.input_layernorm.weight.*unknown"),
        ({"intermediate_size": 40}, r"\(48, 32\), allowed: \(40, 32\)"),
        ({"tie_word_embeddings": True}, "lm_head.weight differs"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
def test_refuses_what_it_cannot_compute(fields: dict, message: str, tiny, tmp_path) -> None:
    _change_config(tiny("llama")[0], tmp_path / "changed", **fields)
    with pytest.raises(UserError, match=message) as caught:
        language_model.load(tmp_path / "changed")
    assert "\n" not in str(caught.value)


def test_refuses_paths_that_hold_no_model(tmp_path) -> None:
    with pytest.raises(UserError, match="not found"):
        language_model.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no config\.json"):
        language_model.load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_text("")
    with pytest.raises(UserError, match="pickled"):
        language_model.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(UserError, match="not a readable safetensors"):
        language_model.load(tmp_path)
    (tmp_path / "bad.gguf").write_bytes(b"nothing here")
    with pytest.raises(UserError, match="not a readable GGUF"):
        language_model.load(tmp_path / "bad.gguf")
