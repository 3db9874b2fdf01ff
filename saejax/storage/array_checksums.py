"""Checksums of arrays that are the same on one device and on any mesh.

Every saved array carries them and every load compares them, because a checkpoint with flipped bits loads without an
error. They are sums of 32-bit words modulo 2^32: devices add up their parts in any order, and no array is gathered or
copied to the host.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, UInt32


def of(tree: Any) -> dict[str, str]:
    """Returns a checksum of every array of a tree, by its path.

    Two sums over the words w_i of an array, 8 hexadecimal digits each, behind its dtype and shape:

    .. math:: \\sum_i (2 i + 1) w_i \\bmod 2^{32}, \\qquad \\sum_i \\mathrm{mix}(w_i + i\\, c) \\bmod 2^{32}

    The first changes with every single bit, because odd numbers have an inverse. The second mixes its words (finaliser
    of MurmurHash3, Appleby), so any other change passes with a probability of about 2^-32 or less.

    Args:
      tree: Arrays of any dtype up to 32 bits, keys among them, on any devices. Dicts and dataclasses of the same
        names have the same paths.

    Examples:
      >>> of({"a": {"b": jnp.arange(3.0)}})
      {'a/b': 'float32[3] fe80000001af5f1f'}
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    sums = jax.device_get([_sums(_words(leaf)) for _, leaf in leaves])
    found = {}
    for (path, leaf), (first, second) in zip(leaves, sums, strict=True):
        shape = ",".join(map(str, leaf.shape))
        found[name(path)] = f"{leaf.dtype}[{shape}] {first:08x}{second:08x}"
    return found


def differences(expected: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """Returns the paths among `found` whose checksum is not the one expected."""
    return [path for path, value in found.items() if expected.get(path) != value]


def name(path: Sequence[Any]) -> str:
    """The name of a leaf: the keys of its tree path, joined by slashes."""
    return "/".join(map(_name, path))


def _name(key: Any) -> str:
    for attribute in ("name", "key", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def _words(leaf: Array) -> Array:
    """The array, keys as their words."""
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if is_key else leaf


@jax.jit
def _sums(array: Array) -> UInt32[Array, " words"]:
    if array.dtype == jnp.bool_:
        words = array.astype(jnp.uint32)
    else:
        bits = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize]
        words = lax.bitcast_convert_type(array, bits).astype(jnp.uint32)
    index = jnp.zeros(array.shape, jnp.uint32)
    for axis in range(array.ndim):
        stride = jnp.uint32(math.prod(array.shape[axis + 1 :]) % 2**32)
        index += lax.broadcasted_iota(jnp.uint32, array.shape, axis) * stride
    weighted = words * (index * jnp.uint32(2) + jnp.uint32(1))
    mixed = words + index * jnp.uint32(0x9E3779B9)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
    mixed = mixed ^ (mixed >> 16)
    return jnp.stack([jnp.sum(weighted, dtype=jnp.uint32), jnp.sum(mixed, dtype=jnp.uint32)])
