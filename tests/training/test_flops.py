"""What a step costs against what XLA counts for the plain dense program, and the table of peaks."""

import jax
import jax.numpy as jnp
import pytest

from saejax.sae import base
from saejax.sae.batch_topk import BatchTopK
from saejax.sae.gated import Gated
from saejax.sae.l1 import L1
from saejax.sae.matching_pursuit import MatchingPursuit
from saejax.sae.topk import TopK
from saejax.training import flops

D_IN, D_SAE, BATCH = 96, 512, 256
SIZES = {"d_in": D_IN, "d_sae": D_SAE}


def counted(sparsifier: base.Sparsifier) -> float:
    """Operations that XLA counts in loss and gradients."""
    params = jax.eval_shape(sparsifier.init, jax.random.key(0))
    rows = jax.ShapeDtypeStruct((BATCH, D_IN), jnp.float32)
    dead, step = jax.ShapeDtypeStruct((D_SAE,), bool), jax.ShapeDtypeStruct((), jnp.int32)

    def loss(params, rows, dead, step):
        return sparsifier.loss(params, rows, dead=dead, step=step)[0]

    cost = jax.jit(jax.value_and_grad(loss)).lower(params, rows, dead, step).compile().cost_analysis()
    return cost["flops"]


def test_dense_steps_are_what_xla_counts():
    """Elementwise work, left out of the formula, is a few dozen operations per latent against 5 x 2 x 96.

    The program of `gated` makes the encoder product and its gradient twice, 2 of its 9 products.
    """
    dense, gated = L1(**SIZES, aux_alpha=0.0), Gated(**SIZES, aux_alpha=0.0)
    assert 1 <= counted(dense) / flops.per_step(dense, BATCH) < 1.05
    assert 1 <= counted(gated) / flops.per_step(gated, BATCH) < 1.05 * 9 / 7


def test_sparse_steps_cost_one_product_and_their_share_of_the_others():
    product = 2 * BATCH * D_IN * D_SAE
    for cls in (TopK, BatchTopK):
        assert flops.per_step(cls(**SIZES, k=32), BATCH) == product * (1 + 4 * 32 / D_SAE)
        assert flops.per_step(cls(**SIZES, k=D_SAE), BATCH) == flops.per_step(L1(**SIZES), BATCH)
    assert flops.per_step(MatchingPursuit(**SIZES, k=8), BATCH) == product * (8 + 4 * 8 / D_SAE)
    mlp = TopK(**SIZES, k=32, encoder=base.EncoderKind.mlp, encoder_hidden=2 * D_IN, aux_alpha=0.0)
    assert flops.per_step(mlp, BATCH) > flops.per_step(TopK(**SIZES, k=32), BATCH)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H200", 9.89e14),
        ("NVIDIA H100 80GB HBM3", 9.89e14),
        ("NVIDIA H100 PCIe", 7.56e14),
        ("NVIDIA A100-SXM4-80GB", 3.12e14),
        ("NVIDIA L40S", 3.62e14),
        ("NVIDIA L40", 1.81e14),
        ("NVIDIA L4", 1.21e14),
        ("TPU v5 lite", 1.97e14),
        ("TPU v5p", 4.59e14),
        ("TPU v6 lite", 9.18e14),
        ("cpu", None),
        ("NVIDIA GeForce RTX 3090", None),
    ],
)
def test_a_device_is_found_by_how_its_kind_begins(kind, peak):
    assert flops.known_peak(kind) == peak


def test_the_utilisation_is_the_rate_over_the_peak():
    assert flops.Work(1e9, 4e10).rates(10.0) == {"model_flops_per_second": 1e10, "mfu": 0.25}
    assert flops.Work(1e9, None).rates(10.0) == {"model_flops_per_second": 1e10}


def test_an_unknown_peak_is_measured_only_when_asked():
    sparsifier = TopK(**SIZES, k=32)
    assert flops.work(sparsifier, BATCH, 8).peak is None
    measured = flops.work(sparsifier, BATCH, 8, measure=True).peak
    assert measured is not None and 1e8 < measured < 1e15
