"""Greedy pursuits: add one atom at a time, the one that correlates most with the residual.

A step costs one product of the residuals with the dictionary; the rest touches chosen atoms only. Non-negative
pursuits choose by correlation and stop where none is above 0. Signed ones choose by magnitude.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from saejax.sparse_coding import products, row_blocks, support
from saejax.sparse_coding.solution import Solution

_STATIC = ("k", "nonneg")


@functools.partial(jax.jit, static_argnames=_STATIC)
def mp(
    y: Float[Array, "b d"], dictionary: Float[Array, "n d"], k: int, nonneg: bool = True, tolerance: float = 1e-5
) -> Solution:
    r"""Matching pursuit: k times :math:`z_j \mathrel{+}= d_j^T r,\; r \mathrel{-}= (d_j^T r) d_j`.

    An atom may be chosen again, so the support has at most k atoms. Each step takes :math:`(d_j^T r)^2` of the energy.
    """
    return _pursue(_mp_step, y, dictionary, k, nonneg, tolerance)


@functools.partial(jax.jit, static_argnames=_STATIC)
def omp(
    y: Float[Array, "b d"], dictionary: Float[Array, "n d"], k: int, nonneg: bool = True, tolerance: float = 1e-5
) -> Solution:
    r"""Orthogonal matching pursuit: after each choice, least squares on all chosen atoms; never the same atom twice.

    The residual is orthogonal to the chosen atoms (non-negative: to those above 0). Stops early where the residual is
    within `tolerance` of the signal's norm or no correlation is left. It also stops, not converged, where the best atom
    depends on the chosen ones to float32 precision.

    Source: Pati, Rezaiifar and Krishnaprasad, Orthogonal matching pursuit, 1993.
    """
    return _pursue(_omp_step, y, dictionary, k, nonneg, tolerance)


@functools.partial(jax.jit, static_argnames=_STATIC)
def gradient_pursuit(
    y: Float[Array, "b d"], dictionary: Float[Array, "n d"], k: int, nonneg: bool = True, tolerance: float = 1e-5
) -> Solution:
    r"""Gradient pursuit: k times :math:`S \leftarrow S \cup \{\arg\max_j |d_j^T r|\}`, then one exact line search along
    :math:`g = D_S r` on the chosen atoms.

    One step along g does not make the residual orthogonal to S, so an atom of S may be the best again: the step then
    adds no atom, and the support has at most k. Non-negative codes, which the source does not have, take the largest
    :math:`d_j^T r`, are clipped at 0, and the residual is taken anew.

    Source: Blumensath and Davies, Gradient pursuits, 2008.
    """
    return _pursue(_gradient_step, y, dictionary, k, nonneg, tolerance)


def _pursue(step, y, dictionary, k, nonneg, tolerance) -> Solution:
    """Runs `step` up to k times on every row and gives its account."""
    n = dictionary.shape[0]
    slots = min(k, n)  # steps may outnumber the atoms where one can be chosen again

    def block(y, dictionary):
        b, d = y.shape
        limit = tolerance * products.norms(y)
        state = {
            "residual": y,
            "values": jnp.zeros((b, slots)),
            "indices": jnp.full((b, slots), n, jnp.int32),  # n: an empty slot
            "running": products.norms(y) > limit,
            "solved": jnp.ones(b, bool),
            "iterations": jnp.zeros(b, jnp.int32),
        }
        if step is not _mp_step:
            state |= {"atoms": jnp.zeros((b, slots, d))}
        if step is _omp_step:
            state |= {"gram": jnp.zeros((b, k, k)), "inverse": jnp.zeros((b, k, k))}
            state |= {"target": jnp.zeros((b, k)), "passive": jnp.zeros((b, k), bool)}

        def once(carry):
            t, state = carry
            new = step(t, state, y, dictionary, nonneg)
            new["iterations"] = state["iterations"] + new["running"]
            left = new["running"] & (products.norms(new["residual"]) > limit)
            keep, stuck = new.pop("running"), new.pop("stuck", False)
            state = {name: _where(keep, new[name], state[name]) for name in new}
            state["solved"] &= ~jnp.asarray(stuck)
            return t + 1, state | {"running": left}

        def unfinished(carry):
            return (carry[0] < k) & jnp.any(carry[1]["running"])

        _, state = lax.while_loop(unfinished, once, (0, state))
        indices = jnp.where(state["indices"] == n, 0, state["indices"])
        residual_norm = products.norms(state["residual"])
        # A norm that is NaN exceeds no limit, so such a row stops: that is not its goal.
        return (
            state["values"],
            indices,
            residual_norm,
            state["iterations"],
            state["solved"] & jnp.isfinite(residual_norm),
        )

    values, indices, residual_norm, iterations, solved = row_blocks.over_blocks(block, (y,), (dictionary,), n)
    gap = jnp.full(residual_norm.shape, jnp.nan)
    return Solution(residual_norm, iterations, solved, gap, values, indices, n_atoms=n)


def _where(keep, new, old):
    """Takes `new` in the rows that still run."""
    return jnp.where(keep.reshape(-1, *[1] * (new.ndim - 1)), new, old)


def _choose(state, dictionary, nonneg, again: bool):
    """Returns the best atom of each row, its correlation, and whether it explains anything."""
    scores = products.correlate(state["residual"], dictionary)
    signed = scores
    scores = scores if nonneg else jnp.abs(scores)
    if not again:
        rows = jnp.arange(scores.shape[0])[:, None]
        scores = scores.at[rows, state["indices"]].set(-1.0, mode="drop")
    top, chosen = products.best(scores)
    correlation = top if nonneg else jnp.take_along_axis(signed, chosen[:, None], axis=1)[:, 0]
    return chosen, correlation, state["running"] & (top > 0)


def _slot(state, chosen, n):
    """Returns where the chosen atom of each row goes: True at its own slot if it has one, else at the first empty."""
    same = state["indices"] == chosen[:, None]
    empty = state["indices"] == n
    first = empty & (jnp.cumsum(empty, axis=1) == 1)
    return jnp.where(jnp.any(same, axis=1, keepdims=True), same, first)


def _mp_step(t, state, y, dictionary, nonneg):
    chosen, correlation, running = _choose(state, dictionary, nonneg, again=True)
    slot = _slot(state, chosen, dictionary.shape[0])
    residual = state["residual"] - correlation[:, None] * dictionary[chosen]
    values = state["values"] + jnp.where(slot, correlation[:, None], 0)
    indices = jnp.where(slot, chosen[:, None], state["indices"])
    return state | {"residual": residual, "values": values, "indices": indices, "running": running}


def _omp_step(t, state, y, dictionary, nonneg):
    chosen_atom, _, running = _choose(state, dictionary, nonneg, again=False)
    atom = dictionary[chosen_atom]
    indices, atoms = state["indices"].at[:, t].set(chosen_atom), state["atoms"].at[:, t].set(atom)
    state = state | {"indices": indices, "atoms": atoms, "running": running}
    passive, solved = state["passive"].at[:, t].set(True), state["solved"]
    column = products.inner(atoms, atom)
    gram = state["gram"].at[:, t, :].set(column).at[:, :, t].set(column)
    target = state["target"].at[:, t].set(jnp.sum(atom * y, axis=1))
    inverse, rest = support.extend(state["inverse"], column, t)
    chosen = state["running"]
    running = chosen & (rest > support.DEPENDENT)
    values = support.multiply(inverse, target)
    if nonneg:
        used = (jnp.arange(target.shape[1]) <= t)[None, :] & running[:, None]
        values, passive, inverse, solved = support.nonneg_least_squares(gram, target, used, passive, inverse)
    values, residual = support.refine(values, inverse, atoms, y, nonneg)
    running = running & jnp.all(jnp.isfinite(values), axis=1)
    new = {"gram": gram, "target": target, "inverse": inverse, "passive": passive, "solved": solved}
    new["stuck"] = chosen & ~running  # the best atom could not be added: the row ends short of its goal
    return state | new | {"values": values, "residual": residual, "running": running}


def _gradient_step(t, state, y, dictionary, nonneg):
    chosen, _, running = _choose(state, dictionary, nonneg, again=True)
    slot = _slot(state, chosen, dictionary.shape[0])
    indices = jnp.where(slot, chosen[:, None], state["indices"])
    atoms = jnp.where(slot[:, :, None], dictionary[chosen][:, None, :], state["atoms"])
    gradient = products.inner(atoms, state["residual"])
    # At norm 1, so that squares neither overflow nor vanish; <r, D_S g> = ||g||^2.
    length = products.norms(gradient)
    towards = gradient / jnp.where(length > 0, length, 1)[:, None]
    step = products.quotient(length, jnp.sum(products.combine(towards, atoms) ** 2, axis=1))
    values = state["values"] + step[:, None] * towards
    values = jnp.maximum(values, 0) if nonneg else values
    residual = y - products.combine(values, atoms)
    new = {"indices": indices, "atoms": atoms, "values": values, "residual": residual, "running": running}
    return state | new
