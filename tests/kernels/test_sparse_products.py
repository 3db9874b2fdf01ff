"""Sparse products and their gradients against the dense algebra, on every mesh and in every form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax.kernels import choice, matmul, sparse_decode, sparse_encode

B, K, D_SAE, D_IN = 16, 4, 48, 8
# Sums of at most B * K = 64 products of O(1) numbers: 64 eps(float32) = 8e-6, doubled for either order.
TOLERANCE = {"rtol": 0, "atol": 2e-5}


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    indices = np.argsort(rng.random((B, D_SAE)), axis=1)[:, :K].astype(np.int32)
    indices[0, 1] = indices[0, 0]  # a repeat adds up
    return (
        jnp.asarray(rng.standard_normal((B, K)), jnp.float32),
        jnp.asarray(indices),
        jnp.asarray(rng.standard_normal((D_SAE, D_IN)), jnp.float32),
        jnp.asarray(rng.standard_normal((B, D_IN)), jnp.float32),
    )


@jax.jit
def dense_code(values, indices):
    return jnp.zeros((values.shape[0], D_SAE)).at[jnp.arange(values.shape[0])[:, None], indices].add(values)


def test_decode_and_its_gradients_equal_the_dense_product(mesh, problem):
    values, indices, W, cotangent = problem

    def sparse(values, W):
        return jnp.sum(sparse_decode.sparse_decode(values, indices, W) * cotangent)

    def dense(values, W):
        return jnp.sum((dense_code(values, indices) @ W) * cotangent)

    recon = jax.jit(sparse_decode.sparse_decode)(values, indices, W)
    grads = jax.jit(jax.grad(sparse, argnums=(0, 1)))(values, W)
    np.testing.assert_allclose(recon, dense_code(values, indices) @ W, **TOLERANCE)
    for mine, expected in zip(grads, jax.jit(jax.grad(dense, argnums=(0, 1)))(values, W), strict=True):
        np.testing.assert_allclose(mine, expected, **TOLERANCE)


def test_squared_error_and_its_gradients_equal_the_dense_form(mesh, problem):
    values, indices, W, y = problem

    def sparse(values, W, y):
        return sparse_decode.squared_error(values, indices, W, y)[0]

    def dense(values, W, y):
        return jnp.mean(jnp.sum((y - dense_code(values, indices) @ W) ** 2, axis=1))

    error, residual = jax.jit(sparse_decode.squared_error)(values, indices, W, y)
    np.testing.assert_allclose(residual, y - dense_code(values, indices) @ W, **TOLERANCE)
    np.testing.assert_allclose(error, dense(values, W, y), rtol=1e-6)
    grads = jax.jit(jax.grad(sparse, argnums=(0, 1, 2)))(values, W, y)
    for mine, expected in zip(grads, jax.jit(jax.grad(dense, argnums=(0, 1, 2)))(values, W, y), strict=True):
        np.testing.assert_allclose(mine, expected, **TOLERANCE)


@pytest.mark.parametrize("b", [1, 15, 16, 50])
def test_squared_error_of_any_number_of_rows(b):
    rng = np.random.default_rng(b)
    indices = rng.integers(0, D_SAE, (b, K)).astype(np.int32)
    values, y, W = (rng.standard_normal(size).astype(np.float32) for size in ((b, K), (b, D_IN), (D_SAE, D_IN)))
    (error, residual), grad = jax.jit(jax.value_and_grad(sparse_decode.squared_error, has_aux=True))(
        *map(jnp.asarray, (values, indices, W, y))
    )
    wanted = y - np.einsum("bk,bkd->bd", values, W[indices])
    np.testing.assert_allclose(residual, wanted, **TOLERANCE)
    np.testing.assert_allclose(error, np.mean(np.sum(wanted**2, axis=1)), rtol=1e-5)
    np.testing.assert_allclose(grad, -2 / b * np.einsum("bd,bkd->bk", wanted, W[indices]), **TOLERANCE)


def test_latents_are_sorted_alike_in_one_word_and_in_two():
    indices = jnp.asarray(np.random.default_rng(0).integers(0, D_SAE, (50, K)), jnp.int32)
    one, two = sparse_decode._by_latent(indices, D_SAE), sparse_decode._by_latent(indices, 2**31)
    wanted = np.argsort(np.asarray(indices).reshape(-1), kind="stable")
    for latents, places in (one, two):
        np.testing.assert_array_equal(places, wanted)
        np.testing.assert_array_equal(latents, np.asarray(indices).reshape(-1)[wanted])


def test_cpu_and_accelerator_forms_agree(problem):
    values, indices, W, y = problem
    zeros = jnp.zeros_like(W)
    args = {"decode": (values, indices, W), "dot": (y, indices, W), "accumulate": (zeros, values, indices, y)}
    for operation, (dense, cpu, accelerator, _) in sparse_decode._FORMS.items():
        for form in (dense, cpu):
            np.testing.assert_allclose(form(*args[operation.name]), accelerator(*args[operation.name]), **TOLERANCE)


@pytest.mark.parametrize("form", ["dense", "sparse", "decode=dense", "accumulate=dense"])
def test_the_user_chooses_the_form(mesh, problem, form):
    values, indices, W, y = problem

    def error(values, W):
        return sparse_decode.squared_error(values, indices, W, y)[0]

    def dense(values, W):
        return jnp.mean(jnp.sum((y - dense_code(values, indices) @ W) ** 2, axis=1))

    wanted = jax.jit(jax.grad(dense, (0, 1)))(values, W)
    with choice.use(form):
        found = jax.jit(jax.grad(error, (0, 1)))(values, W)
    for mine, expected in zip(found, wanted, strict=True):
        np.testing.assert_allclose(mine, expected, **TOLERANCE)


def test_few_latents_per_slot_take_dense_products(problem):
    values, _, W, _ = problem
    assert sparse_decode._form(choice.Operation.dot, values, W.shape) is choice.Form.sparse  # 48 for 4
    assert sparse_decode._form(choice.Operation.dot, values, (32, 8)) is choice.Form.dense
    with choice.use("dot=sparse"):
        assert sparse_decode._form(choice.Operation.dot, values, (32, 8)) is choice.Form.sparse


@pytest.mark.parametrize("b", [1, 31, 33, 64])
def test_any_number_of_rows(b):
    rng = np.random.default_rng(b)
    indices = jnp.asarray(rng.integers(0, D_SAE, (b, K)), jnp.int32)
    y, W = jnp.asarray(rng.standard_normal((b, D_IN))), jnp.asarray(rng.standard_normal((D_SAE, D_IN)))
    expected = np.einsum("bd,bkd->bk", y, np.asarray(W)[np.asarray(indices)])
    np.testing.assert_allclose(sparse_decode.dot_rows(y, indices, W), expected, **TOLERANCE)


def test_encoder_gradient_equals_that_of_the_dense_chain(mesh, problem):
    _, indices, W_dec, x = problem
    indices = indices.at[0, 1].set((indices[0, 0] + 1) % D_SAE)
    rng = np.random.default_rng(1)
    weights = (
        x,
        W_dec.T,
        jnp.asarray(rng.standard_normal(D_SAE), jnp.float32),
        jnp.asarray(rng.standard_normal(D_IN), jnp.float32),
    )
    downstream = jnp.asarray(rng.standard_normal((B, K)), jnp.float32)

    def chosen(x, W_enc, b_enc, b_dec):
        pre_acts = (x - b_dec[None, :]) @ W_enc + b_enc[None, :]
        return jax.nn.relu(jnp.take_along_axis(pre_acts, indices, axis=1))

    def sparse(*weights):
        fixed = jax.lax.stop_gradient(chosen(*weights))
        return jnp.sum(sparse_encode.with_encoder_gradient(fixed, indices, *weights) * downstream)

    def dense(*weights):
        return jnp.sum(chosen(*weights) * downstream)

    assert 0 < np.mean(chosen(*weights) > 0) < 1  # both sides of the ReLU are there
    grads = jax.jit(jax.grad(sparse, argnums=(0, 1, 2, 3)))(*weights)
    for mine, expected in zip(grads, jax.jit(jax.grad(dense, argnums=(0, 1, 2, 3)))(*weights), strict=True):
        np.testing.assert_allclose(mine, expected, **TOLERANCE)


def test_pre_activations_are_the_affine_map(mesh, problem):
    _, _, W_dec, x = problem
    b_enc, b_dec = jnp.arange(D_SAE, dtype=jnp.float32) / D_SAE, jnp.ones(D_IN)
    out = jax.jit(sparse_encode.pre_activations, static_argnums=4)(x, W_dec.T, b_enc, b_dec, "float32")
    np.testing.assert_allclose(out, (x - 1) @ W_dec.T + b_enc[None, :], **TOLERANCE)


def test_bfloat16_product_rounds_operands_only(problem):
    _, _, W, x = problem
    out = matmul.matmul(x, W.T, "bfloat16")
    rounded = np.asarray(x.astype("bfloat16"), np.float32) @ np.asarray(W.astype("bfloat16"), np.float32).T
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, rounded, **TOLERANCE)
    assert np.max(np.abs(out - x @ W.T)) > 1e-4  # the operands were rounded
    grad = jax.grad(lambda x: jnp.sum(matmul.matmul(x, W.T, "bfloat16") ** 2) / 2)(x)
    assert grad.dtype == jnp.float32
    np.testing.assert_allclose(grad, (x @ W.T) @ W, rtol=0.05, atol=0.5)  # bfloat16: 2^-8 per operand
    grad = jax.grad(lambda W: jnp.sum(matmul.matmul(x, W.T, "bfloat16") ** 2) / 2)(W)
    np.testing.assert_allclose(grad, (x @ W.T).T @ x, rtol=0.05, atol=0.5)
