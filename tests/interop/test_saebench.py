"""The SAEBench adapter: what its BaseSAE promises, and the latents and reconstructions of our SAE."""

import dataclasses

import numpy as np
import pytest

from saejax.errors import UserError
from saejax.sae import SAE

torch = pytest.importorskip("torch")
from saejax.interop import saebench  # noqa: E402

NAMES = ["l1", "p_anneal", "topk", "abs_topk", "batch_topk", "jumprelu", "gated", "matryoshka", "matryoshka_topk"]
NAMES += ["matching_pursuit"]


@pytest.mark.parametrize("name", NAMES)
def test_latents_and_reconstructions_are_those_of_our_sae(name, trained, rows):
    ours = trained(name)
    theirs = saebench.adapter(ours)
    norms = np.linalg.norm(ours.params.W_dec, axis=1)
    for x in (rows, rows.reshape(4, 16, -1)):
        latents, recon = np.asarray(ours.encode(x)) * norms, np.asarray(ours(x))
        assert (latents != 0).any() and (latents == 0).any()
        np.testing.assert_allclose(theirs.encode(torch.tensor(x)), latents, atol=1e-5 * np.abs(latents).max())
        np.testing.assert_allclose(theirs(torch.tensor(x)), recon, atol=1e-5 * np.abs(recon).max())
    assert theirs.check_decoder_norms()


@pytest.mark.parametrize("name", ["topk", "abs_topk"])
def test_uneven_decoder_rows_keep_the_choice_of_top_k(name, trained, rows):
    ours = trained(name, unit_decoder=False)
    scale = np.linspace(0.1, 3, 20, dtype=np.float32)[:, None]
    ours = SAE(ours.sparsifier, dataclasses.replace(ours.params, W_dec=ours.params.W_dec * scale), ours.provenance)
    theirs = saebench.adapter(ours)
    assert theirs.check_decoder_norms()
    recon = np.asarray(ours(rows))
    np.testing.assert_allclose(theirs(torch.tensor(rows)), recon, atol=1e-5 * np.abs(recon).max())


def test_fields_that_saebench_reads(trained):
    sae = saebench.adapter(trained("jumprelu"), model_name="pythia-70m", context_size=64)
    assert sae.W_enc.shape == (6, 20) and sae.W_dec.shape == (20, 6)
    assert sae.b_enc.shape == (20,) and sae.b_dec.shape == (6,)
    assert all(isinstance(getattr(sae, w), torch.nn.Parameter) for w in ("W_enc", "W_dec", "b_enc", "b_dec"))
    assert (sae.cfg.model_name, sae.cfg.hook_name, sae.cfg.hook_layer) == ("pythia-70m", "blocks.3.hook_resid_post", 3)
    assert (sae.cfg.d_in, sae.cfg.d_sae, sae.cfg.context_size, sae.cfg.hook_head_index) == (6, 20, 64, None)
    assert sae.cfg.architecture == sae.cfg.architecture_str == "jumprelu"
    assert sae.cfg.to_dict()["dtype"] == "float32" and sae.device == torch.device("cpu")
    sae.to(dtype=torch.bfloat16)
    assert sae.dtype == torch.bfloat16 and sae.cfg.dtype == "bfloat16" and sae.threshold.dtype == torch.bfloat16
    assert sae.check_decoder_norms()
    assert sae.to(torch.float64).dtype == torch.float64  # the positional form


def test_what_cannot_be_adapted_is_one_line(trained):
    nameless = dataclasses.replace(trained("topk"), provenance={})
    with pytest.raises(UserError, match="does not know its model; give model_name="):
        saebench.adapter(nameless)
    with pytest.raises(UserError, match="hook_name must be blocks"):
        saebench.adapter(nameless, model_name="m", hook_name="layers.3")
    sae = trained("topk")
    zero = dataclasses.replace(sae.params, W_dec=sae.params.W_dec.at[4].set(0))
    with pytest.raises(UserError, match="1 decoder rows are zero"):
        saebench.adapter(dataclasses.replace(sae, params=zero))


def test_without_torch_there_is_one_line(trained, monkeypatch):
    monkeypatch.setattr(saebench, "HAS_TORCH", False)
    with pytest.raises(UserError, match=r"torch is missing.*saejax\[torch\]"):
        saebench.adapter(trained("topk"))
