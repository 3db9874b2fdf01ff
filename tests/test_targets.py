"""Targets: names of chips, plans of them from shapes, and their compilers where these are installed."""

import subprocess
import sys

import pytest

from saejax.cli import dry_run
from saejax.errors import UserError
from saejax.parallel import targets
from saejax.sae import topk
from saejax.training import cost

SMALL = ["--dry-run", "source.d_in=256", "sae.d_sae=4096", "sae.k=16", "train.batch=1024", "sae.matmul_dtype=bfloat16"]


@pytest.mark.parametrize("text, n, shown", [
    ("v5e:4x4", 16, "v5e:4x4"), ("v5p:2x2x1", 4, "v5p:2x2x1"), ("h200", 1, "h200:1x1"), ("b200:2x8", 16, "b200:2x8"),
])  # fmt: skip
def test_names(text, n, shown):
    assert targets.parse(text).n_devices == n and str(targets.parse(text)) == shown


@pytest.mark.parametrize("text", ["a100", "v5e:", "v5e:0x4", "v5e:8", "h200:1x2x3", "h200:x8", "", "v5e:4x4x4x4"])
def test_what_is_no_target_is_refused(text):
    with pytest.raises(UserError, match="target"):
        targets.parse(text)


def test_the_model_is_its_formula():
    sae, chip = topk.TopK(d_in=256, d_sae=4096, k=16), targets.CHIPS["v5e"]
    mesh = {"data": 2, "latent": 4}
    found = cost.of(sae, 1024, mesh, chip, cost.exchanges(sae, 1024, mesh))
    n_params = (2 * 256 * 4096 + 4096 + 256) / 4
    assert found.parts["optimiser"] == pytest.approx(4 * 7 * n_params / 8.19e11)
    assert found.parts["active rows"] == pytest.approx(4 * 4 * 512 * 16 / 4 * 256 / 8.19e11)
    gradients, sums, gathered, dots = 4 * 2 * 256 * 4096 // 4, 4 * 512 * 256, 8 * 512 * 16 * 4, 4 * 512 * 16
    assert found.parts["links"] == pytest.approx((2 * (gradients + sums + dots) + gathered) / 1.8e11)
    assert found.parts["products"] == pytest.approx(found.operations / (8 * 1.97e14))
    three = cost.of(sae, 1024, mesh, chip, cost.exchanges(sae, 1024, mesh), members=3)
    for name in ("products", "optimiser", "active rows"):
        assert three.parts[name] == pytest.approx(3 * found.parts[name])
    best = cost.meshes(sae, 1024, chip, 8, n_lanes=8)
    assert list(best) == sorted(best, key=lambda shape: best[shape].seconds) and len(best) == 4


def test_without_a_compiler_the_plan_comes_from_shapes(monkeypatch):
    monkeypatch.setattr(targets.Target, "compiles_here", lambda self: False)
    text = str(dry_run.of_arguments([*SMALL, "target=v5e:4x4", "mesh.latent=2"]))
    assert "memory per device on mesh data=8 x latent=2 (v5e:4x4, sizes from shapes; with saejax[plan-tpu]" in text
    assert "it fits in the 15.75 GiB of a device" in text and "all-reduce over data" in text
    assert "tokens/s, MFU" in text and "modelled fastest: mesh.data=1 mesh.latent=16" in text


@pytest.mark.nightly
@pytest.mark.parametrize("target", ["v5e:2x2", "h200:2"])
def test_the_vendors_compiler_compiles_the_step(target):
    """In a process of its own: a compiler changes what JAX knows of devices."""
    if not targets.parse(target).compiles_here():
        pytest.skip(f"the compiler is not installed: saejax[{targets.parse(target).package}]")
    command = [sys.executable, "-m", "saejax", "train", *SMALL, f"target={target}", "mesh.latent=2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert "temporaries (compiler)" in done.stdout and "over latent" in done.stdout
    if target.startswith("h200"):
        assert "sorts" not in done.stdout and "scatters" not in done.stdout and "gathered" not in done.stdout
