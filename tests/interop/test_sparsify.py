"""The sparsify format: read, written, refused."""

import json

import numpy as np
import pytest
import safetensors.numpy

from saejax import interop
from saejax.errors import UserError
from saejax.interop import sparsify

D_IN, D_SAE, K = 6, 20, 4


def write(path, **changes):
    """A hook's directory with the documented keys; None removes one. Returns the weights."""
    rng = np.random.default_rng(3)
    shapes = {"encoder.weight": (D_SAE, D_IN), "encoder.bias": (D_SAE,), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}
    weights = {key: rng.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}
    path.mkdir()
    safetensors.numpy.save_file(weights, path / "sae.safetensors")
    config = {
        "activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": D_SAE, "k": K,
        "multi_topk": False, "skip_connection": False, "transcode": False, "d_in": D_IN,
    } | changes  # fmt: skip
    (path / "cfg.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return weights


def plain(w, x):
    acts = np.maximum((x - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"], 0)
    acts = acts * (acts >= np.sort(acts, axis=1)[:, -K, None])
    return acts, acts @ w["W_dec"] + w["b_dec"]


def test_files_of_sparsify_compute_what_they_say(rows, tmp_path):
    weights = write(tmp_path / "layers.10", multi_topk=True)
    sae = interop.load(tmp_path / "layers.10")
    assert sae.provenance["format"] == "sparsify" and sae.provenance["hook_name"] == "layers.10"
    assert sae.sparsifier.multi_topk_alpha == 1 / 8
    latents, recon = plain(weights, rows)
    np.testing.assert_allclose(sae.encode(rows), latents, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(sae(rows), recon, rtol=2e-5, atol=2e-5)


def test_older_files_count_latents_by_a_factor(tmp_path):
    older = {"activation": None, "num_latents": 0, "expansion_factor": 5, "signed": False}
    write(tmp_path / "x", **older)
    with pytest.raises(UserError, match=r"encoder.weight must have shape \(30, 6\), got \(20, 6\)"):
        interop.load(tmp_path / "x")
    write(tmp_path / "y", **older)
    weights = safetensors.numpy.load_file(tmp_path / "y" / "sae.safetensors")
    longer = {key: np.resize(value, (30, *value.shape[1:])) for key, value in weights.items() if key != "b_dec"}
    safetensors.numpy.save_file(longer | {"b_dec": weights["b_dec"]}, tmp_path / "y" / "sae.safetensors")
    assert interop.load(tmp_path / "y").sparsifier.d_sae == 30


@pytest.mark.parametrize("subtract", [True, False])
def test_export_then_load_computes_the_same(subtract, trained, rows, tmp_path):
    sae = trained("topk", subtract_b_dec=subtract)
    back = interop.load(interop.export(sae, tmp_path / "h", "sparsify"))
    np.testing.assert_allclose(back(rows), sae(rows), rtol=1e-5, atol=1e-5 * np.abs(sae(rows)).max())
    weights = safetensors.numpy.load_file(tmp_path / "h" / "sae.safetensors")
    np.testing.assert_allclose(back(rows), plain(weights, rows)[1], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transcode": "yes"}, "transcode must be true or false, got 'yes'"),
        ({"skip_connection": 1}, "skip_connection must be true or false, got 1"),
        ({"activation": "groupmax"}, "activation must be \"topk\", got 'groupmax'"),
        ({"k": 21}, "sae.k must be in"),
        ({"k": None}, "missing k"),
        ({"num_latents": None, "expansion_factor": None}, "missing num_latents or expansion_factor"),
        ({"momentum": 1}, "unknown momentum"),
    ],
)
def test_what_is_not_understood_is_refused(changes, message, tmp_path):
    write(tmp_path / "x", **changes)
    with pytest.raises(UserError, match=message):
        interop.load(tmp_path / "x")


def test_skips_and_nans_are_refused(tmp_path):
    weights = write(tmp_path / "x")
    file = tmp_path / "x" / "sae.safetensors"
    safetensors.numpy.save_file(weights | {"W_skip": np.ones((D_IN, D_IN), np.float32)}, file)
    with pytest.raises(UserError, match="unknown W_skip"):
        interop.load(tmp_path / "x")
    safetensors.numpy.save_file(weights | {"b_dec": np.full(D_IN, np.nan, np.float32)}, file)
    with pytest.raises(UserError, match="b_dec must be finite"):
        interop.load(tmp_path / "x")


def test_only_topk_is_written(trained, tmp_path):
    with pytest.raises(UserError, match="sae.type=batch_topk: the sparsify format takes topk"):
        sparsify.export(trained("batch_topk"), tmp_path)
