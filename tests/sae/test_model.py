"""The object that users hold: any leading shape, NumPy or JAX, wrong widths refused."""

import jax
import numpy as np
import pytest
from sae_examples import EXAMPLES

from saejax import sae


@pytest.fixture(params=["topk", "l1", "batch_topk"])
def sparsifier(request):
    """One k-sparse, one dense and one that depends on its state."""
    return EXAMPLES[request.param]


@pytest.fixture
def trained(sparsifier, params):
    return sae.SAE(sparsifier, params, {"hook": "blocks.0.hook_resid_post"})


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (0,)])
def test_leading_dimensions_are_kept(trained, lead):
    x = np.random.default_rng(0).standard_normal((*lead, 16)).astype(np.float32)
    latents = trained.encode(x)
    assert latents.shape == (*lead, 64)
    assert trained.decode(latents).shape == trained(x).shape == (*lead, 16)
    np.testing.assert_allclose(trained.decode(latents), trained(x), rtol=2e-5, atol=2e-5)


def test_encoding_and_its_dense_form_agree(trained, x):
    encoding = trained.encoding(x)
    np.testing.assert_array_equal(encoding.dense(), trained.encode(x))
    np.testing.assert_allclose(trained.decode(encoding), trained(x), rtol=2e-5, atol=2e-5)


def test_wrong_width_is_refused(trained):
    with pytest.raises(ValueError, match=r"the last dimension must be d_in=16, got shape \(2, 17\)"):
        trained.encode(np.zeros((2, 17)))
    with pytest.raises(ValueError, match=r"the last dimension must be d_sae=64, got shape \(2, 16\)"):
        trained.decode(np.zeros((2, 16)))


def test_config_params_provenance(trained, sparsifier):
    assert trained.config is sparsifier
    assert trained.provenance["hook"] == "blocks.0.hook_resid_post"
    assert trained.params.W_dec.shape == (64, 16)


def test_compiles_once_per_shape(trained, x):
    from saejax.sae import model

    trained(x)
    before = model._reconstruct._cache_size()
    trained(x)
    assert model._reconstruct._cache_size() == before
    jax.block_until_ready(trained(x))
