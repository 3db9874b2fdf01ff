"""The Pallas kernels on a real GPU, in a process of its own: the tests of this one see CPU devices only."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu_kernels.py"


@pytest.mark.gpu
def test_kernels_equal_the_default_forms():
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"} | {"NPROC": "16"}
    command = [sys.executable, str(SCRIPT), "--check", "--shape", "512", "4096", "32", "2048"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    if done.returncode == 2:
        lines = [line for line in done.stderr.splitlines() if line.startswith("nothing to measure: ")]
        assert len(lines) == 1 and not done.stdout
        pytest.skip(lines[0])
    assert done.returncode == 0, done.stdout + done.stderr
