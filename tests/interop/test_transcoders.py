"""Transcoders and their kin of other tools: recognised, computed as their source says, written, refused."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import transcoder_examples as published
from published_examples import draw, top, write_tensors

import saejax
from saejax import interop
from saejax.errors import UserError
from saejax.interop import saebench
from saejax.sae import ARCHITECTURES, SAE, Family, SAEParams

EXAMPLES = published.EXAMPLES
D, OUT, N = published.D, published.OUT, published.N


def inputs(width):
    return np.random.default_rng(0).normal(size=(64, width)) + 0.5


def assert_same(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_compute_their_formula(example, tmp_path):
    format, family, sites, write = EXAMPLES[example]
    path, formula = write(tmp_path)
    assert [name for name, module in interop.FORMATS.items() if module.detect(path)] == [format]
    sae = saejax.load(path)
    assert sae.provenance["format"] == format
    assert (sae.config.family.name, sae.sites) == (family, sites)
    x = inputs(sae.config.d_in)
    latents, out = formula(x)
    assert 0 < np.mean(latents != 0) < 1
    assert_same(sae.encode(x), latents)
    assert_same(sae(x), out)


def trained(name, skip, sites=(D, OUT)):
    """A transcoder of ours with parameters as after training."""
    fields = {"k": 4} if name in ("topk", "batch_topk") else {}
    common = {"family": Family.transcoder, "sites": sites, "skip": skip, "unit_decoder": False}
    config = ARCHITECTURES[name](d_in=sites[0], d_sae=N, **common, **fields)
    shapes = {"W_enc": (sites[0], N), "b_enc": (N,), "W_dec": (N, sites[1]), "b_dec": (sites[1],), "W_skip": sites}
    weights = draw(shapes, seed=1)
    weights["W_dec"] *= np.linspace(0.2, 3, N, dtype=np.float32)[:, None]
    thresholds = {"jumprelu": np.linspace(0.1, 1, N, dtype=np.float32), "batch_topk": np.float32(0.7)}
    extra = {"threshold": thresholds[name]} if name in thresholds else {}
    extra |= {"W_skip": weights["W_skip"]} if skip else {}
    plain = {key: jnp.asarray(weights[key]) for key in ("W_enc", "b_enc", "W_dec", "b_dec")}
    params = SAEParams(**plain, extra={key: jnp.asarray(value) for key, value in extra.items()})
    return SAE(config, params, {"hook": "blocks.1.ln2.hook_normalized,blocks.1.hook_mlp_out"})


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(
    ("name", "becomes"), [("l1", "transcoder"), ("jumprelu", "jumprelu"), ("batch_topk", "jumprelu")]
)
def test_transcoders_go_to_saelens_and_back(name, becomes, skip, tmp_path):
    sae, x = trained(name, skip), inputs(D)
    interop.export(sae, tmp_path, "saelens")
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert (
        config["architecture"]
        == {
            ("transcoder", False): "transcoder",
            ("transcoder", True): "skip_transcoder",
            ("jumprelu", False): "jumprelu_transcoder",
            ("jumprelu", True): "jumprelu_skip_transcoder",
        }[becomes, skip]
    )
    assert (config["d_in"], config["d_out"], config["apply_b_dec_to_input"]) == (D, OUT, False)
    hooks = config["metadata"]["hook_name"], config["metadata"]["hook_name_out"]
    assert hooks == ("blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out")
    weights = {
        k: v.astype(np.float64) for k, v in safetensors.numpy.load_file(tmp_path / "sae_weights.safetensors").items()
    }
    _, out = published.transcode(weights, x, weights["W_skip"].T if skip else None)
    assert_same(sae(x), out)
    assert_same(interop.load(tmp_path)(x), out)


@pytest.mark.parametrize("skip", [False, True])
def test_transcoders_go_to_sparsify_and_back(skip, tmp_path):
    sae, x = trained("topk", skip, (D, D)), inputs(D)
    interop.export(sae, tmp_path, "sparsify")
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert (config["transcode"], config["skip_connection"]) == (True, skip)
    w = {k: v.astype(np.float64) for k, v in safetensors.numpy.load_file(tmp_path / "sae.safetensors").items()}
    f = top(x @ w["encoder.weight"].T + w["encoder.bias"], 4)
    assert_same(sae(x), f @ w["W_dec"] + w["b_dec"] + (x @ w["W_skip"].T if skip else 0))
    back = interop.load(tmp_path)
    assert_same(back(x), sae(x))
    assert_same(back.encode(x), f)


@pytest.mark.parametrize(
    ("format", "sae", "message"),
    [
        ("saelens", ("topk", False), "sae.type=topk: as transcoders the saelens format takes"),
        ("sparsify", ("l1", False), "sae.type=l1: the sparsify format takes topk for family=transcoder"),
        ("sparsify", ("topk", False), r"sae.sites=\(6, 5\): the sparsify format takes as much to read as to write"),
        ("dictionary_learning", ("topk", False), "sae.family=transcoder: the dictionary_learning format takes sae"),
    ],
)
def test_what_a_format_cannot_hold_is_not_written(format, sae, message, tmp_path):
    with pytest.raises(UserError, match=message):
        interop.export(trained(*sae), tmp_path, format)
    assert not list(tmp_path.iterdir())


def test_several_sites_are_not_written(tmp_path):
    params = trained("l1", False, (12, 10)).params
    config = ARCHITECTURES["l1"](d_in=12, d_sae=N, family=Family.transcoder, sites=(6, 6, 5, 5))
    with pytest.raises(UserError, match="takes transcoders of one hook to one hook"):
        interop.export(SAE(config, params), tmp_path)
    params = trained("l1", False, (12, 12)).params
    config = ARCHITECTURES["l1"](d_in=12, d_sae=N, family=Family.crosscoder, sites=(6, 6))
    with pytest.raises(UserError, match="sae.family=crosscoder: the saelens format takes sae, transcoder"):
        interop.export(SAE(config, params), tmp_path)


def test_saebench_takes_no_transcoder():
    pytest.importorskip("torch")
    with pytest.raises(UserError, match="sae.family=transcoder: saebench evaluates what reconstructs its input"):
        saebench.adapter(trained("l1", False), model_name="gpt2")


def change_config(path, **changes):
    file = next(file for file in path.iterdir() if file.suffix == ".json")
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.mark.parametrize(
    ("example", "changes", "message"),
    [
        ("gemma scope 2, affine", {"affine_connection": False}, "affine_connection must say whether"),
        ("gemma scope 2", {"affine_connection": True}, "affine_connection must say whether"),
        ("gemma scope 2", {"type": "clt"}, "type=clt is read from a directory of params_layer_<i>"),
        ("gemma scope 2, all layers", {"width": N}, "width must be the number of latents, 60, got 20"),
        ("sparsify skip", {"skip_connection": False}, "unknown W_skip"),
        ("sparsify", {"skip_connection": True}, "missing W_skip"),
        ("saelens transcoder", {"d_out": None}, "missing d_out"),
        ("saelens transcoder", {"d_out": D}, r"W_dec must have shape \(20, 6\), got \(20, 5\)"),
        ("saelens transcoder", {"apply_b_dec_to_input": True}, "apply_b_dec_to_input must be false, got True"),
        ("saelens transcoder", {"normalize_activations": "layer_norm"}, 'normalize_activations must be "none"'),
        ("saelens transcoder", {"architecture": "skip_transcoder"}, "missing W_skip"),
        ("llamascopium, two hooks", {"norm_activation": "token-wise"}, "scales by the target, which is not given"),
        ("llamascopium crosscoder relu", {"act_fn": "topk"}, 'act_fn must be "relu" or "jumprelu"'),
        ("llamascopium crosscoder relu", {"sparsity_include_decoder_norm": False}, "must be true for a crosscoder"),
        ("llamascopium crosscoder relu", {"hook_points": "blocks.0"}, "hook_points must be a list"),
        ("llamascopium crosscoder relu", {"norm_activation": "token-wise"}, "norm_activation must be"),
        ("llamascopium clt relu", {"act_fn": "topk"}, "act_fn must be"),
        ("llamascopium clt relu", {"act_fn": "batchlayertopk"}, "act_fn=batchlayertopk selects among all rows"),
        ("llamascopium clt relu", {"hook_points_out": published.TARGETS[:2]}, "must be as many"),
    ],
)
def test_configs_that_are_not_understood_are_refused(example, changes, message, tmp_path):
    path, _ = EXAMPLES[example][3](tmp_path)
    change_config(path, **changes)
    with pytest.raises(UserError, match=message) as caught:
        interop.load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("example", "file", "change", "message"),
    [
        (
            "gemma scope 2, all layers", "params_layer_1.safetensors",
            lambda w: w | {"affine_skip_connection": np.ones((D, D), np.float32)}, "are read without a skip",
        ),
        (
            "gemma scope 2, all layers", "params_layer_1.safetensors",
            lambda w: w | {"w_dec": w["w_dec"] + 1}, "w_dec must be 0 for the layers before 1",
        ),
        (
            "gemma scope 2, all layers", "params_layer_1.safetensors",
            lambda w: w | {"w_dec": w["w_dec"][:, 1:]}, r"W_dec must have shape \(20, 3, 6\), got \(20, 2, 6\)",
        ),
        (
            "llamascopium clt relu", "sae_weights.safetensors",
            lambda w: {k: v for k, v in w.items() if k != "W_D.2"}, r"missing W_D.2",
        ),
        (
            "llamascopium crosscoder relu", "sae_weights.safetensors",
            lambda w: w | {"W_E": np.moveaxis(w["W_E"], 1, 2)}, r"W_E must have shape \(3, 6, 20\)",
        ),
        (
            "circuit-tracer jumprelu", "layer_4.safetensors",
            lambda w: w | {"activation_function.threshold": -np.ones(N, np.float32)}, "thresholds must be at least 0",
        ),
        ("circuit-tracer", "layer_4.safetensors", lambda w: w | {"scale": np.ones(1, np.float32)}, "unknown scale"),
        (
            "circuit-tracer", "layer_4.safetensors",
            lambda w: w | {"W_skip": w["W_skip"].T}, r"W_skip must have shape \(5, 6\), got \(6, 5\)",
        ),
        (
            "circuit-tracer clt", "W_dec_1.safetensors",
            lambda w: {"W_dec_1": w["W_dec_1"][:, 1:]}, r"W_dec_1 must have shape \(20, 2, 6\)",
        ),
        (
            "circuit-tracer clt", "W_enc_2.safetensors",
            lambda w: w | {"threshold_2": np.ones(N, np.float32)}, "must have the keys and shapes of W_enc_0",
        ),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_refused(example, file, change, message, tmp_path):
    path, _ = EXAMPLES[example][3](tmp_path)
    write_tensors(tmp_path / file, change(safetensors.numpy.load_file(tmp_path / file)))
    with pytest.raises(UserError, match=message) as caught:
        interop.load(path)
    assert "\n" not in str(caught.value)


def test_the_activation_in_config_yaml_counts(tmp_path):
    path, _ = published.tracer(tmp_path, config={"activation": "jump_relu"})
    with pytest.raises(UserError, match="activation=jump_relu in config.yaml does not agree"):
        interop.load(path)
    (tmp_path / "config.yaml").write_text("activation: gelu")
    with pytest.raises(UserError, match="activation must be"):
        interop.load(path)
    (tmp_path / "config.yaml").write_text("a: [")
    with pytest.raises(UserError, match="config.yaml: no valid YAML"):
        interop.load(path)


def test_the_activation_of_all_layers_counts(tmp_path):
    path, _ = published.tracer_layers(tmp_path)
    (path / "config.yaml").write_text("activation: topk\nk: 4\n")
    with pytest.raises(UserError, match='config.yaml: activation must be "relu" or null, got .topk.'):
        interop.load(path)
