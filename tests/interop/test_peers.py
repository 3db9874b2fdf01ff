"""The packages themselves, where they are installed: the same latents and reconstructions from the same files.

None of them is a requirement. They run in their own environment, with this repository beside them:
`pip install --no-deps sae-lens==6.54.12 dictionary-learning eai-sparsify` and what those import.
"""

import json

import numpy as np
import pytest

from saejax import interop
from saejax.errors import UserError

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.filterwarnings("default")
D_IN, D_SAE, K = 6, 20, 4
TOLERANCE = 1e-5
EXPORTED = ["topk", "abs_topk", "batch_topk", "jumprelu", "gated", "matryoshka", "matryoshka_topk", "matching_pursuit"]
EXPORTED += ["l1", "p_anneal"]


def agree(ours, latents, recon, rows):
    """Largest difference over largest entry, of latents and of reconstructions; must be within TOLERANCE."""
    found = []
    for mine, theirs in ((ours.encode(rows), latents), (ours(rows), recon)):
        theirs = theirs.detach().numpy()
        found.append(float(np.abs(np.asarray(mine) - theirs).max() / np.abs(theirs).max()))
    print(f"latents {found[0]:.1e}, reconstruction {found[1]:.1e}")
    assert max(found) <= TOLERANCE, found


def randomised(module, spread=0.7):
    """Fills every float parameter and buffer; thresholds stay positive."""
    generator = torch.Generator().manual_seed(0)
    for name, value in module.state_dict().items():
        if value.is_floating_point():
            drawn = torch.randn(value.shape, generator=generator, dtype=value.dtype) * spread
            value.copy_(drawn.abs() + 0.1 if "threshold" in name else drawn)
    return module


@pytest.mark.parametrize("name", EXPORTED)
def test_saelens_reads_what_we_write(name, trained, rows, tmp_path):
    sae_lens = pytest.importorskip("sae_lens")
    sae = trained(name)
    theirs = sae_lens.SAE.load_from_disk(interop.export(sae, tmp_path))
    with torch.no_grad():
        latents = theirs.encode(torch.from_numpy(rows))
        agree(interop.load(tmp_path), latents, theirs.decode(latents), rows)
        np.testing.assert_allclose(theirs(torch.from_numpy(rows)).numpy(), sae(rows), rtol=1e-4, atol=1e-4)
    assert theirs.cfg.metadata.hook_name == "blocks.3.hook_resid_post"
    if name not in ("matching_pursuit",):
        theirs.fold_W_dec_norm()
        with torch.no_grad():
            np.testing.assert_allclose(theirs(torch.from_numpy(rows)).numpy(), sae(rows), rtol=1e-4, atol=1e-4)


SAELENS = {
    "standard": {},
    "topk": {"k": K},
    "abstopk": {"k": K},
    "batchtopk": {"k": K},
    "matryoshka_batchtopk": {"k": K, "matryoshka_widths": [3, 9, 20]},
    "jumprelu": {},
    "gated": {},
    "matching_pursuit": {"max_iterations": 3, "residual_threshold": 0.0, "stop_on_duplicate_support": False},
}


def saelens_training(architecture, **fields):
    registry = pytest.importorskip("sae_lens.registry")
    kind, config = registry.get_sae_training_class(architecture)
    theirs = kind(config(d_in=D_IN, d_sae=D_SAE, **SAELENS[architecture] | fields))
    randomised(theirs)
    if architecture == "matching_pursuit":
        theirs.W_dec.data /= theirs.W_dec.norm(dim=1, keepdim=True)
    return theirs


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("architecture", SAELENS)
def test_we_read_what_saelens_writes(architecture, subtract, rows, tmp_path):
    sae_lens = pytest.importorskip("sae_lens")
    training = saelens_training(architecture, apply_b_dec_to_input=subtract)
    training.save_model(tmp_path / "checkpoint")
    training.save_inference_model(tmp_path / "inference")
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "inference")
    with torch.no_grad():
        latents = theirs.encode(torch.from_numpy(rows))
        recon = theirs.decode(latents)
    for folder in ("checkpoint", "inference"):
        agree(interop.load(tmp_path / folder), latents, recon, rows)


@pytest.mark.parametrize("architecture", SAELENS)
@pytest.mark.parametrize("normalize", ["expected_average_only_in", "covariance_whitening"])
@pytest.mark.parametrize("subtract", [True, False])
def test_checkpoints_of_saelens_in_its_own_scale(architecture, normalize, subtract, rows, tmp_path):
    sae_lens = pytest.importorskip("sae_lens")
    scaling = pytest.importorskip("sae_lens.training.activation_scaler")
    if normalize == "covariance_whitening" and architecture == "matching_pursuit":
        pytest.skip("SAELens does not fold it either")
    training = saelens_training(architecture, normalize_activations=normalize, apply_b_dec_to_input=subtract)
    training.save_model(tmp_path / "checkpoint")
    scaler = scaling.ActivationScaler()
    if normalize == "covariance_whitening":
        mean, M = torch.randn(D_IN), torch.eye(D_IN) + 0.2 * torch.randn(D_IN, D_IN)
        scaler.whitening = scaling.ActivationWhitening(mean, M, torch.linalg.inv(M))
        training.fold_activation_whitening(mean, M, torch.linalg.inv(M))
    else:
        scaler.scaling_factor = 0.4
        training.fold_activation_norm_scaling_factor(0.4)
    scaler.save(str(tmp_path / "checkpoint" / "activation_scaler.json"))
    training.save_inference_model(tmp_path / "inference")
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "inference")
    with torch.no_grad():
        latents = theirs.encode(torch.from_numpy(rows))
        agree(interop.load(tmp_path / "checkpoint"), latents, theirs.decode(latents), rows)


DICTIONARIES = {
    "AutoEncoder": {},
    "AutoEncoderNew": {},
    "GatedAutoEncoder": {},
    "JumpReluAutoEncoder": {},
    "AutoEncoderTopK": {"k": K},
    "BatchTopKSAE": {"k": K},
    "MatryoshkaBatchTopKSAE": {"k": K, "group_sizes": [3, 6, 11]},
}


def dictionary_class(name):
    for module in ("dictionary", "trainers.top_k", "trainers.batch_top_k", "trainers.matryoshka_batch_top_k"):
        found = getattr(pytest.importorskip(f"dictionary_learning.{module}"), name, None)
        if found is not None:
            return found
    raise AssertionError(name)


@pytest.mark.parametrize("name", DICTIONARIES)
def test_we_read_what_dictionary_learning_writes(name, rows, tmp_path):
    theirs = randomised(dictionary_class(name)(D_IN, D_SAE, **DICTIONARIES[name]))
    torch.save(theirs.state_dict(), tmp_path / "ae.pt")
    trainer = {"dict_class": name, "activation_dim": D_IN, "dict_size": D_SAE}
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))
    with torch.no_grad():
        latents = theirs.encode(torch.from_numpy(rows))
        agree(interop.load(tmp_path), latents, theirs.decode(latents), rows)


@pytest.mark.parametrize("name", [name for name in EXPORTED if name not in ("abs_topk", "matching_pursuit")])
def test_dictionary_learning_reads_what_we_write(name, trained, rows, tmp_path):
    reader = pytest.importorskip("dictionary_learning.utils")
    theirs, _ = reader.load_dictionary(str(interop.export(trained(name), tmp_path, "dictionary_learning")), "cpu")
    with torch.no_grad():
        latents = theirs.encode(torch.from_numpy(rows))
        agree(interop.load(tmp_path), latents, theirs.decode(latents), rows)
        np.testing.assert_allclose(theirs(torch.from_numpy(rows)).numpy(), trained(name)(rows), rtol=1e-4, atol=1e-4)


def test_sparsify_both_ways(trained, rows, tmp_path):
    sparsify = pytest.importorskip("sparsify.sparse_coder")
    settings = pytest.importorskip("sparsify.config")
    x = torch.from_numpy(rows)
    theirs = randomised(sparsify.SparseCoder(D_IN, settings.SparseCoderConfig(k=K, num_latents=D_SAE)))
    theirs.save_to_disk(tmp_path / "theirs")
    back = sparsify.SparseCoder.load_from_disk(interop.export(trained("topk"), tmp_path / "ours", "sparsify"))
    for module, folder in ((theirs, "theirs"), (back, "ours")):
        with torch.no_grad():
            values, indices, _ = module.encode(x)
            latents = torch.zeros(len(x), D_SAE).scatter_(1, indices, values)
            agree(interop.load(tmp_path / folder), latents, module.decode(values, indices), rows)


def test_groups_of_sparsify_are_refused(tmp_path):
    sparsify = pytest.importorskip("sparsify.sparse_coder")
    settings = pytest.importorskip("sparsify.config")
    config = settings.SparseCoderConfig(k=K, num_latents=D_SAE, activation="groupmax")
    sparsify.SparseCoder(D_IN, config).save_to_disk(tmp_path)
    with pytest.raises(UserError, match="activation must be"):
        interop.load(tmp_path)


@pytest.mark.parametrize("normalize", ["layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu"])
def test_saelens_normalises_rows_as_we_do(architecture, normalize, rows, tmp_path):
    sae_lens = pytest.importorskip("sae_lens")
    saelens_training(architecture, normalize_activations=normalize).save_inference_model(tmp_path)
    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    with torch.no_grad():
        latents = theirs.encode(torch.from_numpy(rows))
        agree(interop.load(tmp_path), latents, theirs.decode(latents), rows)


@pytest.mark.parametrize(
    "architecture", ["transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"]
)
def test_transcoders_of_saelens_both_ways(architecture, rows, tmp_path):
    registry = pytest.importorskip("sae_lens.registry")
    sae_lens = pytest.importorskip("sae_lens")
    kind, config = registry.get_sae_class(architecture)
    theirs = randomised(kind(config(d_in=D_IN, d_out=5, d_sae=D_SAE, apply_b_dec_to_input=False)))
    theirs.save_model(tmp_path / "theirs")
    ours = interop.load(tmp_path / "theirs")
    back = sae_lens.SAE.load_from_disk(interop.export(ours, tmp_path / "ours"))
    x = torch.from_numpy(rows)
    with torch.no_grad():
        agree(ours, theirs.encode(x), theirs(x), rows)
        agree(interop.load(tmp_path / "ours"), back.encode(x), theirs(x), rows)


@pytest.mark.parametrize(("skip", "transcode"), [(True, True), (False, True), (True, False)])
def test_transcoders_of_sparsify_both_ways(skip, transcode, rows, tmp_path):
    sparsify = pytest.importorskip("sparsify.sparse_coder")
    settings = pytest.importorskip("sparsify.config")
    config = settings.SparseCoderConfig(k=K, num_latents=D_SAE, skip_connection=skip, transcode=transcode)
    theirs, x = randomised(sparsify.SparseCoder(D_IN, config)), torch.from_numpy(rows)
    theirs.save_to_disk(tmp_path / "theirs")
    ours = interop.load(tmp_path / "theirs")
    back = sparsify.SparseCoder.load_from_disk(interop.export(ours, tmp_path / "ours", "sparsify"))
    for module, sae in ((theirs, ours), (back, interop.load(tmp_path / "ours"))):
        with torch.no_grad():
            values, indices, _ = module.encode(x)
            latents = torch.zeros(len(x), D_SAE).scatter_(1, indices, values)
            agree(sae, latents, theirs(x).sae_out, rows)
