"""Runs small enough to be killed by the hundred, and what they are compared by."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time

import jax
import numpy as np

from saejax.storage import checkpoint

HERE = pathlib.Path(__file__).parent
FIELDS = ("step", "params", "opt_state", "liveness", "buffer", "normalizer", "key")

STEPS, SAVE_EVERY = 60, 5
RHYTHM = f"checkpoint.save_every_steps={SAVE_EVERY}"
TRIALS = int(os.environ.get("TRIALS", "50"))
"""Of each kind of kill in the long suite; half as many for some."""
ARGUMENTS = [
    "sae.d_sae=32", "sae.k=4", "source.d_in=16", "source.n_features=32", "source.heldout_rows=256", "train.batch=64",
    f"train.n_tokens={64 * STEPS}", "buffer.rows=256", "train.log_every_steps=1", "train.eval_rows=64",
    "train.eval_every_steps=null", "checkpoint.keep_last=100", "mesh=single",
]  # fmt: skip


class Forker:
    """Starts work in forks of one process that has imported everything."""

    def __init__(self, folder: pathlib.Path):
        cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")} | os.environ
        cache |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
        self.log = folder / "log"
        self._server = subprocess.Popen(
            [sys.executable, str(HERE / "forker.py")], env=cache | {"JAX_NUM_CPU_DEVICES": "1"}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def start(self, work: str, **arguments) -> int:
        """Begins some work; returns the number of its process. One at a time."""
        self.log.unlink(missing_ok=True)
        wanted = {"work": work, "arguments": arguments, "log": str(self.log)}
        self._server.stdin.write(json.dumps(wanted) + "\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline())

    def wait(self) -> int:
        """Exit status of the work that was begun; minus the signal that killed it."""
        return int(self._server.stdout.readline())

    def run(self, work: str, **arguments) -> int:
        """Exit status of some work."""
        self.start(work, **arguments)
        return self.wait()

    def said(self) -> str:
        """Everything that the last work printed."""
        return self.log.read_text(errors="replace")

    def close(self) -> None:
        self._server.communicate(timeout=60)


@dataclasses.dataclass(frozen=True)
class Straight:
    """The run that nothing disturbed: its checkpoints by step, and how long it took."""

    run_dir: pathlib.Path
    saved: dict[int, dict[str, np.ndarray]]
    losses: list[tuple]
    seconds: float


def arrays(run_dir, step=None) -> dict[str, np.ndarray]:
    """Every array of a checkpoint, keys as their bits."""
    leaves = jax.tree_util.tree_leaves_with_path(checkpoint.load_arrays(run_dir, FIELDS, step)[1])
    is_key = [jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) for _, leaf in leaves]
    bits = [jax.random.key_data(leaf) if key else leaf for (_, leaf), key in zip(leaves, is_key, strict=True)]
    return {jax.tree_util.keystr(path): np.asarray(value) for (path, _), value in zip(leaves, bits, strict=True)}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    """Equal in every bit."""
    return a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)


def losses(run_dir) -> list[tuple]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["train/loss"]) for line in lines if "train/loss" in line]


def strike(forker: Forker, pid: int, signum: int, seconds: float) -> int:
    """Sends a signal after a while; the exit status."""
    time.sleep(seconds)
    try:
        os.kill(pid, signum)
    except ProcessLookupError:
        pass  # it was quicker
    return forker.wait()
