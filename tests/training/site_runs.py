"""Small real runs over rows of several sites, shared by the tests of training."""

import numpy as np
import small_runs as runs

from saejax import config

FAMILIES = {
    "transcoder": ["sae=topk", "sae.k=4", "sae.family=transcoder", "sae.skip=true", "source.sites=[16,12]"],
    "crosscoder": ["sae=batch_topk", "sae.k=4", "sae.family=crosscoder", "source.sites=[12,8,16]"],
    "l1 crosscoder": ["sae=l1", "sae.l1_coef=0.5", "sae.family=crosscoder", "source.sites=[12,8,16]"],
    "clt": [
        "sae=jumprelu", "sae.bandwidth=0.1", "sae.threshold_init=0.1", "sae.family=clt", "source.sites=[8,8,8,6,8,10]",
    ],
}  # fmt: skip
"""One run of every family, by name."""


def compose(family: str, n_steps: int, *overrides: str) -> config.Config:
    """A run of `n_steps` steps on features that are seen in several sites."""
    given = [
        *FAMILIES[family],
        "sae.d_sae=48",
        "sae.k_aux=8",
        f"train.n_tokens={n_steps * 64}",
        "train.batch=64",
        "buffer.rows=512",
        "train.log_every_steps=1",
        "train.eval_rows=256",
        "train.dead_after_tokens=256",
        *overrides,
    ]
    return config.load("train", config.Config, given)


def heldout(cfg: config.Config) -> np.ndarray:
    """The rows that a run is evaluated on."""
    return np.concatenate(list(cfg.source.heldout(256, 256)))


train, saved, logged = runs.train, runs.saved, runs.logged
