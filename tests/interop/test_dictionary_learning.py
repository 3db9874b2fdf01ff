"""The dictionary_learning format: every class computes what it says, and back."""

import json

import numpy as np
import pytest

from saejax import interop
from saejax.errors import UserError
from saejax.interop import dictionary_learning, torch_file

D_IN, D_SAE, K = 6, 20, 4
OURS = {
    "AutoEncoder": "l1",
    "AutoEncoderNew": "l1",
    "GatedAutoEncoder": "gated",
    "JumpReluAutoEncoder": "jumprelu",
    "AutoEncoderTopK": "topk",
    "BatchTopKSAE": "batch_topk",
    "MatryoshkaBatchTopKSAE": "matryoshka",
}
BECOMES = {
    "l1": "AutoEncoderNew",
    "p_anneal": "AutoEncoder",
    "gated": "GatedAutoEncoder",
    "jumprelu": "JumpReluAutoEncoder",
    "topk": "AutoEncoderTopK",
    "matryoshka_topk": "AutoEncoderTopK",
    "batch_topk": "BatchTopKSAE",
    "matryoshka": "MatryoshkaBatchTopKSAE",
}


def state_of(kind):
    """A state dict with the documented keys and shapes."""
    rng = np.random.default_rng(2)
    weights = {
        "W_enc": (D_IN, D_SAE), "W_dec": (D_SAE, D_IN), "b_enc": (D_SAE,), "b_dec": (D_IN,), "bias": (D_IN,),
        "encoder.weight": (D_SAE, D_IN), "encoder.bias": (D_SAE,), "decoder.weight": (D_IN, D_SAE),
        "decoder.bias": (D_IN,), "decoder_bias": (D_IN,), "r_mag": (D_SAE,), "mag_bias": (D_SAE,),
        "gate_bias": (D_SAE,),
    }  # fmt: skip
    linear = ["encoder.weight", "decoder.weight"]
    keys = {
        "AutoEncoder": [*linear, "encoder.bias", "bias"],
        "AutoEncoderNew": [*linear, "encoder.bias", "decoder.bias"],
        "GatedAutoEncoder": [*linear, "decoder_bias", "r_mag", "mag_bias", "gate_bias"],
        "JumpReluAutoEncoder": ["W_enc", "b_enc", "W_dec", "b_dec"],
        "AutoEncoderTopK": [*linear, "encoder.bias", "b_dec"],
        "BatchTopKSAE": [*linear, "encoder.bias", "b_dec"],
        "MatryoshkaBatchTopKSAE": ["W_enc", "b_enc", "W_dec", "b_dec"],
    }[kind]
    state = {key: 0.7 * rng.normal(size=weights[key]).astype(np.float32) for key in keys}
    if kind == "JumpReluAutoEncoder":
        state["threshold"] = rng.uniform(-0.2, 1.0, D_SAE).astype(np.float32)
    if "TopK" in kind:
        state |= {"k": np.asarray(K, np.int32), "threshold": np.asarray(0.9, np.float32)}
    if kind == "MatryoshkaBatchTopKSAE":
        state["group_sizes"] = np.array([3, 6, 11])
    return state


def write(path, kind, state, **changes):
    path.mkdir(exist_ok=True)
    torch_file.write_state_dict(path / "ae.pt", state)
    trainer = {"dict_class": kind, "activation_dim": D_IN, "dict_size": D_SAE, "lm_name": "tiny", "lr": 1e-4}
    trainer |= {"k": K} if "TopK" in kind else {}
    trainer = {key: value for key, value in (trainer | changes).items() if value is not None}
    (path / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 128}}))
    return path


def plain(kind, s, x):
    """(latents, reconstruction) as the class computes them, in float64."""
    s = {key: value.astype(np.float64) for key, value in s.items()}
    W_enc = s["encoder.weight"].T if "encoder.weight" in s else s["W_enc"]
    W_dec = s["decoder.weight"].T if "decoder.weight" in s else s["W_dec"]
    bias = next(s[key] for key in ("bias", "decoder.bias", "decoder_bias", "b_dec") if key in s)
    x_in = x if kind in ("AutoEncoderNew", "JumpReluAutoEncoder") else x - bias
    pre = x_in @ W_enc
    if kind == "GatedAutoEncoder":
        acts = (pre + s["gate_bias"] > 0) * np.maximum(np.exp(s["r_mag"]) * pre + s["mag_bias"], 0)
        return acts, acts @ W_dec + bias
    pre = pre + (s["encoder.bias"] if "encoder.bias" in s else s["b_enc"])
    acts = np.maximum(pre, 0)
    if kind == "AutoEncoderTopK":
        acts = acts * (acts >= np.sort(acts, axis=1)[:, -K, None])
    elif "threshold" in s:
        acts = acts * (pre > s["threshold"])
    return acts, acts @ W_dec + bias


def assert_same(sae, expected, x):
    latents, recon = expected
    np.testing.assert_allclose(sae.encode(x), latents, rtol=2e-5, atol=2e-5 * np.abs(latents).max())
    np.testing.assert_allclose(sae(x), recon, rtol=2e-5, atol=2e-5 * np.abs(recon).max())


@pytest.mark.parametrize("kind", OURS)
def test_every_class_computes_what_it_says(kind, rows, tmp_path):
    state = state_of(kind)
    sae = interop.load(write(tmp_path / "trainer_0", kind, state))
    assert sae.sparsifier.name == OURS[kind] and sae.provenance["format"] == "dictionary_learning"
    assert sae.provenance["model_name"] == "tiny"
    assert_same(sae, plain(kind, state, rows), rows)
    if kind == "MatryoshkaBatchTopKSAE":
        assert sae.sparsifier.prefixes == (3, 9, 20)


@pytest.mark.parametrize("name", BECOMES)
def test_export_then_load_computes_the_same(name, trained, rows, tmp_path):
    sae = trained(name)
    back = interop.load(interop.export(sae, tmp_path, "dictionary_learning"))
    kind = json.loads((tmp_path / "config.json").read_text())["trainer"]["dict_class"]
    assert kind == BECOMES[name]
    np.testing.assert_allclose(back(rows), sae(rows), rtol=1e-5, atol=1e-5 * np.abs(sae(rows)).max())
    assert_same(back, plain(kind, torch_file.read_state_dict(tmp_path / "ae.pt"), rows), rows)


@pytest.mark.parametrize("name", ["gated", "topk", "jumprelu", "batch_topk"])
def test_a_bias_on_the_input_is_added_or_taken_away(name, trained, rows, tmp_path):
    sae = trained(name, subtract_b_dec=name == "jumprelu")
    back = interop.load(interop.export(sae, tmp_path, "dictionary_learning"))
    np.testing.assert_allclose(back(rows), sae(rows), rtol=1e-4, atol=1e-5 * np.abs(sae(rows)).max())


def test_checkpoints_take_the_config_of_their_run(rows, tmp_path):
    run = write(tmp_path / "trainer_0", "AutoEncoder", state_of("AutoEncoder"))
    (run / "checkpoints").mkdir()
    (run / "ae.pt").rename(run / "checkpoints" / "ae_1000.pt")
    sae = interop.load(run / "checkpoints" / "ae_1000.pt")
    assert_same(sae, plain("AutoEncoder", state_of("AutoEncoder"), rows), rows)
    (run / "config.json").unlink()
    (run / "checkpoints" / "ae_1000.pt").rename(run / "ae.pt")
    with pytest.raises(UserError, match="needs config.json beside it.*do not say whether"):
        interop.load(run)


def without(key):
    return lambda state: {name: value for name, value in state.items() if name != key}


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (lambda s: s | {"stray": np.ones(2)}, {}, "unknown stray"),
        (without("threshold"), {}, "missing threshold"),
        (lambda s: s | {"b_dec": np.ones(5, np.float32)}, {}, r"b_dec must have shape \(6,\), got \(5,\)"),
        (lambda s: s | {"encoder.weight": np.ones(5, np.float32)}, {}, r"encoder.weight must have two dimensions"),
        (lambda s: s | {"b_dec": np.full(6, np.inf, np.float32)}, {}, "b_dec must be finite"),
        (lambda s: s | {"k": np.asarray(4.0, np.float32)}, {}, "k must be of integers, got float32"),
        (lambda s: s | {"k": np.asarray(0, np.int32)}, {"k": None}, "sae.k must be in"),
        (lambda s: s | {"threshold": np.asarray(-1, np.float32)}, {}, "threshold is -1, that is, not measured yet"),
        (lambda s: s, {"k": 5}, "trainer.k is 5, but the weights of BatchTopKSAE have 4"),
        (lambda s: s, {"dict_size": 21}, "trainer.dict_size is 21"),
        (lambda s: s, {"dict_class": "IdentityDict"}, "trainer.dict_class must be one of AutoEncoder, .*IdentityDict"),
        (lambda s: s, {"dict_class": None}, "dict_class must be one of .*, got None"),
    ],
)
def test_what_does_not_fit_is_refused(change, config, message, tmp_path):
    path = write(tmp_path / "x", "BatchTopKSAE", change(state_of("BatchTopKSAE")), **config)
    with pytest.raises(UserError, match=message) as caught:
        interop.load(path)
    assert "\n" not in str(caught.value)


def test_groups_must_cover_the_latents(tmp_path):
    state = state_of("MatryoshkaBatchTopKSAE") | {"group_sizes": np.array([3, 6, 12])}
    with pytest.raises(UserError, match=r"group_sizes must be positive and sum to dict_size=20, got \[3, 6, 12\]"):
        interop.load(write(tmp_path / "x", "MatryoshkaBatchTopKSAE", state))


def test_backups_of_unfinished_runs_are_refused(tmp_path):
    torch = pytest.importorskip("torch")
    path = write(tmp_path / "x", "AutoEncoder", state_of("AutoEncoder"))
    ae = {key: torch.from_numpy(value) for key, value in state_of("AutoEncoder").items()}
    torch.save({"step": 3, "ae": ae, "optimizer": {"state": {}}, "norm_factor": 2.0}, path / "ae.pt")
    with pytest.raises(UserError, match="a backup of an unfinished run"):
        interop.load(path)


def test_what_has_no_class_is_not_written(trained, tmp_path):
    with pytest.raises(UserError, match="sae.type=abs_topk: the dictionary_learning format takes l1, "):
        dictionary_learning.export(trained("abs_topk"), tmp_path / "x")
    assert not (tmp_path / "x").exists()
