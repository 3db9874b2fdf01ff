"""The SAELens format: what is written is what is read, what is not understood is refused, SAELens agrees."""

import json

import numpy as np
import pytest
import safetensors.numpy

from saejax import interop
from saejax.errors import UserError
from saejax.interop import saelens
from saejax.sae import EncoderKind

D_IN, D_SAE = 6, 20
BECOMES = {
    "topk": ("topk", "topk"),
    "abs_topk": ("abstopk", "abs_topk"),
    "batch_topk": ("jumprelu", "jumprelu"),
    "jumprelu": ("jumprelu", "jumprelu"),
    "gated": ("gated", "gated"),
    "matryoshka": ("jumprelu", "jumprelu"),
    "matryoshka_topk": ("topk", "topk"),
    "matching_pursuit": ("matching_pursuit", "matching_pursuit"),
    "l1": ("standard", "l1"),
    "p_anneal": ("standard", "l1"),
}


def rewrite(path, **changes):
    """Changes keys of cfg.json; None removes one."""
    config = json.loads((path / "cfg.json").read_text()) | changes
    (path / "cfg.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def reweigh(path, change):
    file = path / "sae_weights.safetensors"
    safetensors.numpy.save_file(change(safetensors.numpy.load_file(file)), file)


def plain_saelens(w, config, x):
    """(latents, reconstruction) as SAELens computes them at inference, in float64."""
    w = {name: array.astype(np.float64) for name, array in w.items()}
    kind, norms = config["architecture"], np.linalg.norm(w["W_dec"], axis=1)
    x_in = x - w["b_dec"] if config["apply_b_dec_to_input"] else x
    rescale = config.get("rescale_acts_by_decoder_norm", False)
    if kind == "gated":
        pre = x_in @ w["W_enc"]
        acts = (pre + w["b_gate"] > 0) * np.maximum(pre * np.exp(w["r_mag"]) + w["b_mag"], 0)
    elif kind == "matching_pursuit":
        acts, residual = np.zeros((len(x), D_SAE)), x_in.copy()
        for _ in range(config["max_iterations"]):
            best = (residual @ w["W_dec"].T).argmax(axis=1)
            value = np.maximum((residual * w["W_dec"][best]).sum(axis=1), 0)
            acts[np.arange(len(x)), best] += value
            residual = residual - value[:, None] * w["W_dec"][best]
    else:
        pre = (x_in @ w["W_enc"] + w["b_enc"]) * (norms if rescale else 1)
        acts = np.maximum(pre, 0)
        if kind == "jumprelu":
            acts = acts * (pre > w["threshold"])
        elif "batchtopk" in kind:
            acts = acts * (pre > w["topk_threshold"])
        elif kind != "standard":
            size = np.abs(pre) if kind == "abstopk" else pre
            kept = size >= np.sort(size, axis=1)[:, -config["k"], None]
            acts = np.where(kept, pre if kind == "abstopk" else acts, 0)
    return acts, (acts / norms if rescale else acts) @ w["W_dec"] + w["b_dec"]


def assert_same(sae, latents, recon, x, rtol=2e-5):
    np.testing.assert_allclose(sae.encode(x), latents, rtol=rtol, atol=rtol * np.abs(latents).max())
    np.testing.assert_allclose(sae(x), recon, rtol=rtol, atol=rtol * np.abs(recon).max())


@pytest.mark.parametrize("name", BECOMES)
def test_export_then_load_computes_the_same(name, trained, rows, tmp_path):
    sae = trained(name)
    back = interop.load(interop.export(sae, tmp_path / "out"))
    config = json.loads((tmp_path / "out" / "cfg.json").read_text())
    weights = safetensors.numpy.load_file(tmp_path / "out" / "sae_weights.safetensors")
    assert (config["architecture"], back.sparsifier.name) == BECOMES[name]
    assert back.provenance["format"] == "saelens"
    np.testing.assert_allclose(back(rows), sae(rows), rtol=1e-5, atol=1e-5 * np.abs(sae(rows)).max())
    assert_same(back, *plain_saelens(weights, config, rows), rows)
    # Latents carry the old decoder norms, so that rows have norm 1.
    norms = np.linalg.norm(sae.params.W_dec, axis=1)
    np.testing.assert_allclose(back.encode(rows), np.asarray(sae.encode(rows)) * norms, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(weights["W_dec"], axis=1), 1, rtol=1e-6)


def test_config_says_what_saelens_needs(trained, tmp_path):
    saelens.export(trained("topk"), tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert config["architecture"] == "topk" and config["k"] == 4
    assert config["normalize_activations"] == "none" and config["apply_b_dec_to_input"] is True
    assert int(config["metadata"]["sae_lens_version"].split(".")[0]) >= 6
    assert config["metadata"]["hook_name"] == "blocks.3.hook_resid_post"
    assert config["metadata"]["model_name"] == "tiny"


def write(path, architecture, *, subtract=True, normalize="none", seed=0, **own):
    """A directory as SAELens saves one, with the documented keys; returns (weights, config)."""
    rng = np.random.default_rng(seed)
    shapes = {"W_enc": (D_IN, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}
    if architecture == "gated":
        shapes |= {"b_gate": shapes.pop("b_enc"), "b_mag": (D_SAE,), "r_mag": (D_SAE,)}
    if architecture == "matching_pursuit":
        del shapes["W_enc"], shapes["b_enc"]
    weights = {key: rng.normal(size=shape).astype(np.float32) * 0.7 for key, shape in shapes.items()}
    if architecture == "matching_pursuit":  # greedy steps shrink the residual only with rows of norm 1
        weights["W_dec"] /= np.linalg.norm(weights["W_dec"], axis=1, keepdims=True)
    if architecture == "jumprelu":
        weights["threshold"] = rng.uniform(-0.2, 1.0, D_SAE).astype(np.float32)
    if "batchtopk" in architecture:
        weights["topk_threshold"] = np.asarray(0.8, np.float64)
    config = {
        "d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": subtract,
        "normalize_activations": normalize, "reshape_activations": "none", "architecture": architecture,
        "metadata": {"sae_lens_version": "6.54.12", "hook_name": "blocks.0.hook_resid_pre"}, **own,
    }  # fmt: skip
    safetensors.numpy.save_file(weights, path / "sae_weights.safetensors")
    (path / "cfg.json").write_text(json.dumps(config))
    return weights, config


TOPK = {"k": 4, "use_sparse_activations": False, "aux_loss_coefficient": 1.0, "decoder_init_norm": 0.1}
FILES = [
    ("standard", {}),
    ("standard", {"l1_coefficient": 1.0, "lp_norm": 1.0, "l1_warm_up_steps": 0, "decoder_init_norm": 0.1}),
    ("topk", {"k": 4, "rescale_acts_by_decoder_norm": False}),
    ("topk", {"k": 4, "rescale_acts_by_decoder_norm": True}),
    ("abstopk", {"k": 4, "rescale_acts_by_decoder_norm": True}),
    ("jumprelu", {}),
    ("gated", {}),
    ("batchtopk", {**TOPK, "k": 4.0, "rescale_acts_by_decoder_norm": True, "topk_threshold_lr": 0.01}),
    ("batchtopk", {**TOPK, "rescale_acts_by_decoder_norm": False, "topk_threshold_lr": 0.01}),
    (
        "matryoshka_batchtopk",
        {**TOPK, "rescale_acts_by_decoder_norm": True, "topk_threshold_lr": 0.01, "matryoshka_widths": [3, 9],
         "use_matryoshka_aux_loss": False},
    ),
    ("matching_pursuit", {"max_iterations": 3, "residual_threshold": 0.0, "stop_on_duplicate_support": False}),
]  # fmt: skip


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize(("architecture", "own"), FILES)
def test_files_of_saelens_compute_what_they_say(architecture, own, subtract, rows, tmp_path):
    weights, config = write(tmp_path, architecture, subtract=subtract, **own)
    if architecture == "matching_pursuit":
        weights["b_dec"] *= subtract  # without the switch SAELens does not use it at all
    assert_same(saelens.load(tmp_path), *plain_saelens(weights, config, rows), rows)


def test_prefixes_of_a_matryoshka_end_with_all_latents(tmp_path):
    write(tmp_path, *FILES[9][:1], **FILES[9][1])
    assert saelens.load(tmp_path).sparsifier.prefixes == (3, 9, 20)


def test_logarithms_of_thresholds_in_older_checkpoints(rows, tmp_path):
    weights, config = write(tmp_path, "jumprelu")
    weights["threshold"] = np.abs(weights["threshold"])
    reweigh(tmp_path, lambda w: {k: v for k, v in w.items() if k != "threshold"} | {
        "log_threshold": np.log(weights["threshold"])
    })  # fmt: skip
    assert_same(saelens.load(tmp_path), *plain_saelens(weights, config, rows), rows)


def test_a_scale_of_training_is_folded(rows, tmp_path):
    for number, (architecture, own) in enumerate(FILES):
        path = tmp_path / str(number)
        path.mkdir()
        weights, config = write(path, architecture, normalize="expected_average_only_in", **own)
        with pytest.raises(UserError, match="needs activation_scaler.json"):
            saelens.load(path)
        (path / "activation_scaler.json").write_text('{"scaling_factor": 0.4, "has_whitening": false}')
        latents, recon = plain_saelens(weights, config, rows * 0.4)
        unit = 0.4 if own.get("rescale_acts_by_decoder_norm") or architecture == "matching_pursuit" else 1
        assert_same(saelens.load(path), latents / unit, recon / 0.4, rows)


@pytest.mark.parametrize("normalize", ["layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("number", [0, 3, 5, 6])
def test_rows_normalised_one_by_one(number, normalize, rows, tmp_path):
    architecture, own = FILES[number]
    weights, config = write(tmp_path, architecture, normalize=normalize, **own)
    mean, std = rows.mean(axis=1, keepdims=True), rows.std(axis=1, ddof=1, keepdims=True)
    size = np.linalg.norm(rows, axis=1, keepdims=True) / D_IN**0.5
    x = (rows - mean) / (std + 1e-5) if normalize == "layer_norm" else rows / size
    latents, recon = plain_saelens(weights, config, x)
    recon = recon * std + mean if normalize == "layer_norm" else recon * size
    sae = interop.load(tmp_path)
    assert_same(sae, latents, recon, rows)
    interop.export(sae, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "cfg.json").read_text())["normalize_activations"] == normalize
    np.testing.assert_allclose(interop.load(tmp_path / "out")(rows), recon, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="format=sparsify: this SAE normalises every row by itself"):
        interop.export(sae, tmp_path, "sparsify")


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("number", [0, 3, 5, 6, 7])
def test_whitening_of_training_is_folded(number, subtract, rows, tmp_path):
    architecture, own = FILES[number]
    weights, config = write(tmp_path, architecture, subtract=subtract, normalize="covariance_whitening", **own)
    rng = np.random.default_rng(5)
    M = np.eye(D_IN) + 0.2 * rng.normal(size=(D_IN, D_IN))
    mean = rng.normal(size=D_IN)
    sidecar = {"mean": mean, "matrix": M, "inverse_matrix": np.linalg.inv(M)}
    (tmp_path / "activation_scaler.json").write_text('{"scaling_factor": null, "has_whitening": true}')
    safetensors.numpy.save_file(
        {key: value.astype(np.float32) for key, value in sidecar.items()},
        tmp_path / "activation_whitening.safetensors",
    )
    latents, recon = plain_saelens(weights, config, (rows - mean) @ M)
    assert_same(saelens.load(tmp_path), latents, recon @ np.linalg.inv(M) + mean, rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 3}, "unknown temperature"),
        ({"k": None}, "missing k"),
        ({"k": 21}, "sae.k"),
        ({"k": 4.0}, "k must be an integer"),
        ({"d_sae": 19}, "b_dec|W_dec must have shape"),
        ({"architecture": "temporal"}, "architecture must be one of standard, .*, got temporal, a temporal SAE"),
        ({"architecture": "jumprelu"}, "unknown k, rescale_acts_by_decoder_norm"),
        ({"normalize_activations": "l2"}, "normalize_activations must be"),
        ({"apply_b_dec_to_input": 1}, "apply_b_dec_to_input must be true or false, got 1"),
        ({"metadata": {}}, "sae_lens_version"),
        ({"metadata": {"sae_lens_version": "5.9.1"}}, "at least 6.0.0, got 5.9.1"),
        ({"metadata": None}, "metadata"),
        ({"hook_point": "blocks.0", "metadata": None}, r"earlier ones \(hook_point\)"),
    ],
)
def test_config_that_is_not_understood_is_refused(changes, message, trained, tmp_path):
    saelens.export(trained("topk"), tmp_path)
    rewrite(tmp_path, **changes)
    with pytest.raises(UserError, match=message) as caught:
        interop.load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"residual_threshold": 0.01}, "residual_threshold must be 0"),
        ({"stop_on_duplicate_support": True}, "stop_on_duplicate_support"),
        ({"max_iterations": "many"}, "max_iterations must be an integer"),
    ],
)
def test_pursuits_that_stop_by_other_rules_are_refused(changes, message, trained, tmp_path):
    saelens.export(trained("matching_pursuit"), tmp_path)
    rewrite(tmp_path, **changes)
    with pytest.raises(UserError, match=message):
        interop.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w | {"threshold": np.ones(D_SAE, np.float32)}, "unknown threshold"),
        (lambda w: {k: v for k, v in w.items() if k != "b_enc"}, "missing b_enc"),
        (lambda w: w | {"W_dec": w["W_dec"].T.copy()}, r"W_dec must have shape \(20, 6\), got \(6, 20\)"),
        (lambda w: w | {"b_dec": np.ones(D_IN, np.int32)}, "b_dec must be floating point"),
        (lambda w: w | {"b_enc": np.full(D_SAE, np.nan, np.float32)}, "b_enc must be finite in float32, 20 NaN"),
        (lambda w: w | {"b_enc": np.full(D_SAE, 1e200)}, "b_enc must be finite in float32, 0 NaN and 20 inf"),
    ],
)
def test_weights_that_do_not_fit_are_refused(change, message, trained, tmp_path):
    saelens.export(trained("topk"), tmp_path)
    reweigh(tmp_path, change)
    with pytest.raises(UserError, match=message):
        interop.load(tmp_path)


def test_pickles_are_refused(trained, tmp_path):
    saelens.export(trained("topk"), tmp_path)
    (tmp_path / "sae_weights.safetensors").write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(UserError, match="no safetensors file"):
        interop.load(tmp_path)


def test_what_saelens_cannot_hold_is_not_written(trained, tmp_path):
    with pytest.raises(UserError, match="sae.encoder=mlp: the saelens format takes linear and tied"):
        saelens.export(trained("topk", encoder=EncoderKind.mlp), tmp_path)
    untrained = trained("batch_topk")
    untrained.params.extra["threshold"] = np.zeros(())
    with pytest.raises(UserError, match="sae.type=batch_topk: has no threshold yet"):
        saelens.export(untrained, tmp_path)
    assert not list(tmp_path.iterdir())
