"""Learner: one SAE with its optimiser, normalisation and compiled step, from the configs that define them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from saejax.activations.normalize import NormalizeConfig
from saejax.sae.base import Sparsifier
from saejax.training import optim, state, step
from saejax.training.settings import OnNonfinite, TrainConfig
from saejax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class Learner:
    """Everything that turns batches into an SAE. Static and hashable: `step` and `learn` are pure.

    Attributes:
      sparsifier: architecture.
      optim: update rule and schedule.
      train: length, batch, dead window, average, resampling.
      normalize: how rows are centred and scaled.
    """

    sparsifier: Sparsifier
    optim: optim.OptimConfig
    train: TrainConfig
    normalize: NormalizeConfig

    @functools.cached_property
    def tx(self) -> optax.GradientTransformation:
        """The optimiser."""
        scales = self.sparsifier.lr_scales()
        return optim.make(self.optim, self.train.n_steps, scales, d_sae=self.sparsifier.d_sae)

    @functools.cached_property
    def learn(self) -> step.Learn:
        """The part of the step after the draw (`step.make_learn`)."""
        return step.make_learn(self.sparsifier, self.tx, **self._settings())

    @functools.cached_property
    def step(self) -> step.Step:
        """The training step, not yet compiled (`step.make`)."""
        return step.make(self.sparsifier, self.tx, **self._settings())

    def abstract(self, first_rows: Any, mesh: Mesh) -> TrainState:
        """Shapes, dtypes and shardings of the state (`state.abstract`).

        Args:
          first_rows: anything with the shape [n_lanes, n_batches, block_rows, d_row] and dtype of the buffer.
          mesh: where the state shall live.
        """
        return state.abstract(self.sparsifier, self.tx, self.train, self.normalize, first_rows, mesh=mesh)

    def create(
        self, first_rows: Float[Array, "lanes batches rows d_row"], mesh: Mesh, *, seeds: Sequence[int], data_seed: int
    ) -> list[TrainState]:
        """New states of several seeds on one stream (`state.create_many`); only the first has a buffer.

        Args:
          first_rows: first filling of the buffer, in the dtype of the source, sharded over `data`.
          mesh: where they live.
          seeds: one for each state; fixes its parameters.
          data_seed: fixes draws.
        """
        parts = (self.sparsifier, self.tx, self.train, self.normalize)
        return state.create_many(*parts, first_rows, seeds=seeds, data_seed=data_seed, mesh=mesh)

    def _settings(self) -> step.Settings:
        return {
            "dead_window_tokens": self.train.dead_window_tokens,
            "learning_rate": optim.schedule(self.optim, self.train.n_steps, self.sparsifier.d_sae),
            "ema_decay": self.train.ema_decay,
            "resample_every_steps": self.train.resample_every_steps,
            "skip_nonfinite": self.train.on_nonfinite is OnNonfinite.skip,
        }
