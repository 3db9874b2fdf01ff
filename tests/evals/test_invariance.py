"""One table for every registered metric: neither batches, nor padding, nor devices, nor the order of rows show."""

import dataclasses
import functools
import importlib
import pkgutil

import jax
import numpy as np
import pytest
from metric_examples import EXAMPLES, OF_THE_BATCH, OF_THE_STREAM

from saejax import evals, sharding
from saejax.evals import metric
from saejax.evals.over import over

for module in pkgutil.iter_modules(evals.__path__):
    importlib.import_module(f"saejax.evals.{module.name}")

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


@pytest.mark.parametrize("name", [name for name in NAMES if metric.METRICS[name] in OF_THE_BATCH])
def test_legacy_metrics_depend_on_nothing_but_the_batch(name):
    m, batch, whole = measured(name)
    assert_same(over(m, batch, mesh=sharding.make_mesh(8, 1)), whole)
    assert_same(over(m, permuted(batch, np.random.default_rng(1).permutation(ROWS))), whole)
    assert any(abs(over(m, batch, rows=7)[key] - value) > 1e-3 for key, value in whole.items())
