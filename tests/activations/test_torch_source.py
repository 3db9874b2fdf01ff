"""Torch models give the same capture as JAX models and as each document alone, for text and images."""

import pathlib

import numpy as np
import pytest

from saejax.activations import arrays, language_model
from saejax.activations.language_model import torch_source
from saejax.errors import UserError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

PACKED = np.array([[1] * 5 + [2] * 4 + [0] * 3, [1] * 12], np.int32)
SMALL = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2)


@pytest.fixture
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 50, PACKED.shape).astype(np.int32)


def saved(model_class: str, config_class: str, path: pathlib.Path, **fields: object) -> pathlib.Path:
    torch.manual_seed(0)
    getattr(transformers, model_class)(getattr(transformers, config_class)(**fields)).save_pretrained(path)
    return path


def test_decoder_equals_the_jax_model(tokens: np.ndarray, tmp_path) -> None:
    path = saved("LlamaForCausalLM", "LlamaConfig", tmp_path, vocab_size=50, num_key_value_heads=1, **SMALL)
    jax_model, torch_model = language_model.load(path), torch_source.load(path)
    wanted = jax_model.capture(tokens, PACKED, ("blocks.1.hook_resid_post", "blocks.0.hook_mlp_out"))
    found = torch_model.capture(tokens, PACKED, ("layers.1", "layers.0.mlp"))
    real = PACKED > 0
    for ours, theirs in zip(wanted.values(), found.values(), strict=True):
        # float32 sums in another order; values are O(1).
        np.testing.assert_allclose(np.asarray(ours)[real], theirs[real], atol=1e-5, rtol=0)
        assert not theirs[~real].any()
    assert torch_model.hook_width("layers.1") == 16


def test_encoder_documents_are_as_if_alone(tokens: np.ndarray, tmp_path) -> None:
    path = saved("BertModel", "BertConfig", tmp_path, vocab_size=50, **SMALL)
    model, hook = torch_source.load(path), "encoder.layer.1"
    packed = model.capture(tokens, PACKED, (hook,))[hook]
    assert packed.shape == (2, 12, 16)
    for row, part in ((0, slice(0, 5)), (0, slice(5, 9)), (1, slice(0, 12))):
        with torch.no_grad():
            alone = model.model(torch.as_tensor(tokens[row, part][None], dtype=torch.long), output_hidden_states=True)
        np.testing.assert_allclose(packed[row, part], alone.hidden_states[2][0].numpy(), atol=1e-5, rtol=0)


def test_images_give_patches(tmp_path) -> None:
    path = saved("ViTModel", "ViTConfig", tmp_path, image_size=8, patch_size=4, **SMALL)
    model = torch_source.load(path)
    pixels = np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32)
    layer = next(name for name in model._modules if name.endswith("layer.1") or name.endswith("layers.1"))
    found = model.capture_images(pixels, (layer, "embeddings.patch_embeddings.projection"))
    assert found[layer].shape == (2, 5, 16)  # one class token and 2 x 2 patches
    assert found["embeddings.patch_embeddings.projection"].shape == (2, 4, 16)
    with torch.no_grad():
        states = model.model(torch.as_tensor(pixels), output_hidden_states=True).hidden_states
    np.testing.assert_allclose(found[layer], states[2].numpy(), atol=1e-5, rtol=0)
    assert model.hook_width(layer) == 16


def test_images_become_arrays_to_train_on(tmp_path) -> None:
    path = saved("ViTModel", "ViTConfig", tmp_path / "vit", image_size=8, patch_size=4, **SMALL)
    model, rng = torch_source.load(path), np.random.default_rng(0)
    hook = next(name for name in model._modules if name.endswith(("layer.1", "layers.1")))
    batches = [rng.normal(size=(b, 3, 8, 8)).astype(np.float32) for b in (4, 4, 3)]
    assert torch_source.write_images(model, iter(batches), hook, tmp_path / "rows") == 11 * 5
    source = arrays.Arrays(path=str(tmp_path / "rows"), heldout_share=0.2)
    assert source.d_in == 16 and source.n_train() == 44
    wanted = np.concatenate([model.capture_images(pixels, (hook,))[hook].reshape(-1, 16) for pixels in batches])
    np.testing.assert_array_equal(np.concatenate(list(source.heldout(4))), wanted[44:])
    stream = source.open(n_lanes=2, block_rows=11, lanes=range(2), seed=0)
    epoch = np.concatenate([next(stream).reshape(-1, 16) for _ in range(2)])
    np.testing.assert_array_equal(np.unique(epoch, axis=0), np.unique(wanted[:44], axis=0))
    with pytest.raises(UserError, match="holds arrays already"):
        torch_source.write_images(model, batches, hook, tmp_path / "rows")
    with pytest.raises(UserError, match="not finite in batch 0"):
        torch_source.write_images(model, [batches[0] * np.nan], hook, tmp_path / "nan")


def test_stops_after_the_hook(tokens: np.ndarray, tmp_path) -> None:
    path = saved("GPT2Model", "GPT2Config", tmp_path, vocab_size=50, n_embd=16, n_layer=3, n_head=2, n_positions=32)
    model = torch_source.load(path)
    ran: list[int] = []
    for i, block in enumerate(model.model.h):
        block.register_forward_pre_hook(lambda *_, i=i: ran.append(i))
    model.capture(tokens, PACKED, ("h.0", "h.1"))
    assert ran == [0, 1]


def test_refusals(tokens: np.ndarray, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved("BertModel", "BertConfig", tmp_path / "bert", vocab_size=50, **SMALL)
    model = torch_source.load(path)
    with pytest.raises(UserError, match="hook='encoder.layer.9' is not a module"):
        model.capture(tokens, PACKED, ("encoder.layer.9",))
    with pytest.raises(UserError, match="never runs"):
        model.capture(tokens, PACKED, ("encoder.layer",))
    with pytest.raises(UserError, match="cannot be loaded"):
        torch_source.load(tmp_path / "nowhere")
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(UserError, match=r"saejax\[torch\]"):
        torch_source.load(path)
