"""Sharded equals unsharded: the same run on every mesh."""

import jax
import numpy as np
import pytest
import small_runs as runs

from saejax import config
from saejax.errors import UserError
from saejax.parallel import sharding
from saejax.sae import base
from saejax.training import optim, state

# Both axes at once, and each alone.
MESHES = [pytest.param(8, 1, marks=pytest.mark.nightly), (4, 2), pytest.param(2, 4, marks=pytest.mark.nightly), (1, 8)]


@pytest.fixture(scope="module", params=runs.every_architecture("topk", "l1"))
def unsharded(request, tmp_path_factory):
    """50 steps on one device."""
    run_dir = tmp_path_factory.mktemp(request.param)
    runs.train(run_dir, runs.compose(request.param, 50, "mesh=single"))
    return request.param, run_dir


@pytest.mark.parametrize("n_data, n_latent", MESHES)
def test_losses_do_not_depend_on_the_mesh(unsharded, tmp_path, n_data, n_latent):
    architecture, single = unsharded
    runs.train(tmp_path, runs.compose(architecture, 50, f"mesh.data={n_data}", f"mesh.latent={n_latent}"))
    expected = runs.logged(single, "train/loss")
    assert len(expected) == 50
    np.testing.assert_allclose(runs.logged(tmp_path, "train/loss"), expected, rtol=1e-5)
    # The losses of held-out rows after the last step agree as well.
    np.testing.assert_allclose(runs.logged(tmp_path, "eval/fvu"), runs.logged(single, "eval/fvu"), rtol=1e-5)


@pytest.mark.parametrize("n_data, n_latent", MESHES)
def test_top_k_picks_the_same_latents_on_every_mesh(unsharded, n_data, n_latent):
    architecture, single = unsharded
    cfg = config.from_run(single)
    params = runs.checkpoint.load_arrays(single, ("params",))[1]["params"]
    params = base.SAEParams(**params)
    rows = next(iter(cfg.source.heldout(512, 512)))
    expected = jax.jit(cfg.sae.encode)(params, rows)
    mesh = sharding.make_mesh(n_data, n_latent)
    placed = jax.device_put(params, sharding.tree_shardings(mesh, params))
    x = jax.device_put(rows, jax.NamedSharding(mesh, jax.P(sharding.DATA)))
    with jax.set_mesh(mesh):
        found = jax.jit(cfg.sae.encode)(placed, x)
    if expected.indices is not None:
        np.testing.assert_array_equal(found.indices, expected.indices)
    np.testing.assert_allclose(found.dense(), expected.dense(), rtol=1e-5, atol=1e-6)


def test_every_architecture_has_a_small_run():
    assert set(runs.SIZES) == set(base.ARCHITECTURES)


def test_every_leaf_is_born_where_it_belongs():
    cfg = runs.compose("topk", 4, "mesh.data=4", "mesh.latent=2")
    mesh = sharding.make_mesh(4, 2)
    rows = jax.device_put(
        np.random.default_rng(0).normal(size=(8, 8, 16, 64)).astype(np.float32),
        jax.NamedSharding(mesh, jax.P(sharding.DATA)),
    )
    tx = optim.make(cfg.optim, 4)
    born = state.create(cfg.sae, tx, cfg.train, cfg.normalize, rows, seed=0, mesh=mesh)
    specs = {jax.tree_util.keystr(path): leaf.sharding.spec for path, leaf in jax.tree_util.tree_leaves_with_path(born)}
    for name in ("W_enc", "b_enc", "W_dec"):
        placed = [spec for path, spec in specs.items() if path.endswith(f".{name}")]
        assert len(placed) == 3, "parameter and both moments"
        assert set(placed) == {sharding.SPECS[name]}
    assert specs[".buffer.rows"] == jax.P(sharding.DATA)
    assert specs[".liveness.tokens_since_fired"] == jax.P(sharding.LATENT)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["mesh.data=8", "mesh.latent=2"], "mesh.data=8 x mesh.latent=2 needs 16 devices, this machine has 8"),
        (["mesh.data=null", "mesh.latent=16"], "mesh.data=null x mesh.latent=16 needs 16 devices"),
    ],
)
def test_an_impossible_mesh_is_refused_before_anything_is_written(tmp_path, overrides, message):
    cfg = runs.compose("topk", 2, *overrides)
    with pytest.raises(UserError, match=message):
        runs.train(tmp_path / "run", cfg)
    assert not (tmp_path / "run").exists()
