"""One small instance of every architecture and data for it; a new architecture enters the tests here."""

import jax
import numpy as np
import pytest

from saejax import sae

D_IN, D_SAE, K, B = 16, 64, 4, 48

EXAMPLES = {
    "topk": sae.TopK(d_in=D_IN, d_sae=D_SAE, k=K, k_aux=8),
    "l1": sae.L1(d_in=D_IN, d_sae=D_SAE, l1_coef=0.3, l1_warmup_steps=10, decoder_init_norm=0.7),
}


@pytest.fixture(params=sae.ARCHITECTURES)
def sparsifier(request):
    """Every registered architecture; a missing example is a failure, not a gap."""
    return EXAMPLES[request.param]


@pytest.fixture
def params(sparsifier):
    """Initial parameters with all biases moved off zero."""
    start = sparsifier.init(jax.random.key(0))
    rng = np.random.default_rng(1)
    return start.replace(
        b_enc=jax.numpy.asarray(0.1 * rng.standard_normal(D_SAE), "float32"),
        b_dec=jax.numpy.asarray(0.1 * rng.standard_normal(D_IN), "float32"),
    )


@pytest.fixture
def x():
    """Rows with E||x||^2 = D_IN, not centred."""
    rng = np.random.default_rng(2)
    return jax.numpy.asarray(rng.standard_normal((B, D_IN)) + 0.2, "float32")
