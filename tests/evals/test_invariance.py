"""One table for every registered metric: neither batches, nor padding, nor devices, nor the order of rows show."""

import dataclasses
import functools
import importlib
import pkgutil

import jax
import numpy as np
import pytest
from metric_examples import EXAMPLES, OF_THE_BATCH, OF_THE_STREAM

from saejax import evals
from saejax.errors import UserError
from saejax.evals import metric
from saejax.lab import metrics
from saejax.lab.metrics.over import over
from saejax.parallel import sharding

for package in (evals, metrics):
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")

ROWS = 90
RTOL = 1e-5
NAMES = sorted(name for name, cls in metric.METRICS.items() if cls in EXAMPLES)


@functools.cache
def measured(name):
    """The metric, its batch, and its value on all rows at once."""
    m, batch = EXAMPLES[metric.METRICS[name]](np.random.default_rng(0), ROWS)
    return m, batch, over(m, batch)


def permuted(batch, order):
    """The same rows in another order."""
    rows = [f.name for f in dataclasses.fields(batch) if f.name not in batch.shared]
    return dataclasses.replace(
        batch, **{name: jax.tree.map(lambda a: np.asarray(a)[order], getattr(batch, name)) for name in rows}
    )


PLACES = np.array([0, 0, 13, 40, ROWS, ROWS])


def spoilt(leaf):
    """A per-row array with rows between its own that hold what nothing should read."""
    leaf = np.asarray(leaf)
    if leaf.dtype.kind == "f":
        fill = np.array([np.nan, np.inf, -np.inf] * 2)
    else:
        fill = np.full(len(PLACES), leaf.dtype.kind == "b" or np.iinfo(leaf.dtype).max)
    fill = np.broadcast_to(fill.reshape(-1, *[1] * (leaf.ndim - 1)), (len(PLACES), *leaf.shape[1:]))
    return np.insert(leaf, PLACES, fill.astype(leaf.dtype), axis=0)


def with_padding(batch):
    """The batch as arrays, with rows of weight 0 before, between and after its rows."""
    rows = [f.name for f in dataclasses.fields(batch) if f.name not in batch.shared and f.name != "weight"]
    filled = {name: jax.tree.map(spoilt, getattr(batch, name)) for name in rows}
    return dataclasses.replace(batch, **filled, weight=np.insert(np.ones(ROWS, np.float32), PLACES, 0))


def assert_same(found, wanted, but=()):
    """Every number and array to 1e-5, except the keys that may differ."""
    assert set(found) == set(wanted) and set(found.arrays) == set(wanted.arrays)
    for key in set(wanted) - set(but):
        np.testing.assert_allclose(found[key], wanted[key], rtol=RTOL, atol=1e-6, err_msg=key)
    for key in set(wanted.arrays) - set(but):
        np.testing.assert_allclose(found.arrays[key], wanted.arrays[key], rtol=RTOL, atol=1e-6, err_msg=key)


def test_every_metric_has_an_example_and_every_exception_a_reason():
    assert set(metric.METRICS.values()) == set(EXAMPLES)
    assert all("legacy" in cls.name and reason for cls, reason in OF_THE_BATCH.items())
    assert all(keys and reason for keys, reason in OF_THE_STREAM.values())


@pytest.mark.parametrize("name", NAMES)
def test_every_key_is_defined_and_some_number_is_known(name):
    m, _, whole = measured(name)
    assert all(sentence.endswith(".") for sentence in m.definitions().values())
    assert any(np.isfinite(value) for value in whole.values())


@pytest.mark.parametrize("name", [name for name in NAMES if metric.METRICS[name] not in OF_THE_BATCH])
def test_batches_devices_and_order_do_not_matter(name):
    m, batch, whole = measured(name)
    for rows in (1, 7):
        assert_same(over(m, batch, rows=rows), whole)
    assert_same(over(m, batch, rows=64, mesh=sharding.make_mesh(8, 1)), whole)
    order = np.random.default_rng(1).permutation(ROWS)
    keys, _ = OF_THE_STREAM.get(metric.METRICS[name], ((), ""))
    assert_same(over(m, permuted(batch, order), rows=7), whole, but=keys)


@pytest.mark.parametrize("name", NAMES)
def test_what_rows_of_weight_0_hold_does_not_count(name):
    """Through `over`, and through `update` alone: NaN, infinities and numbers that index nothing."""
    m, batch, whole = measured(name)
    padded = with_padding(batch)
    found = over(m, padded)
    assert_same(found, whole)
    assert found.data["rows"] == ROWS
    if not m.on_host:
        padded = jax.tree.map(jax.numpy.asarray, padded)
    with np.errstate(all="raise"):
        state = m.update(m.init(padded), padded)
    wide = jax.tree.map(lambda a: np.asarray(a, np.float64 if a.dtype.kind == "f" else a.dtype), state)
    for key, value in m.compute(wide).items():
        np.testing.assert_allclose(value, whole[key] if key in whole else whole.arrays[key], RTOL, 1e-6, err_msg=key)


@pytest.mark.parametrize("name", NAMES)
def test_rows_that_count_must_be_finite(name):
    m, batch, _ = measured(name)
    padded = with_padding(batch)
    kinds = {np.asarray(leaf).dtype.kind for leaf in jax.tree.leaves(batch)}
    if "f" in kinds:
        with pytest.raises(UserError, match="must be finite"):
            over(m, dataclasses.replace(padded, weight=np.ones_like(padded.weight)))
    with pytest.raises(UserError, match="every weight is 0"):
        over(m, dataclasses.replace(padded, weight=np.zeros_like(padded.weight)))


@pytest.mark.parametrize("name", [name for name in NAMES if metric.METRICS[name] in OF_THE_BATCH])
def test_legacy_metrics_depend_on_nothing_but_the_batch(name):
    m, batch, whole = measured(name)
    assert_same(over(m, batch, mesh=sharding.make_mesh(8, 1)), whole)
    assert_same(over(m, permuted(batch, np.random.default_rng(1).permutation(ROWS))), whole)
    assert any(abs(over(m, batch, rows=7)[key] - value) > 1e-3 for key, value in whole.items())
