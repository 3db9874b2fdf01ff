"""Additivity and binding: maps that add exactly, maps that do not, and brute force."""

import numpy as np
import pytest

from saejax.errors import UserError
from saejax.lab.metrics import additivity, binding, over

RNG = np.random.default_rng(0)
WEIGHTS, BIAS = RNG.standard_normal((5, 8)), RNG.standard_normal(8)
A, B = RNG.standard_normal((2, 120, 5))


def cosines(a, b):
    """All cosines of rows of a with rows of b, float64."""
    return (a @ b.T) / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)[None, :]


def report(f):
    return additivity.additivity(f(A), f(B), f(A + B), f(np.zeros((1, 5)))[0])


def affine(x):
    return x @ WEIGHTS + BIAS


def relu(x):
    return np.maximum(affine(x), 0.05 * affine(x))


def test_an_affine_map_adds_exactly():
    result = report(affine)
    for key in ("additivity_r2", "additivity_cos_blank_centred", "additivity_cos_mean_centred"):
        assert result[key] == pytest.approx(1.0, abs=1e-6)
    assert result["additivity_retrieval"] == 1.0
    assert result["additivity_retrieval_chance"] == 1 / 120
    # The raw cosine is the one that a constant part spoils.
    assert result["additivity_cos_raw"] < 0.99
    assert result["additivity_cos_blank_centred_single"] < 0.9
    assert abs(result["additivity_cos_blank_centred_shuffled"]) < 0.05


def test_against_brute_force():
    result = report(relu)
    a, b, ab, blank = relu(A), relu(B), relu(A + B), relu(np.zeros((1, 5)))
    error = (ab - blank) - (a - blank) - (b - blank)
    assert result["additivity_r2"] == pytest.approx(1 - (error**2).sum() / ((ab - ab.mean(0)[None]) ** 2).sum(), 1e-5)
    centres = {"raw": (0, 0, 0), "blank_centred": (blank,) * 3}
    centres["mean_centred"] = tuple(v.mean(0)[None, :] for v in (a, b, ab))
    for name, (ca, cb, cab) in centres.items():
        table = cosines((a - ca) + (b - cb), ab - cab)
        single = np.maximum(np.diag(cosines(a - ca, ab - cab)), np.diag(cosines(b - cb, ab - cab)))
        assert result[f"additivity_cos_{name}"] == pytest.approx(np.diag(table).mean(), rel=1e-5)
        off = table[~np.eye(len(table), dtype=bool)].mean()
        assert result[f"additivity_cos_{name}_shuffled"] == pytest.approx(off, abs=1e-6)
        assert result[f"additivity_cos_{name}_single"] == pytest.approx(single.mean(), rel=1e-5)
    nearest = cosines(a + b - 2 * blank, ab - blank).argmax(1)
    assert result["additivity_retrieval"] == pytest.approx((nearest == np.arange(len(a))).mean())


def test_a_network_that_sees_nothing_is_at_chance():
    """One constant output: every pair ties with every other, and no cosine about the centre is left."""
    result = report(lambda x: np.ones((len(x), 3)))
    assert result["additivity_retrieval"] == pytest.approx(result["additivity_retrieval_chance"])
    assert result["additivity_cos_blank_centred"] == result["additivity_cos_mean_centred"] == 0
    assert result["additivity_cos_raw"] == pytest.approx(1.0) == result["additivity_cos_raw_shuffled"]
    assert np.isnan(result["additivity_r2"])


def test_unrelated_outputs_have_no_r2():
    result = report(lambda x: np.random.default_rng(int(1e6 * abs(x[0, 0]))).standard_normal((len(x), 40)))
    assert result["additivity_r2"] < -1
    assert result["additivity_retrieval"] < 0.1
    assert abs(result["additivity_cos_raw"]) < 0.1


def test_row_ids_must_be_distinct():
    batch = additivity.PairBatch(f_a=A, f_b=A, f_ab=A, row_id=np.zeros(len(A), int), f_blank=BIAS[:5])
    with pytest.raises(UserError, match="row_id must be distinct"):
        over.over(additivity.AdditivityRetrieval(), batch)


def scenes(n=60, m=6):
    """Vectors for a, b (roles) and x, y (fillers), one set for each row."""
    return np.random.default_rng(1).standard_normal((4, n, m))


def test_a_sum_of_parts_binds_nothing():
    a, b, x, y = scenes()
    result = over.over(binding.Binding(), binding.SwapBatch(f_bound=a + x + b + y, f_swapped=a + y + b + x))
    assert result["binding_distance"] <= 1e-6 and result["binding_distance_rms"] <= 1e-6
    assert result["binding_distance_rms_shuffled"] == pytest.approx(2**0.5, rel=0.1)


def test_tensor_products_bind():
    """Roles and fillers are random: |a x + b y - a y - b x|^2 / |a x + b y|^2 is near 2."""
    a, b, x, y = scenes()
    outer = np.einsum
    bound = (outer("ni,nj->nij", a, x) + outer("ni,nj->nij", b, y)).reshape(60, -1)
    swapped = (outer("ni,nj->nij", a, y) + outer("ni,nj->nij", b, x)).reshape(60, -1)
    result = over.over(binding.Binding(), binding.SwapBatch(f_bound=bound, f_swapped=swapped))
    length = np.linalg.norm(bound, axis=1)
    assert result["binding_distance"] == pytest.approx(np.mean(np.linalg.norm(bound - swapped, axis=1) / length), 1e-5)
    assert result["binding_distance"] > 0.5
    apart = ((bound[:, None] - swapped[None, :]) ** 2).sum(-1)
    expected = apart[~np.eye(60, dtype=bool)].mean() / (length**2).mean()
    assert result["binding_distance_rms_shuffled"] == pytest.approx(expected**0.5, rel=1e-5)
    assert result["binding_distance_rms"] == pytest.approx((np.diag(apart).mean() / (length**2).mean()) ** 0.5, 1e-5)
