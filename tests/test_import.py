"""`import saejax` is light: it loads no heavy library and starts no device. Each check is a process."""

import subprocess
import sys
from pathlib import Path

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


LOADING = """
import logging, sys, tensorstore
before = tensorstore.experimental_collect_matching_metrics, list(logging.getLogger("asyncio").filters)
import saejax
from saejax.runs import run
saejax.load(sys.argv[1])
assert before == (tensorstore.experimental_collect_matching_metrics, logging.getLogger("asyncio").filters)
"""


def run(program: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=120)


def test_import_is_light():
    done = run(PROGRAM)
    assert done.returncode == 0, done.stderr


def test_the_command_line_handles_signals_before_anything_heavy_is_imported():
    done = run("import sys, saejax.cli\nassert not {'jax', 'numpy', 'hydra'} & set(sys.modules)")
    assert done.returncode == 0, done.stderr


def test_the_check_can_fail():
    assert "loads ['hydra'" in run("import hydra" + PROGRAM).stderr
    assert "starts a device" in run("import jax; jax.devices()" + PROGRAM).stderr


def test_loading_a_run_changes_nothing_in_other_libraries():
    done = run(LOADING, str(Path(__file__).parent / "fixtures" / "run_format_3"))
    assert done.returncode == 0, done.stderr
