"""The memory plan: sums of shapes by hand, the compiler's figures, meshes that are not here, nothing left behind."""

import jax
import pytest

from saejax import cli, config
from saejax.cli import dry_run
from saejax.errors import UserError

SMALL = ["source.d_in=64", "sae.d_sae=512", "sae.k=4", "train.batch=256", "buffer.rows=1024", "train.n_lanes=8"]
HUGE = [
    "mesh.data=64", "mesh.latent=32", "train.n_lanes=64", "sae.d_sae=33554432", "sae.k=64", "source.d_in=4096",
    "train.batch=8192", "train.n_tokens=10000000", "buffer.rows=65536",
]  # fmt: skip


def test_the_parts_are_the_sizes_of_the_arrays():
    found = dry_run.of_arguments(["--dry-run", *SMALL, "mesh.data=4", "mesh.latent=4", "train.ema_decay=0.99"])
    assert found.where.startswith("devices that are not here") and found.mesh == {"data": 4, "latent": 4}
    here = 4 * (2 * 64 * 512 // 4 + 512 // 4 + 64)
    assert found.parts["parameters"] == found.parts["average"] == here
    assert found.parts["moments (adam)"] == pytest.approx(2 * here, abs=64)  # and the counters
    assert found.parts["buffer"] == 4 * 1024 * 64 // 4
    assert found.parts["batches, this and the next"] == 2 * 4 * 256 * 64 // 4
    assert found.total == sum(found.parts.values())


def test_a_mesh_that_is_not_here_is_planned_from_shapes():
    found = dry_run.of_arguments(["--dry-run", *HUGE, "--device-memory-gib=141"])
    assert found.where.startswith("devices that are not here") and found.mesh == {"data": 64, "latent": 32}
    here = 4 * (2 * 4096 * 2**25 // 32 + 2**25 // 32 + 4096)
    assert found.parts["parameters"] == here and found.parts["moments (adam)"] == pytest.approx(2 * here, abs=64)
    assert found.parts["buffer"] == 65536 * 4096 * 4 // 64
    gradients = found.parts["temporaries (estimate)"] / here
    assert 1 < gradients < 1.2
    assert "it fits in the 141.00 GiB" in str(found)
    assert "DOES NOT FIT in the 80.00 GiB" in str(dry_run.of_arguments(["--dry-run", *HUGE, "--device-memory-gib=80"]))
    assert "is not known: give --device-memory-gib" in str(dry_run.of_arguments(["--dry-run", *HUGE]))


def test_the_estimate_on_an_absent_mesh_equals_that_of_a_present_one():
    sae = config.load("train", config.Config, SMALL).sae
    one, four = (dry_run.temporaries(sae, 256, {"data": n, "latent": n}) for n in (1, 2))
    assert 2 < one / four < 4


@pytest.mark.nightly
@pytest.mark.parametrize("architecture", ["topk", "l1"])
def test_the_estimate_is_near_the_compilers_figure(architecture):
    given = [f"sae={architecture}", "source.d_in=128", "sae.d_sae=2048", "train.batch=512", "mesh=single"]
    cfg = config.load("train", config.Config, given)
    compiled = dry_run.make(cfg).parts["temporaries (compiler)"]
    assert 0.5 < compiled / dry_run.temporaries(cfg.sae, 512, {"data": 1, "latent": 1}) < 2


def test_an_ensemble_pays_for_every_member_and_one_buffer():
    one = dry_run.of_arguments(["--dry-run", *HUGE])
    four = dry_run.of_arguments(["--dry-run", *HUGE, "ensemble.seed=[0,1,2,3]"])
    for name in one.parts:
        shared = name in ("buffer", "batches, this and the next")
        assert four.parts[name] == (1 if shared else 4) * one.parts[name]


def test_the_command_prints_writes_nothing_and_allocates_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = sum(array.nbytes for array in jax.live_arrays())
    assert cli.main(["train", "--dry-run", *HUGE]) == 0
    assert "memory per device on mesh data=64 x latent=32 (devices that are not here" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    assert sum(array.nbytes for array in jax.live_arrays()) - before < 2**20


@pytest.mark.parametrize("wrong", ["-m", "resume=runs/x", "--device-memory-gib=much", "--other", "sae.d_sae=-3"])
def test_other_flags_are_refused(wrong):
    with pytest.raises(UserError, match="--d|sae.d_sae"):
        dry_run.of_arguments(["--dry-run", *SMALL, wrong])
