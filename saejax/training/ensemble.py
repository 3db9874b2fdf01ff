"""Ensemble step: many SAEs in one compiled step, with one draw from the buffer and one normalisation for all.

It has two forms, which learn the same up to rounding. `loop` unrolls the members: each keeps its own arrays and its
static k, and nothing is stacked or copied. `vmap` stacks them, so one batched product serves all; the differences are
traced, k as a mask over the slots of the largest one. Under `vmap` both branches of AuxK would run, so all members
take the same branch.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from saejax.activations import buffer, normalize
from saejax.parallel import sharding
from saejax.sae import base
from saejax.training import liveness, step
from saejax.training.ensemble_config import Form, places
from saejax.training.learner import Learner
from saejax.training.state import TrainState

_T = TypeVar("_T")
EnsembleStep = Callable[["EnsembleState", jax.Array], tuple["EnsembleState", dict[str, jax.Array]]]

SHARED = ("step", "buffer", "normalizer", "key")
"""Fields of `TrainState` that members have in common."""


@struct.dataclass
class EnsembleState:
    """State of all members; their shared part is stored once.

    Attributes:
      step, buffer, normalizer, key: as in `TrainState`.
      members: `TrainState`s without these: a tuple of them (loop), or one whose leaves are stacked (vmap).
      finite: [n], whether loss and parameters of a member were finite at every step so far.
    """

    step: jax.Array
    buffer: buffer.BufferState
    normalizer: normalize.Normalizer
    key: jax.Array
    members: Any
    finite: jax.Array


def make(members: Sequence[Learner], form: Form, mesh: Mesh) -> EnsembleStep:
    """Build the training step of an ensemble.

    Args:
      members: they differ in knobs only.
      form: loop or vmap.
      mesh: its axis `ensemble`, where it has one, splits the members of the vmap form.

    Returns:
      step(state, fresh) -> (state, metrics), pure and not yet jitted. Metrics are those of `training.step.make`:
      "i/name" for member i, and "name" for the mean over the finite members (NaN where none is).
    """
    learn_all = _unrolled(members) if form is Form.loop else _stacked(members, mesh)

    def ensemble_step(
        state: EnsembleState, fresh: Float[Array, "lanes rows d_row"]
    ) -> tuple[EnsembleState, dict[str, jax.Array]]:
        key = jax.random.fold_in(state.key, state.step)
        new_buffer, x = step.draw(state.buffer, state.normalizer, fresh, key)
        members, metrics = learn_all(state, x, key)
        finite = state.finite & jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["param_norm"])
        n_finite = jnp.sum(finite)
        flat = {f"{i}/{name}": values[i] for name, values in metrics.items() for i in range(len(values))}
        means = {name: jnp.sum(jnp.where(finite, v, 0)) / n_finite for name, v in metrics.items()}
        new_state = dataclasses.replace(state, step=state.step + 1, buffer=new_buffer, members=members, finite=finite)
        return new_state, flat | means

    return ensemble_step


def _unrolled(members: Sequence[Learner]) -> Callable[..., Any]:

    def learn_all(state: EnsembleState, x: jax.Array, key: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
        done, metrics = [], []
        for learner, member in zip(members, state.members, strict=True):
            new, measured = learner.learn(dataclasses.replace(member, step=state.step, key=state.key), x, key)
            done.append(without_shared(new))
            # Always true, but the next member waits for it: intermediate arrays of all would need far more memory.
            x = jnp.where(new.liveness.tokens_since_fired[0] >= 0, x, 0)
            metrics.append(measured)
        return tuple(done), jax.tree.map(lambda *values: jnp.stack(values), *metrics)

    return learn_all


def _stacked(members: Sequence[Learner], mesh: Mesh) -> Callable[..., Any]:
    knobs = _traced_knobs(members)
    largest = max(members, key=lambda member: getattr(member.sparsifier, "k", 0))
    axis = sharding.ENSEMBLE if sharding.ENSEMBLE in mesh.shape else None

    def learn_all(state: EnsembleState, x: jax.Array, key: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
        def learn_one(member: TrainState, point: dict[str, jax.Array], aux: bool) -> tuple[Any, dict[str, jax.Array]]:
            sparsifier = _at(largest.sparsifier, point, set(largest.sparsifier.knobs))
            if not aux:
                sparsifier = with_values(sparsifier, aux_alpha=0.0)
            learner = dataclasses.replace(largest, sparsifier=sparsifier, optim=_at(largest.optim, point, {"lr"}))
            new, measured = learner.learn(dataclasses.replace(member, step=state.step, key=state.key), x, key)
            if not aux:
                measured |= {"aux_k": jnp.zeros(())}
            return without_shared(new), dict(sorted(measured.items()))

        def all_members(aux: bool) -> tuple[Any, dict[str, jax.Array]]:
            mapped = jax.vmap(lambda member, point: learn_one(member, point, aux), spmd_axis_name=axis)
            return mapped(state.members, knobs)

        if largest.sparsifier.aux_alpha == 0:
            mapped = jax.vmap(lambda member, point: learn_one(member, point, True), spmd_axis_name=axis)
            return mapped(state.members, knobs)
        dead = liveness.dead(state.members.liveness, largest.train.dead_window_tokens)
        return jax.lax.cond(jnp.any(dead), lambda: all_members(True), lambda: all_members(False))

    return learn_all


def _traced_knobs(members: Sequence[Learner]) -> dict[str, jax.Array]:
    """Knob -> values [n] of those in which members differ; seeds have done their work by now."""
    found = {}
    for name, (part, field) in places(members[0].sparsifier).items():
        held = {"sae": [m.sparsifier for m in members], "optim": [m.optim for m in members]}.get(part, [])
        values = [getattr(config, field) for config in held]
        if len(set(values)) > 1:
            found[name] = jnp.asarray(values)
    return found


def _at(config: Any, point: dict[str, jax.Array], names: set[str]) -> Any:
    """A config with its traced knobs in place; of a selection of k, one with the slots beyond k empty."""
    values = {name: value for name, value in point.items() if name in names}
    k = values.pop("k", None)
    made = with_values(config, **values)
    return made if k is None else _masked(made, k)


def with_values(config: _T, **values: Any) -> _T:
    """A copy of a frozen config with other values, traced ones too, which its own checks could not read."""
    made = copy.copy(config)
    for name, value in values.items():
        object.__setattr__(made, name, value)
    return made


def _masked(sparsifier: base.Sparsifier, k: jax.Array) -> base.Sparsifier:
    """The same architecture, of whose slots, best first, only the first k are used."""
    kind: Any = type(sparsifier)

    class Masked(kind):
        def code(self, params: base.SAEParams, x: jax.Array, step: jax.Array | None) -> base.Encoding:
            chosen = super().code(params, x, step)
            used = jnp.arange(chosen.values.shape[-1])[None, :] < k
            return dataclasses.replace(chosen, values=jnp.where(used, chosen.values, 0))

    made = copy.copy(sparsifier)
    object.__setattr__(made, "__class__", Masked)
    return made


def without_shared(member: TrainState) -> TrainState:
    """A member's state without what members share."""
    return dataclasses.replace(member, **dict.fromkeys(SHARED))


class Layout:
    """Conversion between the states of members and the state of the ensemble.

    Args:
      single: shapes and shardings of one member's whole state, from `Learner.abstract`.
      n: members.
      form: loop or vmap.
      mesh: where they live.
    """

    def __init__(self, single: TrainState, n: int, form: Form, mesh: Mesh) -> None:
        self._single, self._n, self._form, self._mesh = single, n, form, mesh
        own = without_shared(single)
        axis = sharding.ENSEMBLE if sharding.ENSEMBLE in mesh.shape else None

        def stacked(leaf: Any) -> jax.ShapeDtypeStruct:
            placed = NamedSharding(mesh, P(axis, *leaf.sharding.spec))
            return jax.ShapeDtypeStruct((n, *leaf.shape), leaf.dtype, sharding=placed)

        self._members = (own,) * n if form is Form.loop else jax.tree.map(stacked, own)
        self._finite = jax.ShapeDtypeStruct((n,), bool, sharding=NamedSharding(mesh, P()))
        shardings = jax.tree.map(lambda leaf: leaf.sharding, (self._members, own))
        stack: Any = lambda states: jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)  # noqa: E731
        self._stack = jax.jit(stack, out_shardings=shardings[0])
        self._slice = jax.jit(lambda tree, i: jax.tree.map(lambda leaf: leaf[i], tree), out_shardings=shardings[1])

    @property
    def abstract(self) -> EnsembleState:
        """Shapes, dtypes and shardings of the ensemble's state."""
        return self._with(self._single, self._members, self._finite)

    def join(self, states: Sequence[TrainState]) -> EnsembleState:
        """Ensemble of members at the same step; the first provides the shared part."""
        own = tuple(without_shared(state) for state in states)
        members = own if self._form is Form.loop else self._stack(own)
        finite = jax.device_put(jnp.ones(self._n, bool), self._finite.sharding)
        return self._with(states[0], members, finite)

    def take(self, state: EnsembleState, i: int) -> TrainState:
        """The state that member i would have in a run of its own; the shared arrays are those of the ensemble."""
        member = state.members[i] if self._form is Form.loop else self._slice(state.members, i)
        return dataclasses.replace(member, **{name: getattr(state, name) for name in SHARED})

    def _with(self, shared: Any, members: Any, finite: Any) -> EnsembleState:
        return EnsembleState(**{name: getattr(shared, name) for name in SHARED}, members=members, finite=finite)
