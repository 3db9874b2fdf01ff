"""Nothing that saejax does itself is deprecated: the commands run where Python takes every warning for an error."""

import os
import subprocess
import sys

import pytest


@pytest.mark.nightly
def test_a_run_and_its_evaluation_where_warnings_are_errors(tmp_path):
    small = [
        "train.n_tokens=1280",
        "train.batch=128",
        "buffer.rows=512",
        "train.eval_rows=64",
        "sae.d_sae=32",
        "mesh=single",
    ]
    for arguments in (
        ["train", *small, f"hydra.run.dir={tmp_path}/run"],
        ["evaluate", f"run={tmp_path}/run", "rows=200"],
    ):
        done = subprocess.run(
            [sys.executable, "-W", "error", "-m", "saejax", *arguments],
            env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr[-3000:]
