"""`import saejax` is light: it loads no heavy library and starts no device. Each check is a process."""

import subprocess
import sys

HEAVY = "gguf grain hydra jinja2 matplotlib omegaconf orbax safetensors scipy tokenizers torch transformers wandb"

PROGRAM = f"""
import sys
import saejax
loaded = sorted(name for name in {HEAVY.split()!r} if name in sys.modules)
assert not loaded, f"import saejax loads {{loaded}}"
if "jax" in sys.modules:
    from jax._src import xla_bridge  # the only place that tells; nothing public does
    assert not xla_bridge.backends_are_initialized(), "import saejax starts a device"
"""


def run(program: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)


def test_import_is_light():
    done = run(PROGRAM)
    assert done.returncode == 0, done.stderr


def test_the_command_line_handles_signals_before_anything_heavy_is_imported():
    done = run("import sys, saejax.cli\nassert not {'jax', 'numpy', 'hydra'} & set(sys.modules)")
    assert done.returncode == 0, done.stderr


def test_the_check_can_fail():
    assert "loads ['hydra'" in run("import hydra" + PROGRAM).stderr
    assert "starts a device" in run("import jax; jax.devices()" + PROGRAM).stderr
