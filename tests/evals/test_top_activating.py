"""The table of strongest rows against a full sort, and the sample of deciles against what a fair one must look like."""

import numpy as np

from saejax.lab.metrics import over, top_activating

RNG = np.random.default_rng(0)


def table(latents, rows=None, order=None, **options):
    order = np.arange(len(latents)) if order is None else order
    batch = top_activating.LatentBatch(latents=latents[order], row_id=order.astype(np.int32))
    return over.over(top_activating.TopActivating(**options), batch, rows=rows)


def test_the_table_is_that_of_a_full_sort_with_many_ties():
    latents = RNG.integers(0, 4, (200, 5)).astype(np.float32) * (RNG.random((200, 5)) < 0.6)
    latents[:, 3] = 0
    latents[:, 4] = np.arange(200) == 77
    found = table(latents, rows=13, order=RNG.permutation(200), n_top=30)
    for j in range(5):
        best = sorted((i for i in range(200) if latents[i, j] > 0), key=lambda i: (-latents[i, j], i))[:30]
        best += [-1] * (30 - len(best))
        assert found.arrays["top_row"][j].tolist() == best
        value = found.arrays["top_activation"][j]
        assert value[np.array(best) >= 0].tolist() == [latents[i, j] for i in best if i >= 0]
    assert found["top_latents"] == 4 and found["decile_latents"] == 3


def test_deciles_are_a_fair_sample_in_order():
    """Uniform activations, 50 of 4000 rows: decile g of a fair sample has mean (g + .5) / 10, standard error < .025."""
    latents = RNG.random((4000, 40)).astype(np.float32) + 1e-3
    latents[::2] = 0
    found = table(latents, rows=999)
    rows, values = found.arrays["decile_row"], found.arrays["decile_activation"]
    assert rows.shape == (40, 10, 5) and (rows % 2 == 1).all()
    np.testing.assert_array_equal(values, latents[rows, np.arange(40)[:, None, None]])
    assert (np.diff(values.reshape(40, 50), axis=1) >= 0).all()
    assert all(len(set(r.ravel())) == 50 for r in rows)
    np.testing.assert_allclose(values.mean(axis=(0, 2)), (np.arange(10) + 0.5) / 10, atol=0.05)
    assert len(set(map(int, rows[0].ravel())) & set(range(2000))) > 12


def test_neither_order_nor_batches_nor_another_seed_of_the_order_show():
    latents = np.maximum(RNG.standard_normal((150, 6)), 0).astype(np.float32)
    wanted = table(latents, n_top=4, n_decile=2)
    for rows in (7, 150):
        found = table(latents, rows=rows, order=RNG.permutation(150), n_top=4, n_decile=2)
        for key in wanted.arrays:
            np.testing.assert_array_equal(found.arrays[key], wanted.arrays[key])
    other = table(latents, n_top=4, n_decile=2, seed=1)
    assert (other.arrays["top_row"] == wanted.arrays["top_row"]).all()
    assert (other.arrays["decile_row"] != wanted.arrays["decile_row"]).any()
