"""The meshes on which every kernel must give the same result."""

import contextlib

import jax
import pytest

from saejax.parallel import sharding


def set_mesh(shape):
    """Returns a context in which a mesh of this shape is set; None is no mesh at all."""
    if shape is None:
        return contextlib.nullcontext()
    return jax.set_mesh(sharding.make_mesh(*shape))


@pytest.fixture(params=[None, (1, 1), (8, 1), (4, 2), (2, 4), (1, 8)], ids=str)
def mesh(request):
    """Runs the test once without a mesh and once on each."""
    with set_mesh(request.param):
        yield request.param


@pytest.fixture
def on_mesh():
    """The context manager itself, for tests that name their mesh."""
    return set_mesh
