"""Dense products in the precision the config names: operands in one dtype, results always float32."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def matmul(a: Float[Array, "m n"], b: Float[Array, "n p"], dtype: str) -> Float[Array, "m p"]:
    """Returns `a @ b` with operands rounded to `dtype`, summed and returned in float32; so are its gradients.

    A bfloat16 product must not return bfloat16: on CPU that falls off the fast path.
    """
    return _matmul(a, b, dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _matmul(a, b, dtype) -> jax.Array:
    return _product(a, b, dtype)


def _product(a, b, dtype):
    return jnp.matmul(a.astype(dtype), b.astype(dtype), preferred_element_type=jnp.float32)


def _forward(a, b, dtype):
    return _product(a, b, dtype), (a, b)


def _backward(dtype, saved, cotangent):
    a, b = saved
    return _product(cotangent, b.T, dtype), _product(a.T, cotangent, dtype)


_matmul.defvjp(_forward, _backward)
