"""Checksums see every change of bits, and no change of place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from saejax.parallel import sharding
from saejax.storage import array_checksums


def naive(words):
    """The two sums in arbitrary precision."""
    first = second = 0
    for i, w in enumerate(words):
        first += (2 * i + 1) * w
        h = (w + i * 0x9E3779B9) % 2**32
        h = (h ^ h >> 16) * 0x85EBCA6B % 2**32
        h = (h ^ h >> 13) * 0xC2B2AE35 % 2**32
        second += h ^ h >> 16
    return f"{first % 2**32:08x}{second % 2**32:08x}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool"])
def test_the_sums_are_those_of_the_formula(dtype):
    values = np.random.default_rng(0).integers(0, 2 if dtype == "bool" else 100, (3, 5, 2))
    array = jnp.asarray(values, dtype)
    raw = np.asarray(array)
    words = raw.ravel().view(f"u{raw.itemsize}").tolist()
    assert array_checksums.of({"a": array}) == {"a": f"{dtype}[3,5,2] {naive(words)}"}


def test_no_place_changes_a_checksum():
    mesh = sharding.make_mesh(4, 2)
    array = jax.random.normal(jax.random.key(0), (8, 6))
    expected = array_checksums.of([array])
    for spec in (P(), P("data"), P("latent", None), P("data", "latent"), P(None, ("latent",))):
        assert array_checksums.of([jax.device_put(array, NamedSharding(mesh, spec))]) == expected


def test_every_bit_counts_and_so_does_the_order():
    words = np.random.default_rng(1).integers(0, 2**32, 7, np.uint32)
    expected = array_checksums.of([words.view(np.float32)])
    for place in range(7 * 32):
        flipped = words.copy()
        flipped[place // 32] ^= np.uint32(1 << place % 32)
        assert array_checksums.differences(expected, array_checksums.of([flipped.view(np.float32)])) == ["0"]
    assert array_checksums.of([words[::-1].copy().view(np.float32)]) != expected
    assert array_checksums.of([words.view(np.float32).reshape(7, 1)]) != expected
    assert array_checksums.of([jnp.asarray([0.0])]) != array_checksums.of([jnp.asarray([-0.0])])
