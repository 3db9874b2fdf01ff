"""SAEs of every architecture with parameters as after training: biases, thresholds, uneven decoder norms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax.sae import ARCHITECTURES, SAE, SAEParams, Selection

D_IN, D_SAE = 6, 20
FIELDS = {
    "topk": {"k": 4},
    "abs_topk": {"k": 4},
    "batch_topk": {"k": 4},
    "jumprelu": {"subtract_b_dec": False},
    "gated": {},
    "matryoshka": {"k": 4, "prefixes": (3, 9, 20)},
    "matryoshka_topk": {"k": 4, "prefixes": (3, 9, 20), "selection": Selection.topk},
    "matching_pursuit": {"k": 3},
    "l1": {},
    "p_anneal": {},
}
_FREE_NORMS = ("l1", "jumprelu", "batch_topk")


def _trained(name, **fields):
    keys = jax.random.split(jax.random.key(1), 6)
    W_dec = jax.random.normal(keys[0], (D_SAE, D_IN))
    W_dec = W_dec / jnp.linalg.norm(W_dec, axis=1, keepdims=True)
    if name in _FREE_NORMS:
        W_dec = W_dec * jnp.linspace(0.2, 3.0, D_SAE)[:, None]
        fields = {"unit_decoder": False} | fields
    tied = name == "matching_pursuit"
    extra = {
        "jumprelu": {"threshold": jax.random.uniform(keys[4], (D_SAE,)) * 2},
        "batch_topk": {"threshold": jnp.asarray(1.5)},
        "matryoshka": {"threshold": jnp.asarray(1.5)},
        "gated": {
            "r_mag": 0.3 * jax.random.normal(keys[4], (D_SAE,)),
            "b_mag": 0.3 * jax.random.normal(keys[5], (D_SAE,)),
        },
    }
    params = SAEParams(
        W_enc=W_dec.T if tied else jax.random.normal(keys[1], (D_IN, D_SAE)),
        b_enc=jnp.zeros(D_SAE) if tied else 0.3 * jax.random.normal(keys[2], (D_SAE,)),
        W_dec=W_dec,
        b_dec=jax.random.normal(keys[3], (D_IN,)),
        extra=extra.get(name, {}),
    )
    kind = ARCHITECTURES[name.removesuffix("_topk") if name.startswith("matryoshka") else name]
    origin = {"source": {"hook": "blocks.3.hook_resid_post", "model": {"name": "tiny"}}}
    return SAE(kind(d_in=D_IN, d_sae=D_SAE, **FIELDS[name] | fields), params, origin)


@pytest.fixture(scope="session")
def trained():
    """A function of an architecture's name (and changed fields) that returns an SAE."""
    return _trained


@pytest.fixture(scope="session")
def rows():
    """64 rows whose mean is not 0."""
    return np.random.default_rng(0).normal(size=(64, D_IN)).astype(np.float32) * 3 + 1
