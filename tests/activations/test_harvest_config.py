"""The devices of a harvest change nothing in what is stored, and can be set like any other setting."""

import numpy as np
import pytest

from saejax import config
from saejax.activations import store, text
from saejax.activations.language_model import harvest
from saejax.errors import UserError
from saejax.parallel import sharding


def harvest_config(small_model, tmp_path, name: str, mesh: sharding.MeshConfig) -> harvest.HarvestConfig:
    """A harvest of forty documents of random letters."""
    folder = tmp_path / "text"
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(40):
        (folder / f"{i:02d}.txt").write_text("".join(rng.choice(list("abcdefgh "), rng.integers(5, 60))))
    corpus = text.TextFiles(path=str(folder), heldout_share=0.2)
    return harvest.HarvestConfig(
        model=str(small_model), hook="blocks.1.hook_resid_post", text=corpus, path=str(tmp_path / name),
        context_length=32, batch_sequences=4, shard_sequences=4, dtype=store.StoreDtype.float32, mesh=mesh,
    )  # fmt: skip


def test_any_mesh_stores_the_same(small_model, tmp_path):
    found = {}
    for name, mesh in {
        "one": sharding.MeshConfig(data=1),
        "grid": sharding.MeshConfig(data=4, latent=2),
        "all": sharding.MeshConfig(),  # eight devices for batches of four sequences
    }.items():
        paths = harvest.harvest(harvest_config(small_model, tmp_path, name, mesh))
        found[name] = store.Reader(paths["train"])
        assert "mesh" not in found[name].manifest["harvest"]
    one = found["one"]
    assert one.n_rows > 500
    for other in (found["grid"], found["all"]):
        assert other.n_rows == one.n_rows
        np.testing.assert_array_equal(other.index(0, one.n_rows), one.index(0, one.n_rows))
        # float32 sums over 48 MLP units in another order; values are O(1).
        np.testing.assert_allclose(other.rows(0, one.n_rows), one.rows(0, one.n_rows), rtol=1e-4, atol=1e-5)


def test_a_mesh_beyond_the_machine_is_refused(small_model, tmp_path):
    with pytest.raises(UserError, match="mesh.data=16 .* needs 16 devices"):
        harvest.harvest(harvest_config(small_model, tmp_path, "out", sharding.MeshConfig(data=16)))


def test_the_mesh_may_be_set_on_the_command_line():
    composed = config.load("harvest", harvest.HarvestConfig, ["mesh.data=4", "mesh.latent=2", "text=pydoc"])
    assert composed.mesh == sharding.MeshConfig(data=4, latent=2)
    assert config.load("harvest", harvest.HarvestConfig, ["text=pydoc"]).mesh == sharding.MeshConfig()
