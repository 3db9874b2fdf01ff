"""Signals over a known dictionary for the tests of the solvers; one shape, so that compilations are shared."""

import numpy as np
import pytest


class Problem:
    """Unit-norm Gaussian atoms, k-sparse positive codes and their signals, float32."""

    def __init__(self, *, n: int, d: int, b: int, k: int, noise: float, seed: int = 0):
        rng = np.random.default_rng(seed)
        atoms = rng.normal(size=(n, d))
        self.dictionary = (atoms / np.linalg.norm(atoms, axis=1, keepdims=True)).astype(np.float32)
        codes = np.zeros((b, n))
        for row in codes:
            row[rng.choice(n, k, replace=False)] = rng.uniform(0.5, 1.5, k)
        self.codes, self.k = codes, k
        self.y = (codes @ self.dictionary + noise * rng.normal(size=(b, d))).astype(np.float32)


@pytest.fixture(scope="session")
def noisy() -> Problem:
    """32 signals of 5 atoms out of 96 in 32 dimensions: hard enough that greedy choices go wrong."""
    return Problem(n=96, d=32, b=32, k=5, noise=0.05)


@pytest.fixture(scope="session")
def exact() -> Problem:
    """Noiseless signals that basis pursuit recovers."""
    return Problem(n=96, d=32, b=32, k=2, noise=0.0)
