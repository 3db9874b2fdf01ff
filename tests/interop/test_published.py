"""What other tools publish is recognised by one format, computes what its source's formula says, or is refused."""

import numpy as np
import published_examples as published
import pytest
import safetensors.numpy

from saejax import interop
from saejax.errors import UserError
from saejax.interop import torch_file

pytest.importorskip("torch")
EXAMPLES = published.EXAMPLES


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_compute_their_formula(example, rows, tmp_path):
    format, write = EXAMPLES[example]
    path, formula = write(tmp_path)
    assert [name for name, module in interop.FORMATS.items() if module.detect(path)] == [format]
    sae = interop.load(path)
    assert sae.provenance["format"] == format
    latents, recon = formula(rows.astype(np.float64))
    assert 0 < np.mean(latents != 0) < 1
    for ours, theirs in ((sae.encode(rows), latents), (sae(rows), recon)):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())
    with pytest.raises(UserError, match=f"{format}: must be one of .*it is only read"):
        interop.export(sae, tmp_path / "out", format)


def change_json(path, **changes):
    import json

    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


NAN = np.full(published.N, np.nan, np.float32)
WEIGHTS = {
    "gemma scope 1": "b_enc",
    "gemma scope 2": "b_enc",
    "goodfire": "encoder_linear.bias",
    "qwen scope": "b_enc",
    "llama scope": "encoder.bias",
    "llamascopium relu": "b_E",
}
"""The name of the encoder's bias."""


def change_weights(example, path, change):
    """Applies `change` to the arrays of an example."""
    file = next(file for file in [path, *path.rglob("*")] if file.suffix in (".npz", ".pth", ".pt", ".safetensors"))
    if file.suffix == ".npz":
        np.savez(file, **change(dict(np.load(file))))
    elif file.suffix == ".safetensors":
        safetensors.numpy.save_file(change(safetensors.numpy.load_file(file)), file)
    else:
        torch_file.write_state_dict(file, change(torch_file.read_state_dict(file)))


@pytest.mark.parametrize("example", WEIGHTS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w, key: w | {key: NAN}, "{key} must be finite in float32, 20 NaN"),
        (lambda w, key: w | {key: NAN[1:]}, r"{key} must have shape \(20,\), got \(19,\)"),
        (lambda w, key: w | {key: np.ones(20, np.int32)}, "{key} must be floating point"),
        (lambda w, key: w | {"b_more": NAN}, "unknown b_more"),
        (lambda w, key: {k: v for k, v in w.items() if k != key}, "missing {key}"),
    ],
)
def test_weights_that_do_not_fit_are_refused(example, change, message, tmp_path):
    path, _ = EXAMPLES[example][1](tmp_path)
    key = WEIGHTS[example]
    change_weights(example, path, lambda w: change(w, key))
    with pytest.raises(UserError, match=message.format(key=key)) as caught:
        interop.load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("example", "file", "changes", "message"),
    [
        ("gemma scope 2", "config.json", {"architecture": "relu"}, 'architecture must be "jump_relu"'),
        ("gemma scope 2", "config.json", {"heads": 8}, "unknown heads"),
        ("gemma scope 2", "config.json", {"width": 19}, "width must be the number of latents, 20, got 19"),
        ("qwen scope", "config.json", {"k": None}, "k must be an integer"),
        ("qwen scope", "config.json", {"k": 21}, "sae.k must be in"),
        ("qwen scope", "config.json", {"d_sae": 21}, "d_sae is 21, but the weights have 20"),
        ("qwen scope", "config.json", {"model_type": "relu"}, "model_type must be"),
        ("llama scope", "hyperparams.json", {"use_glu_encoder": True}, "use_glu_encoder must be false"),
        ("llama scope", "hyperparams.json", {"apply_decoder_bias_to_pre_encoder": True}, "must be false"),
        ("llama scope", "hyperparams.json", {"temperature": 1}, "unknown temperature"),
        ("llama scope", "hyperparams.json", {"norm_activation": "token-wise"}, "norm_activation must be"),
        ("llama scope", "hyperparams.json", {"dataset_average_activation_norm": {}}, "missing .*norm.in"),
        ("llama scope", "hyperparams.json", {"dataset_average_activation_norm": {"in": 0.0}}, "must be above 0"),
        ("llama scope", "hyperparams.json", {"jump_relu_threshold": None}, "jump_relu_threshold must be a finite"),
        ("llamascopium relu", "config.json", {"act_fn": "batchtopk"}, "act_fn=batchtopk selects among all rows"),
        ("llamascopium relu", "config.json", {"act_fn": "gelu"}, "act_fn must be"),
        ("llamascopium relu", "config.json", {"sae_type": "lorsa"}, "sae_type must be"),
        ("llamascopium relu", "config.json", {"use_glu_encoder": True}, "use_glu_encoder must be false"),
        ("llamascopium relu", "config.json", {"norm_activation": "batch-wise"}, "norm_activation must be"),
        ("llamascopium relu", "config.json", {"expansion_factor": 3.4}, "must be a positive whole number"),
        ("llamascopium relu", "config.json", {"use_decoder_bias": False}, "unknown b_D"),
        ("llamascopium relu", "config.json", {"heads": 8}, "unknown heads"),
        ("llamascopium relu", "config.json", {"hook_point_in": "blocks.4"}, "missing dataset_average_activation_norm"),
        ("llamascopium folded", "config.json", {"act_fn": "relu"}, "unknown activation_function.log_jumprelu"),
    ],
)
def test_configs_that_are_not_understood_are_refused(example, file, changes, message, tmp_path):
    path, _ = EXAMPLES[example][1](tmp_path)
    change_json((path if path.is_dir() else path.parent) / file, **changes)
    with pytest.raises(UserError, match=message) as caught:
        interop.load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "Softmax"}, "activation must be"),
        ({"activation_state_dict": {"k": 4, "postact_fn": "Identity"}}, 'postact_fn must be "ReLU"'),
        ({"activation_state_dict": {"k": 4}}, "missing activation_state_dict.postact_fn"),
        ({"activation_state_dict": {"k": 21, "postact_fn": "ReLU"}}, "sae.k must be in"),
        ({"decoder.bias": 1}, "unknown decoder.bias"),
        ({"activation.k": 5, "activation.postact_fn": "ReLU"}, "must say what activation_state_dict says"),
        ({"pre_bias": 1}, "pre_bias must be a tensor, got int"),
        ({"latent_bias": None}, "latent_bias must be a tensor"),
    ],
)
def test_openai_files_that_are_not_understood_are_refused(changes, message, tmp_path):
    path, _ = published.openai(tmp_path, **changes)
    with pytest.raises(UserError, match=message):
        interop.load(path)


def test_openai_files_that_name_the_activation_twice_are_read(rows, tmp_path):
    path, formula = published.openai(tmp_path, **{"activation.k": published.K, "activation.postact_fn": "ReLU"})
    np.testing.assert_allclose(interop.load(path)(rows), formula(rows)[1], rtol=1e-4, atol=1e-4)


def test_norms_that_were_never_measured_are_refused(tmp_path):
    path, _ = published.llamascopium(tmp_path, norm="token-wise")
    change_json(path / "config.json", norm_activation="dataset-wise")
    with pytest.raises(UserError, match="dataset_average_activation_norm.* must be finite"):
        interop.load(path)


def test_scaling_factors_and_pickles_in_npz_are_refused(tmp_path):
    path, formula = published.gemma_1(tmp_path)
    change_weights("", path, lambda w: w | {"scaling_factor": np.ones(published.N, np.float32)})
    assert interop.load(path).config.name == "jumprelu"
    change_weights("", path, lambda w: w | {"scaling_factor": 2 * np.ones(published.N, np.float32)})
    with pytest.raises(UserError, match="scaling_factor must be 1"):
        interop.load(path)
    change_weights("", path, lambda w: w | {"b_dec": np.array([print], dtype=object)})
    with pytest.raises(UserError, match=r"no .npz file of plain arrays \(b_dec.npy holds object"):
        interop.load(path)
    (path / "params.npz").write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(UserError, match=r"no .npz file of plain arrays \(no zip archive"):
        interop.load(path)


def test_k_of_a_layer_alone_comes_from_the_name_of_its_release(tmp_path):
    path, _ = published.qwen_without_config(tmp_path)
    moved = path.rename(tmp_path / "layer5.sae.pt")
    with pytest.raises(UserError, match="nothing says k"):
        interop.load(moved)


def test_names_in_a_file_are_looked_at_without_its_tensors(tmp_path):
    torch_file.write_state_dict(tmp_path / "x.pt", {"a": np.ones(3, np.float32), "b": np.ones((2, 2), np.float32)})
    assert torch_file.keys(tmp_path / "x.pt") == {"a", "b"}
    (tmp_path / "y.pt").write_bytes(b"no archive")
    assert torch_file.keys(tmp_path / "y.pt") == torch_file.keys(tmp_path / "z.pt") == frozenset()
