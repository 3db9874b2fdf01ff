"""The wheel by itself: built, installed away from the repository, it trains, so nothing that it needs was left out."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_an_installed_wheel_trains(tmp_path):
    call(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, ROOT, cwd=tmp_path)
    (wheel,) = tmp_path.glob("saejax-*.whl")
    bin_dir = environment_with(wheel, tmp_path / "env")

    empty = tmp_path / "empty"
    empty.mkdir()
    imported = call(bin_dir / "python", "-c", "import saejax; print(saejax.__file__)", cwd=empty)
    assert Path(imported.strip()).is_relative_to(tmp_path / "env")
    call(bin_dir / "saejax", "train", "train=smoke", cwd=empty)
    (run,) = (empty / "runs").iterdir()
    record = json.loads((run / "run.json").read_text())
    assert record["finished"] and record["tokens"] == 20480


def environment_with(wheel: Path, path: Path) -> Path:
    """The programs of a new environment: the wheel of its own, the dependencies of the running one."""
    venv.create(path, with_pip=False)
    paths = sysconfig.get_paths(vars={"base": str(path), "platbase": str(path)}, scheme="venv")
    bin_dir, own = Path(paths["scripts"]), Path(paths["purelib"])
    python = bin_dir / "python"
    call(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    # After the wheel: pip would take the running environment's saejax for the one to replace. The links of editable
    # installations over there are not followed from here.
    (own / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return bin_dir


def call(*command: object, cwd: Path | None = None) -> str:
    """What a program prints; it must succeed, without help from the paths of this process."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "XLA_FLAGS")}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
