"""Small real runs, shared by the tests of training: composed, trained, read back."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from saejax import config
from saejax.runs import run
from saejax.storage import checkpoint

FIELDS = ("step", "params", "opt_state", "liveness", "buffer", "normalizer", "key")

# Every architecture, at a size that a second trains.
SIZES = {
    "topk": ["sae=topk", "sae.d_sae=128", "sae.k=4"],
    "l1": ["sae=l1", "sae.d_sae=128", "sae.l1_coef=0.5", "sae.l1_warmup_steps=20"],
    "batch_topk": ["sae=batch_topk", "sae.d_sae=128", "sae.k=4"],
    "jumprelu": ["sae=jumprelu", "sae.d_sae=128", "sae.bandwidth=0.1", "sae.threshold_init=0.1"],
    "gated": ["sae=gated", "sae.d_sae=128"],
    "matryoshka": ["sae=matryoshka", "sae.d_sae=128", "sae.k=4"],
    "abs_topk": ["sae=abs_topk", "sae.d_sae=128", "sae.k=4"],
    # The slope of f^p near 0 amplifies rounding the more, the smaller p: 0.8 after 50 steps.
    "p_anneal": ["sae=p_anneal", "sae.d_sae=128", "sae.anneal_steps=200"],
    "matching_pursuit": ["sae=matching_pursuit", "sae.d_sae=128", "sae.k=4"],
}


def every_architecture(*quick: str) -> list[Any]:
    """Every architecture as a parameter of a test; those not named run nightly."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.nightly) for name in SIZES]


def compose(architecture: str, n_steps: int, *overrides: str) -> config.Config:
    """A run of `n_steps` steps on synthetic rows."""
    given = [
        *SIZES[architecture],
        f"train.n_tokens={n_steps * 128}",
        "train.batch=128",
        "buffer.rows=1024",
        "train.log_every_steps=1",
        "train.eval_rows=512",
        "train.dead_after_tokens=1024",
        "mesh=single",
        *overrides,
    ]
    return config.load("train", config.Config, given)


def train(run_dir: Path, cfg: config.Config, *, resume: bool = False) -> Any:
    """Train in this process."""
    return run.train(cfg, run_dir, resume=resume)


def saved(run_dir: Path, step: int | None = None) -> dict[str, np.ndarray]:
    """Every array of a checkpoint by its path, keys as their bits."""
    found = checkpoint.load_arrays(run_dir, FIELDS, step)[1]
    leaves = jax.tree_util.tree_leaves_with_path(found)
    return {
        jax.tree_util.keystr(path): np.asarray(
            jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        )
        for path, leaf in leaves
    }


def logged(run_dir: Path, name: str) -> list[float]:
    """One metric of metrics.jsonl, in order."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]
