"""The k-th largest of a whole array against NumPy's partition, on adversarial arrays and on every mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax.kernels import kth_largest

B, N = 8, 32


def array(kind):
    rng = np.random.default_rng(0)
    a = np.maximum(rng.standard_normal((B, N)), 0).astype(np.float32)
    match kind:
        case "ties":
            return rng.integers(0, 4, (B, N)).astype(np.float32)
        case "zeros":
            return np.zeros((B, N), np.float32)
        case "few positives":
            return np.where(np.arange(B * N).reshape(B, N) % 50 == 0, a + 1, 0)
        case "infinity":
            a[0, :3] = np.inf
        case "all magnitudes":  # from the smallest normal number to the largest
            return np.exp(rng.uniform(-87.3, 88.7, (B, N))).astype(np.float32)
        case "neighbours":  # one unit in the last place apart
            return (
                (np.float32(1).view(np.int32) + rng.permutation(B * N).reshape(B, N)).astype(np.int32).view(np.float32)
            )
    return a


KINDS = ["relu", "ties", "zeros", "few positives", "infinity", "all magnitudes", "neighbours"]


def test_equals_a_partition(mesh):
    found = jax.jit(lambda a, k: kth_largest.kth_largest(a, k), static_argnums=1)
    for k in (1, 3, 40, B * N):
        for kind in KINDS:
            a = array(kind)
            expected = np.partition(a.ravel(), B * N - k)[B * N - k]
            placed = a if mesh is None else jax.device_put(a, jax.NamedSharding(
                jax.sharding.get_mesh(), jax.P("data", "latent")))  # fmt: skip
            value = np.asarray(found(placed, k))
            assert value == expected, (kind, k)
            assert np.sum(a >= value) >= k > np.sum(a > value)


def test_no_gradient():
    a = jnp.asarray(array("relu"))
    assert not np.any(jax.grad(lambda a: kth_largest.kth_largest(a, 5))(a))


@pytest.mark.parametrize("k", [0, B * N + 1])
def test_k_out_of_range_is_refused(k):
    with pytest.raises(ValueError, match=r"k must be in \[1, 256\]"):
        kth_largest.kth_largest(jnp.zeros((B, N)), k)
