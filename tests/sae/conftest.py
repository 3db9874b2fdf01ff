"""Every architecture with its parameters, and data for it."""

import jax
import numpy as np
import pytest
from sae_examples import D_IN, EXAMPLES, VARIANTS, B, moved


@pytest.fixture(params=[*EXAMPLES, *VARIANTS])
def sparsifier(request):
    """Every registered architecture and variants."""
    return (EXAMPLES | VARIANTS)[request.param]


@pytest.fixture
def params(sparsifier):
    """Initial parameters with all biases moved off zero."""
    return moved(sparsifier.init(jax.random.key(0)))


@pytest.fixture
def x(request):
    """Rows with E||x||^2 = d_row, not centred; as wide as the architecture needs where the test has one."""
    width = request.getfixturevalue("sparsifier").d_row if "sparsifier" in request.fixturenames else D_IN
    rng = np.random.default_rng(2)
    return jax.numpy.asarray(rng.standard_normal((B, width)) + 0.2, "float32")
