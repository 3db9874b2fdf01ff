"""Eight fake CPU devices and strict numerics for every test; set before anything imports JAX."""

import os

# Unawaited steps on more fake devices than cores deadlock in XLA's thread pool without NPROC.
os.environ.update(NPROC="16", JAX_PLATFORMS="cpu", WANDB_MODE="offline", HF_HUB_OFFLINE="1")

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Conftests share one name, so --doctest-modules must not import them as modules.
collect_ignore_glob = ["*conftest.py"]

import json  # noqa: E402
from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402

# Folders about formulas, which compare with a reference within rounding: most of their time was LLVM's optimisation.
FORMULAS = {"codes", "evals", "experiments", "language_model", "sae", "sparse_coding"}
# `make test` compiles everything so; `make nightly` compiles what is trained, stored and resumed as users do.
EVERYWHERE = jax.config.read("jax_disable_most_optimizations")
# These look at what is in optimised programs: bits, copies, memory, FLOPs.
OPTIMISED = {"test_frozen", "test_buffer", "test_encode_top_k", "test_flops"}


@pytest.hookimpl(tryfirst=True)  # before the fixtures of the whole session, which are compared bit for bit
def pytest_runtest_setup(item):
    """Quick compilation for formulas; what is trained, stored, resumed and timed is compiled as users compile it."""
    quick = item.path.stem not in OPTIMISED and (EVERYWHERE or item.path.parent.name in FORMULAS)
    if quick != jax.config.read("jax_disable_most_optimizations"):
        jax.config.update("jax_disable_most_optimizations", quick)
        jax.clear_caches()  # nothing of one kind is used by the other


@pytest.fixture(scope="session")
def small_model(tmp_path_factory) -> Path:
    """A Hugging Face directory with a random two-layer Llama and a byte-level tokenizer: the real loader reads it."""
    import safetensors.numpy
    import tokenizers

    path = tmp_path_factory.mktemp("model")
    d, d_mlp, heads, vocab = 24, 48, 3, 257
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = {character: number + 1 for number, character in enumerate(alphabet)} | {"<|endoftext|>": 0}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(path / "tokenizer.json"))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": d, "intermediate_size": d_mlp,
        "num_hidden_layers": 2, "num_attention_heads": heads, "num_key_value_heads": heads, "vocab_size": vocab,
        "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True,
        "hidden_act": "silu",
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    weights = {"model.embed_tokens.weight": rng.normal(size=(vocab, d)), "model.norm.weight": np.ones(d)}
    for layer in range(2):
        name = f"model.layers.{layer}"
        for part in "qkvo":
            weights[f"{name}.self_attn.{part}_proj.weight"] = rng.normal(size=(d, d)) / d**0.5
        weights[f"{name}.mlp.gate_proj.weight"] = rng.normal(size=(d_mlp, d)) / d**0.5
        weights[f"{name}.mlp.up_proj.weight"] = rng.normal(size=(d_mlp, d)) / d**0.5
        weights[f"{name}.mlp.down_proj.weight"] = rng.normal(size=(d, d_mlp)) / d_mlp**0.5
        weights[f"{name}.input_layernorm.weight"] = np.ones(d)
        weights[f"{name}.post_attention_layernorm.weight"] = np.ones(d)
    arrays = {name: value.astype(np.float32) for name, value in weights.items()}
    safetensors.numpy.save_file(arrays, path / "model.safetensors")
    return path


@pytest.fixture(scope="session")
def sealed():
    """From a manifest to the text of one whose checksums say what is in it now: a store that was written so."""
    from saejax.activations.store import files as store_format

    def seal(manifest: dict) -> str:
        manifest = manifest | {"fingerprint": store_format.fingerprint(manifest)}
        return json.dumps(manifest | {"sha256": store_format.checksum(manifest)})

    return seal


@pytest.fixture(scope="session")
def small_store(small_model, tmp_path_factory) -> Path:
    """What `saejax harvest` makes of the small model and the Python documentation: 8,192 tokens and some held out."""
    from saejax import cli

    path = tmp_path_factory.mktemp("store")
    status = cli.main(
        [
            "harvest",
            f"path={path}",
            f"model={small_model}",
            "text=pydoc",
            "hook=blocks.1.hook_resid_post",
            "n_tokens=8192",
            "heldout_tokens=2048",
            "context_length=64",
            "shard_sequences=32",
        ]  # fmt: skip
    )
    assert status == 0
    return path
