"""Reference results of the experiments on superposition codes, and the mesh of their trials.

The dimensions were measured by an independent NumPy run: exact recovery of the set, Rademacher dictionaries, 100
subsets per dictionary; d50 and d90 are where the isotonic success curve crosses 0.5 and 0.9.
"""

import jax
from jax.sharding import Mesh

from saejax.parallel.sharding import make_mesh

RUN = "independent NumPy reference run"
PAPER = "superposition codes"

ONE_STEP: dict[tuple[int, int], dict[str, tuple[float, float]]] = {
    (12, 4): {"top_k": (75, 109), "threshold_half": (208, 268)},
    (12, 16): {"top_k": (442, 592), "threshold_half": (826, 1060)},
    (12, 64): {"top_k": (2218, 2827), "threshold_half": (3292, 4216)},
    (14, 4): {"top_k": (87, 120), "threshold_half": (247, 309)},
    (14, 16): {"top_k": (505, 653), "threshold_half": (985, 1204)},
    (14, 64): {"top_k": (2490, 3106), "threshold_half": (3950, 4858)},
    (16, 4): {"top_k": (101, 135), "threshold_half": (287, 347)},
    (16, 16): {"top_k": (564, 738), "threshold_half": (1170, 1416)},
    (16, 64): {"top_k": (2685, 3418), "threshold_half": (4643, 5461)},
}
"""(log2 n_atoms, k) -> decoder -> (d50, d90), from 400 to 2,000 trials; d90 is certain to 3 %."""

ITERATIVE: dict[tuple[int, int], dict[str, tuple[float, float]]] = {
    (12, 4): {"integer_pursuit": (36, 51), "omp": (41, 53), "basis_pursuit": (29, 40), "signed_bp": (35, 44)},
    (12, 16): {"integer_pursuit": (127, 169), "omp": (148, 189), "basis_pursuit": (104, 118), "signed_bp": (117, 134)},
    (12, 64): {"integer_pursuit": (496, 617), "omp": (564, 706), "basis_pursuit": (302, 325), "signed_bp": (359, 385)},
    (14, 4): {"integer_pursuit": (42, 57), "omp": (46, 62)},
    (14, 16): {"integer_pursuit": (154, 192), "omp": (171, 214), "basis_pursuit": (135, 149), "signed_bp": (152, 171)},
    (14, 64): {"integer_pursuit": (605, 747), "basis_pursuit": (422, 451), "signed_bp": (487, 510)},
    (16, 4): {"integer_pursuit": (50, 65), "omp": (53, 71)},
    (16, 16): {"integer_pursuit": (183, 225), "omp": (202, 234), "basis_pursuit": (169, 187), "signed_bp": (187, 214)},
    (16, 64): {"integer_pursuit": (706, 867)},
}
"""(log2 n_atoms, k) -> decoder -> (d50, d90), from 12 to 300 trials; d90 is certain to 4 %."""

FEATURES_OF_BERT = {
    "compressed_sensing_c1": 2.3e34,
    "compressed_sensing_c2": 4.8e17,
    "integer_pursuit": 2.2e18,
    "top_k": 2.2e7,
    "threshold": 1.5e4,
}
"""Features that fit 768 dimensions with 10 of them active, to two digits: one question, thirty orders of magnitude."""


def trial_mesh() -> Mesh | None:
    """A mesh that splits trials over all devices of this process, or None where there is one."""
    n_devices = jax.local_device_count()
    return make_mesh(n_devices, devices=jax.local_devices()) if n_devices > 1 else None
