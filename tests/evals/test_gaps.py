"""Gaps of inference, and counted work."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax.errors import UserError
from saejax.lab.metrics import flops, gaps
from saejax.lab.metrics.over import over


def test_gap_of_an_encoder_on_an_orthonormal_dictionary():
    """The best code is the soft threshold; keeping the projection costs lambda^2 / 2 per active latent."""
    rng = np.random.default_rng(0)
    z, l1_coef = (rng.random((50, 6)) + 0.5).astype(np.float32), 0.2
    D = np.linalg.qr(rng.standard_normal((6, 6)))[0].astype(np.float32)
    y = z @ D
    losses = [gaps.lasso_loss(y, codes, D, l1_coef) for codes in (z, z - l1_coef)]
    assert losses[0] == pytest.approx(np.full(50, 0.2 * z.sum(1)), rel=1e-4)
    batch = gaps.LossPairBatch(encoder=np.asarray(losses[0]), solver=np.asarray(losses[1]))
    result = over(gaps.AmortisationGap(), batch, rows=7)
    assert result["amortisation_gap"] == pytest.approx(6 * l1_coef**2 / 2, rel=1e-3)
    assert result["solver_worse_share"] == 0.0
    assert result["amortisation_gap_relative"] == pytest.approx(result["amortisation_gap"] / result["loss_solver"])


def test_a_solver_that_failed_is_seen():
    batch = gaps.LossPairBatch(encoder=np.ones(8, np.float32), solver=np.repeat(np.float32([0.5, 1.5]), [6, 2]))
    assert over(gaps.AmortisationGap(), batch)["solver_worse_share"] == 0.25


def test_gaps_add_up_to_what_is_missing():
    found = gaps.inference_gaps(0.6, 0.75, 0.98, name="code_mcc")
    assert sum(found.values()) == pytest.approx(0.38)
    assert found["dictionary_gap_code_mcc"] == pytest.approx(0.23)
    with pytest.raises(UserError, match="no score"):
        gaps.shift_gaps({"a": 1.0}, {"b": 1.0})


def test_counted_work_of_a_matrix_product():
    x, w = jax.ShapeDtypeStruct((12, 20), jnp.float32), jax.ShapeDtypeStruct((20, 30), jnp.float32)
    found = flops.inference_flops(lambda x, w: x @ w, x, w, rows=12)
    assert found["flops_per_row"] == 2 * 20 * 30 and found["loops"] == 0.0
    assert found["bytes_per_row"] >= 4 * (20 + 30)


def test_a_loop_is_announced():
    def looped(x, w, n):
        return jax.lax.fori_loop(0, n, lambda _, y: jnp.tanh(y @ w), x)

    x, w = jax.ShapeDtypeStruct((8, 20), jnp.float32), jax.ShapeDtypeStruct((20, 20), jnp.float32)
    assert flops.inference_flops(looped, x, w, jax.ShapeDtypeStruct((), jnp.int32), rows=8)["loops"] == 1.0
    with pytest.raises(UserError, match="rows must be at least 1"):
        flops.inference_flops(lambda x: x, x, rows=0)
