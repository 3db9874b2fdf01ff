"""Which sizes are cut over which mesh."""

import pytest

from saejax.kernels import partition


@pytest.mark.parametrize(
    ("shape", "rows", "latents", "expected"),
    [
        (None, 8, 8, (None, None)),
        ((1, 1), 8, 8, (None, None)),
        ((4, 2), 8, 8, ("data", "latent")),
        ((8, 1), 8, 8, ("data", None)),
        ((1, 8), 8, 8, (None, "latent")),
        ((4, 2), 6, 8, (None, "latent")),  # 6 rows do not divide over 4 shards
        ((4, 2), 8, 7, ("data", None)),
    ],
)
def test_cut(on_mesh, shape, rows, latents, expected):
    with on_mesh(shape):
        cut = partition.of(rows, latents)
    assert (cut.rows, cut.latents) == expected
