"""Two tiny architectures, one for each kind of encoding, written out so that nothing but the metrics is under test."""

import dataclasses
from types import SimpleNamespace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax.sae import base


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dense(base.Sparsifier):
    """relu(x W_enc + b_enc), returned dense."""

    name: ClassVar[str] = "test-dense"

    def init(self, key):
        k_enc, k_dec, k_bias = jax.random.split(key, 3)
        return base.SAEParams(
            W_enc=jax.random.normal(k_enc, (self.d_in, self.d_sae)) / self.d_in**0.5,
            b_enc=-0.5 * jnp.ones(self.d_sae),
            W_dec=jax.random.normal(k_dec, (self.d_sae, self.d_in)) / self.d_sae**0.5,
            b_dec=jax.random.normal(k_bias, (self.d_in,)),
        )

    def encode(self, params, x):
        return base.Encoding(latents=jax.nn.relu(x @ params.W_enc + params.b_enc[None, :]), d_sae=self.d_sae)

    def decode(self, params, encoding):
        return encoding.dense() @ params.W_dec + params.b_dec[None, :]

    def activate(self, params, pre_acts, step=None):
        raise NotImplementedError

    def objective(self, params, x, step):
        raise NotImplementedError

    def fold(self, params, *, mean, scale):
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sparse(Dense):
    """The `k` largest of the same latents, returned as values and indices."""

    name: ClassVar[str] = "test-sparse"
    k: int = 3

    def encode(self, params, x):
        values, indices = jax.lax.top_k(super().encode(params, x).latents, self.k)
        return base.Encoding(values=values, indices=indices, d_sae=self.d_sae)


def _make_sae(kind: str = "dense", *, d_in: int = 6, d_sae: int = 16, k: int = 3, **params) -> SimpleNamespace:
    """What the evaluation asks of an SAE: its config and its parameters, some of them replaced."""
    sparsifier = Dense(d_in=d_in, d_sae=d_sae) if kind == "dense" else Sparse(d_in=d_in, d_sae=d_sae, k=k)
    drawn = sparsifier.init(jax.random.key(0))
    return SimpleNamespace(config=sparsifier, params=drawn.replace(**params))


def _forward(sae, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Latents and reconstructions in float64, by numpy."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), sae.params)
    latents = np.maximum(x.astype(np.float64) @ p.W_enc + p.b_enc, 0.0)
    if isinstance(sae.config, Sparse):
        lowest = np.argsort(-latents, axis=1)[:, sae.config.k :]
        np.put_along_axis(latents, lowest, 0.0, axis=1)
    return latents, latents @ p.W_dec + p.b_dec


@pytest.fixture(scope="session")
def make_sae():
    """make_sae("dense" | "sparse", d_in=, d_sae=, k=, W_dec=...) -> an SAE."""
    return _make_sae


@pytest.fixture(scope="session")
def forward():
    """forward(sae, x) -> (latents, recon), the ground truth."""
    return _forward


@pytest.fixture(params=["dense", "sparse"])
def sae(request):
    """One SAE with d_in 6 and d_sae 16 for each kind of encoding."""
    return _make_sae(request.param)


@pytest.fixture
def rows():
    """211 rows (prime, so every batch size needs padding) of width 6, float32, away from the origin."""
    return (np.random.default_rng(0).standard_normal((211, 6)) + 0.7).astype(np.float32)
