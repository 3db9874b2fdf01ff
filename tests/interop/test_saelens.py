"""The SAELens format: what is written is what is read, what is not understood is refused, SAELens agrees."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from saejax import interop
from saejax.errors import UserError
from saejax.interop import saelens
from saejax.sae import L1, SAE, SAEParams, TopK

D_IN, D_SAE = 6, 20
CONFIGS = {"topk": TopK(d_in=D_IN, d_sae=D_SAE, k=4), "l1": L1(d_in=D_IN, d_sae=D_SAE)}
X = np.random.default_rng(0).normal(size=(64, D_IN)).astype(np.float32) * 3 + 1


def trained(name, *, decoder_norm=None):
    """An SAE with biases and, for L1, decoder norms far from 1."""
    keys = jax.random.split(jax.random.key(1), 4)
    W_dec = jax.random.normal(keys[0], (D_SAE, D_IN))
    W_dec = W_dec / jnp.linalg.norm(W_dec, axis=1, keepdims=True)
    W_dec = W_dec * (jnp.ones((D_SAE, 1)) if name == "topk" else jnp.linspace(0.2, 3.0, D_SAE)[:, None])
    params = SAEParams(
        W_enc=jax.random.normal(keys[1], (D_IN, D_SAE)),
        b_enc=0.3 * jax.random.normal(keys[2], (D_SAE,)),
        W_dec=W_dec if decoder_norm is None else W_dec * decoder_norm,
        b_dec=jax.random.normal(keys[3], (D_IN,)),
    )
    return SAE(CONFIGS[name], params, {"source": {"hook": "blocks.3.hook_resid_post", "model": {"name": "tiny"}}})


def rewrite(path, **changes):
    """Changes keys of cfg.json; None removes one."""
    config = json.loads((path / "cfg.json").read_text()) | changes
    (path / "cfg.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


@pytest.mark.parametrize("name", CONFIGS)
def test_export_then_load_reconstructs_the_same(name, tmp_path):
    sae = trained(name)
    back = interop.load(interop.export(sae, tmp_path / "out"))
    assert type(back.sparsifier) is type(sae.sparsifier)
    np.testing.assert_allclose(back(X), sae(X), rtol=1e-6, atol=1e-6 * np.abs(sae(X)).max())


def test_config_says_what_saelens_needs(tmp_path):
    saelens.export(trained("topk"), tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert config["architecture"] == "topk" and config["k"] == 4
    assert config["normalize_activations"] == "none" and config["apply_b_dec_to_input"] is True
    assert int(config["metadata"]["sae_lens_version"].split(".")[0]) >= 6
    assert config["metadata"]["hook_name"] == "blocks.3.hook_resid_post"
    assert config["metadata"]["model_name"] == "tiny"


def test_standard_is_written_with_unit_decoder_rows(tmp_path):
    sae = trained("l1")
    back = saelens.load(saelens.export(sae, tmp_path))
    np.testing.assert_allclose(np.linalg.norm(back.params.W_dec, axis=1), 1.0, atol=1e-6)
    norms = np.linalg.norm(np.asarray(sae.params.W_dec), axis=1)
    np.testing.assert_allclose(back.encode(X), np.asarray(sae.encode(X)) * norms, rtol=1e-5, atol=1e-5)


def plain_saelens(weights, config, x):
    """SAELens' forward pass, written out: the meaning of every switch, in float64."""
    w = {key: np.asarray(value, np.float64) for key, value in weights.items()}
    norms = np.linalg.norm(w["W_dec"], axis=1)
    pre = (x - config["apply_b_dec_to_input"] * w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    if config["architecture"] == "standard":
        return np.maximum(pre, 0) @ w["W_dec"] + w["b_dec"]
    rescale = config["rescale_acts_by_decoder_norm"]
    pre = pre * norms if rescale else pre
    kept = np.where(pre >= np.sort(pre, axis=1)[:, [-config["k"]]], np.maximum(pre, 0), 0)
    return (kept / norms if rescale else kept) @ w["W_dec"] + w["b_dec"]


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize(("name", "rescale"), [("topk", True), ("topk", False), ("l1", None)])
def test_loading_honours_every_switch(name, rescale, subtract, tmp_path):
    saelens.export(trained(name, decoder_norm=np.linspace(0.5, 2.0, D_SAE)[:, None]), tmp_path)
    rewrite(tmp_path, apply_b_dec_to_input=subtract, rescale_acts_by_decoder_norm=rescale)
    config = json.loads((tmp_path / "cfg.json").read_text())
    expected = plain_saelens(safetensors.numpy.load_file(tmp_path / "sae_weights.safetensors"), config, X)
    np.testing.assert_allclose(saelens.load(tmp_path)(X), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 3}, "unknown temperature"),
        ({"k": None}, "missing k"),
        ({"k": 21}, "sae.k"),
        ({"k": 4.0}, "k must be an integer"),
        ({"d_sae": 19}, "W_enc must have shape"),
        ({"architecture": "jumprelu"}, "architecture must be one of standard, topk"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations"),
        ({"apply_b_dec_to_input": 1}, "apply_b_dec_to_input"),
        ({"metadata": {}}, "sae_lens_version"),
        ({"metadata": {"sae_lens_version": "5.9.1"}}, "at least 6.0.0, got 5.9.1"),
        ({"metadata": None}, "metadata"),
    ],
)
def test_config_that_is_not_understood_is_refused(changes, message, tmp_path):
    saelens.export(trained("topk"), tmp_path)
    rewrite(tmp_path, **changes)
    with pytest.raises(UserError, match=message) as caught:
        interop.load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w | {"threshold": np.ones(D_SAE, np.float32)}, "unknown threshold"),
        (lambda w: {k: v for k, v in w.items() if k != "b_enc"}, "missing b_enc"),
        (lambda w: w | {"W_dec": w["W_dec"].T.copy()}, r"W_dec must have shape \(20, 6\), got \(6, 20\)"),
        (lambda w: w | {"b_dec": np.ones(D_IN, np.int32)}, "b_dec must be floating point"),
    ],
)
def test_weights_that_do_not_fit_are_refused(change, message, tmp_path):
    saelens.export(trained("topk"), tmp_path)
    file = tmp_path / "sae_weights.safetensors"
    safetensors.numpy.save_file(change(safetensors.numpy.load_file(file)), file)
    with pytest.raises(UserError, match=message):
        interop.load(tmp_path)


def test_pickles_and_strangers_are_refused(tmp_path):
    saelens.export(trained("topk"), tmp_path)
    (tmp_path / "sae_weights.safetensors").write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(UserError, match="no safetensors file"):
        interop.load(tmp_path)
    with pytest.raises(UserError, match="none of the known formats"):
        interop.load(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="format=gguf: must be one of saelens"):
        interop.export(trained("topk"), tmp_path, format="gguf")


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", CONFIGS)
def test_saelens_itself_computes_the_same(name, tmp_path):
    sae_lens = pytest.importorskip("sae_lens")
    torch = pytest.importorskip("torch")
    ours = saelens.load(saelens.export(trained(name), tmp_path))
    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    with torch.no_grad():
        latents = theirs.encode(torch.from_numpy(X))
        recon = theirs.decode(latents)
    np.testing.assert_allclose(ours.encode(X), latents.numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ours(X), recon.numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(trained(name)(X), recon.numpy(), rtol=1e-5, atol=1e-5)
    assert theirs.cfg.metadata.hook_name == "blocks.3.hook_resid_post"
    theirs.fold_W_dec_norm()
    with torch.no_grad():
        np.testing.assert_allclose(trained(name)(X), theirs(torch.from_numpy(X)).numpy(), rtol=1e-5, atol=1e-5)
