"""In-process SAE training for experiments: many steps per compiled call, no run directory.

The loop of `saejax train` logs, saves and resumes; an experiment trains many small SAEs quickly. Step, optimiser,
liveness and state are the same. The shuffle buffer is as small as one batch, because the rows come shuffled.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from saejax.activations import normalize
from saejax.activations.source import ActivationSource
from saejax.errors import UserError
from saejax.parallel import sharding
from saejax.sae import base, model
from saejax.training import fold, optim, settings, state
from saejax.training.learner import Learner

Rows = ActivationSource | np.ndarray | jax.Array
"""Where rows come from: a source, or an array [n, d_in] that is reshuffled every epoch."""

_CHUNK_FLOATS = 4_000_000  # 16 MB of rows per compiled call


@dataclasses.dataclass(frozen=True)
class Fit:
    """A finished training.

    Attributes:
      sae: the trained SAE, in the data's own scale.
      start: the same SAE before the first step, the counterpart of every "untrained" control.
      history: means over consecutive chunks of steps, [n_chunks] float each: "step" (last of the chunk), "loss",
        "fvu", "l0", "dead_share", and the loss terms of the architecture.
    """

    sae: model.SAE
    start: model.SAE
    history: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of a training; the defaults are the run book of the benchmark SB-iid."""

    n_tokens: int
    """Rows to train on, rounded down to whole batches."""
    batch: int = 512
    """Rows per step."""
    lr: float = 2e-3
    """Peak learning rate of Adam."""
    warmup_share: float = 0.0
    """Share of the steps, see `optim.OptimConfig`."""
    decay_share: float = 0.3
    """Share of the steps, see `optim.OptimConfig`."""
    clip_norm: float | None = 1.0
    """Largest norm of the gradient; None does not clip."""
    seed: int = 0
    """Of the parameters."""
    data_seed: int | None = None
    """Of the rows (order of an array, draws of a synthetic source); None takes `seed`."""
    dead_after_tokens: int = 25_600
    """Window after which a latent that did not fire counts as dead."""
    norm: normalize.NormMode = normalize.NormMode.none
    """Scaling of rows; `auto` takes what the architecture prefers."""
    b_dec_init: settings.DecoderBias = settings.DecoderBias.geometric_median
    """Start of the decoder bias."""
    resample_every_steps: int | None = None
    """Steps between two resamplings of dead latents; None never resamples."""

    def learner(self, sparsifier: base.Sparsifier) -> Learner:
        """The learner of an architecture."""
        mode = normalize.NormMode[sparsifier.preferred_norm] if self.norm is normalize.NormMode.auto else self.norm
        sizes = settings.TrainConfig(
            n_tokens=self.n_tokens,
            batch=self.batch,
            n_lanes=1,
            b_dec_init=self.b_dec_init,
            dead_after_tokens=self.dead_after_tokens,
            resample_every_steps=self.resample_every_steps,
        )
        schedule = optim.OptimConfig(
            lr=self.lr, warmup_share=self.warmup_share, decay_share=self.decay_share, clip_norm=self.clip_norm
        )
        return Learner(sparsifier, schedule, sizes, normalize.NormalizeConfig(mode=mode))


def train(sparsifier: base.Sparsifier, rows: Rows, **kwargs: Any) -> model.SAE:
    """The SAE alone; arguments as `fit`.

    Examples:
      >>> from saejax.sae import TopK
      >>> rows = np.random.default_rng(0).standard_normal((256, 8)).astype(np.float32)
      >>> train(TopK(d_in=8, d_sae=16, k=2), rows, n_tokens=2048, batch=64).encode(rows[:3]).shape
      (3, 16)
    """
    return fit(sparsifier, rows, **kwargs).sae


def fit(sparsifier: base.Sparsifier, rows: Rows, **recipe: Any) -> Fit:
    """Train one SAE.

    Args:
      sparsifier: the architecture.
      rows: an `ActivationSource`, or an array [n, d_in].
      **recipe: fields of `Recipe`; n_tokens must be given.

    Returns:
      The trained SAE, the untrained one and the curves.

    Raises:
      UserError: an array that is no finite [n, d_in] float, holds less than a batch, or has another width.
    """
    cfg = Recipe(**recipe)
    learner, mesh = cfg.learner(sparsifier), sharding.make_mesh(1, 1)
    n_steps = learner.train.n_steps
    chunk = max(1, min(n_steps, 250, _CHUNK_FLOATS // (cfg.batch * sparsifier.d_in)))
    blocks = _blocks(rows, sparsifier.d_in, cfg.batch, chunk, cfg.seed if cfg.data_seed is None else cfg.data_seed)
    first = next(blocks)
    # The sample that b_dec and the scale start from; the buffer itself keeps one batch of it.
    (begun,) = learner.create(jnp.asarray(first)[None], mesh, seeds=(cfg.seed,), data_seed=cfg.seed)
    begun = jax.tree.map(lambda leaf: jax.device_put(leaf, jax.devices()[0]), begun)
    now = dataclasses.replace(begun, buffer=dataclasses.replace(begun.buffer, rows=begun.buffer.rows[:, :1]))
    start = _folded(sparsifier, now, 0)
    advance = _chunk_of(learner, chunk)
    curves: list[dict[str, jax.Array]] = []
    for done in range(0, n_steps, chunk):
        count = min(chunk, n_steps - done)
        now, means = advance(now, first if done == 0 else next(blocks), count)
        curves.append({"step": jnp.asarray(done + count), **means})
    history = {key: np.array([float(c[key]) for c in curves]) for key in curves[0]}
    return Fit(sae=_folded(sparsifier, now, n_steps * cfg.batch), start=start, history=history)


@functools.lru_cache(maxsize=32)
def _chunk_of(learner: Learner, chunk: int) -> Any:
    """Compiled: (state, rows [chunk, batch, d_in], count) -> (state after `count` steps, their mean metrics)."""
    one = learner.step
    kept = ("loss", "fvu", "l0", "dead_share")

    @functools.partial(jax.jit, donate_argnums=0)
    def advance(now: state.TrainState, rows: Float[Array, "chunk b d_in"], count: Any) -> Any:
        def body(i: Any, carry: Any) -> Any:
            train_state, sums = carry
            train_state, metrics = one(train_state, rows[i][None])
            return train_state, {key: sums[key] + metrics[key] for key in sums}

        shapes = jax.eval_shape(one, now, rows[0][None])[1]
        terms = [key for key in shapes if key in kept or key not in ("grad_norm", "param_norm", "lr")]
        now, sums = jax.lax.fori_loop(0, count, body, (now, {key: jnp.zeros(()) for key in terms}))
        return now, {key: value / count for key, value in sums.items()}

    return advance


def _folded(sparsifier: base.Sparsifier, now: state.TrainState, n_tokens: int) -> model.SAE:
    """SAE for users: normalisation folded in, arrays of its own (the state's are donated)."""
    sparsifier, params = fold.folded(sparsifier, now.params, now.normalizer)
    params = jax.tree.map(lambda leaf: jnp.asarray(np.array(leaf)), params)
    return model.SAE(sparsifier, params, {"tokens": n_tokens})


def _blocks(rows: Rows, d_in: int, batch: int, chunk: int, seed: int) -> Iterator[np.ndarray]:
    """Endless [chunk, batch, d_in] float32."""
    if isinstance(rows, ActivationSource):
        if rows.d_in != d_in:
            raise UserError(f"sae.d_in must equal the width of the source, {rows.d_in}, got {d_in}")
        return _of_source(rows, batch, chunk, seed)
    array = np.asarray(rows, np.float32)
    if array.ndim != 2 or array.shape[1] != d_in or len(array) < batch:
        raise UserError(f"rows must be [n >= batch={batch}, d_in={d_in}], got {list(array.shape)}")
    if not np.isfinite(array).all():
        raise UserError("rows must be finite, got NaN or infinity")
    return _of_array(array, batch, chunk, seed)


def _of_source(source: ActivationSource, batch: int, chunk: int, seed: int) -> Iterator[np.ndarray]:
    stream = source.open(n_lanes=1, block_rows=batch, lanes=range(1), seed=seed)
    while True:
        yield np.concatenate([np.asarray(next(stream), np.float32) for _ in range(chunk)])


def _of_array(array: np.ndarray, batch: int, chunk: int, seed: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(seed)
    order = np.empty(0, np.int64)
    while True:
        while len(order) < chunk * batch:
            order = np.concatenate([order, rng.permutation(len(array))])
        taken, order = order[: chunk * batch], order[chunk * batch :]
        yield array[taken].reshape(chunk, batch, -1)
