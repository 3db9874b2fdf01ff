"""A few training steps without a run directory, shared by the tests of what a step does."""

import jax
import numpy as np
import small_runs as runs

from saejax.parallel import sharding
from saejax.training import optim, state, step

LANES, BATCHES, ROWS, D_IN = 8, 4, 16, 64


class Steps:
    """State, step (`made` is not jitted) and a stream of records on one mesh; `overrides` as on the command line."""

    def __init__(self, architecture, *overrides, mesh=(1, 1), n_steps=50):
        self.cfg = cfg = runs.compose(architecture, n_steps, *overrides)
        self.mesh = sharding.make_mesh(*mesh)
        self.tx = optim.make(cfg.optim, n_steps, cfg.sae.lr_scales(), d_sae=cfg.sae.d_sae)
        self._rng = np.random.default_rng(0)
        self._features = np.random.default_rng(1).normal(size=(96, D_IN))
        self.born = state.create(
            cfg.sae, self.tx, cfg.train, cfg.normalize, self.record(BATCHES), seed=0, mesh=self.mesh
        )
        self.made = step.make(
            cfg.sae,
            self.tx,
            dead_window_tokens=cfg.train.dead_window_tokens,
            learning_rate=optim.schedule(cfg.optim, n_steps, cfg.sae.d_sae),
            ema_decay=cfg.train.ema_decay,
            resample_every_steps=cfg.train.resample_every_steps,
        )
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.born)
        self.step = jax.jit(self.made, out_shardings=(shardings, None))

    def record(self, *lead):
        """Sparse sums of fixed features, [lanes, *lead, rows, d_in]."""
        codes = self._rng.random((LANES, *lead, ROWS, 96)) * (self._rng.random((LANES, *lead, ROWS, 96)) < 0.05)
        rows = (codes @ self._features).astype(np.float32)
        return jax.device_put(rows, jax.NamedSharding(self.mesh, jax.P(sharding.DATA)))

    def run(self, now, records):
        """The state after some records, and the metrics of every step."""
        history = []
        with jax.set_mesh(self.mesh):
            for fresh in records:
                now, metrics = self.step(now, fresh)
                history.append({name: float(value) for name, value in metrics.items()})
        return now, history


def bits(tree):
    """Every leaf by its path, keys as their bits."""
    return {
        jax.tree_util.keystr(path): np.asarray(
            jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
