"""Top-k against a stable full sort, on every mesh, with and without ties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax.kernels import top_k


def brute_force(a, k):
    indices = np.argsort(-a, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(a, indices, axis=1), indices


def rows(kind, b, n):
    rng = np.random.default_rng(b + n)
    if kind == "distinct":
        return rng.standard_normal((b, n)).astype(np.float32)
    if kind == "ties":
        return rng.integers(-2, 3, (b, n)).astype(np.float32)
    return np.full((b, n), -1.0, np.float32)


@pytest.mark.parametrize("kind", ["distinct", "ties", "all equal"])
@pytest.mark.parametrize(
    ("b", "n", "k"),
    [
        (16, 64, 5),
        (16, 64, 20),  # more than one of eight shards holds
        (8, 64, 64),
        (8, 2048, 3),  # by groups, on one device and on eight
        (7, 30, 4),  # divides over no mesh
    ],
)
def test_equals_a_stable_sort(mesh, kind, b, n, k):
    a = rows(kind, b, n)
    values, indices = jax.jit(top_k.top_k, static_argnums=1)(jnp.asarray(a), k)
    expected_values, expected_indices = brute_force(a, k)
    np.testing.assert_array_equal(indices, expected_indices)
    np.testing.assert_array_equal(values, expected_values)
    assert indices.dtype == jnp.int32


def test_groups_are_used_and_agree_with_the_plain_form():
    a = jnp.asarray(rows("ties", 4, 4096))
    for mine, plain in zip(top_k._by_groups(a, 32), top_k._barrier_top_k(a, 32), strict=True):
        np.testing.assert_array_equal(mine, plain)


@pytest.mark.parametrize(
    ("equal", "ties_decide"),
    [
        ((), False),
        ((100, 900), False),  # a pair in two groups
        ((900, 901), True),  # one group
        ((100, 500, 900), True),
        ((1, 100, 500, 900), True),
    ],
)
def test_pairs_that_are_equal_do_not_need_the_slower_form(equal, ties_decide):
    a = np.random.default_rng(0).permutation(8 * 1024).reshape(8, 1024).astype(np.float32)
    a[3, list(equal)] = 1e4
    exact, values, indices = top_k._among_unequal(jnp.asarray(a).reshape(8, 64, 16), 4)
    assert bool(exact) is not ties_decide
    for found in (top_k._by_groups(jnp.asarray(a), 4), *([] if ties_decide else [(values, indices)])):
        for mine, expected in zip(found, brute_force(a, 4), strict=True):
            np.testing.assert_array_equal(mine, expected)


@pytest.mark.parametrize("last", ["in a chosen group", "in a group left out"])
def test_a_tie_at_the_end_needs_the_slower_form(last):
    a = np.arange(4 * 1024, dtype=np.float32).reshape(4, 1024)[:, ::-1].copy()
    a[:, 64:] -= 1e4
    a[2, 3] = a[2, 1] = 5e4  # the second group's maximum comes after both
    a[2, 16 if last == "in a chosen group" else 700] = 6e4
    a[2, 300] = 5e4
    assert not top_k._among_unequal(jnp.asarray(a).reshape(4, 64, 16), 2)[0]
    for mine, expected in zip(top_k._by_groups(jnp.asarray(a), 2), brute_force(a, 2), strict=True):
        np.testing.assert_array_equal(mine, expected)


def test_many_rows_are_cut_into_calls():
    a = rows("ties", top_k._CALLS * top_k._ROWS + 5, 128)
    for mine, expected in zip(top_k._side_by_side(jnp.asarray(a), 7), brute_force(a, 7), strict=True):
        np.testing.assert_array_equal(mine, expected)


def test_no_gradient_flows_through_the_selection():
    a = jnp.asarray(rows("distinct", 4, 16))
    assert not np.any(jax.grad(lambda a: jnp.sum(top_k.top_k(a, 3)[0]))(a))


@pytest.mark.parametrize("k", [0, 17])
def test_k_out_of_range_is_refused(k):
    with pytest.raises(ValueError, match=r"k must be in \[1, 16\]"):
        top_k.top_k(jnp.zeros((2, 16)), k)
