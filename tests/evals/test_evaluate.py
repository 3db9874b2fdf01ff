"""The evaluation loop: the same numbers however the rows are cut, padded, ordered, merged or sharded."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax import sae as architectures
from saejax.errors import UserError
from saejax.evals import evaluate, metric, sparsity
from saejax.parallel import sharding

WINDOWS = sparsity.Firing(windows=(5, 50))
ALL = (*[m for m in evaluate.default_metrics() if m.name != "firing"], WINDOWS)

# float32 sums of 211 terms, merged in another order: a few units in the last place of the largest partial sum.
CLOSE = {"rtol": 2e-6, "atol": 2e-6}


def assert_same(a: evaluate.EvalResult, b: evaluate.EvalResult, but: tuple[str, ...] = ()) -> None:
    assert a.keys() == b.keys() and a.arrays.keys() == b.arrays.keys()
    for key in a.keys() - set(but):
        np.testing.assert_allclose(a[key], b[key], **CLOSE, err_msg=key)
    for key in a.arrays.keys() - set(but):
        np.testing.assert_allclose(a.arrays[key], b.arrays[key], **CLOSE, err_msg=key)


@pytest.mark.parametrize("batch_rows", [7, 64, 500])
def test_batch_size_does_not_matter(sae, rows, batch_rows):
    whole = evaluate.evaluate_rows(sae, [rows], ALL)
    cut = evaluate.evaluate_rows(sae, [rows], ALL, batch_rows=batch_rows)
    assert_same(whole, cut, but=("fvu_batch_legacy", "ev_legacy"))
    assert cut.data == {"rows": 211, "batch_rows": batch_rows}


def test_blocks_of_any_size_are_the_same_stream(sae, rows):
    blocks = np.split(rows, [3, 3, 80, 81])
    assert_same(
        evaluate.evaluate_rows(sae, [rows], ALL, batch_rows=32),
        evaluate.evaluate_rows(sae, blocks, ALL, batch_rows=32),
    )


def test_order_does_not_matter(sae, rows):
    """Windows see the order of rows by definition; nothing else does."""
    metrics = (
        *[m for m in ALL if m.name not in ("firing", "fvu_batch_legacy", "ev_legacy")],
        sparsity.Firing(windows=()),
    )
    shuffled = np.random.default_rng(1).permutation(rows)
    assert_same(
        evaluate.evaluate_rows(sae, [rows], metrics, batch_rows=32),
        evaluate.evaluate_rows(sae, [shuffled], metrics, batch_rows=32),
    )


@pytest.mark.parametrize("shape", [(8, 1), (4, 2)])
def test_mesh_does_not_matter(sae, rows, shape):
    mesh = sharding.make_mesh(*shape)
    assert_same(
        evaluate.evaluate_rows(sae, [rows], ALL, batch_rows=32),
        evaluate.evaluate_rows(sae, [rows], ALL, batch_rows=32, mesh=mesh),
    )


# The rest shares their code paths and runs nightly.
QUICK = ("topk", "l1", "matryoshka")


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.nightly) for n in architectures.ARCHITECTURES]
)
def test_mesh_does_not_matter_to_real_architectures(rows, name):
    """Their kernels cut the work over the mesh by hand, so they are tried as well, on sharded parameters."""
    cls = architectures.ARCHITECTURES[name]
    sparsifier = cls(d_in=6, d_sae=16, **({"k": 4} if hasattr(cls, "k") else {}))
    params = sparsifier.init(jax.random.key(0))
    mesh = sharding.make_mesh(4, 2)
    placed = jax.device_put(params, sharding.tree_shardings(mesh, params))
    normalised = {"mean": rows.mean(0), "scale": np.float32(0.5), "batch_rows": 64}
    one = evaluate.make_evaluator(sparsifier, ALL).evaluate(params, [rows], **normalised)
    many = evaluate.make_evaluator(sparsifier, ALL, mesh).evaluate(placed, [rows], **normalised)
    assert one["l0"] > 0
    assert_same(one, many)


def test_latents_that_the_mesh_cannot_split_are_refused(make_sae, rows):
    with pytest.raises(UserError, match="mesh.latent must divide"):
        evaluate.evaluate(make_sae(d_sae=15), rows, mesh=sharding.make_mesh(4, 2))


def test_batch_is_rounded_up_to_the_mesh(sae, rows):
    result = evaluate.evaluate_rows(sae, [rows], ALL, batch_rows=30, mesh=sharding.make_mesh(8, 1))
    assert result.data == {"rows": 211, "batch_rows": 32}


@pytest.mark.parametrize("m", ALL, ids=lambda m: m.name)
def test_merge_is_a_monoid(sae, rows, m):
    """Any tree of merges over the pieces gives the whole, the empty state is neutral, on the device and on the host."""
    one = evaluate.make_evaluator(sae.config, (m,))

    def states_of(x):
        mean, scale, weight = np.zeros(6, np.float32), np.float32(1), np.ones(len(x), np.float32)
        return one.update(sae.params, mean, scale, one.init(), x, weight)[0]

    pieces = [states_of(p) for p in np.split(rows, [40, 41, 150])]
    hosts = [jax.tree.map(lambda a: np.asarray(a, np.float64 if a.dtype.kind == "f" else np.int64), p) for p in pieces]
    for a, b, c, d in (pieces, hosts):
        left = m.merge(m.merge(m.merge(a, b), c), d)
        right = m.merge(a, m.merge(b, m.merge(c, d)))
        balanced = m.merge(m.merge(a, b), m.merge(c, d))
        empty = jax.tree.map(np.asarray, one.init()[0])
        for other in (right, balanced, m.merge(empty, left), m.merge(left, empty)):
            for key, value in m.compute(left).items():
                np.testing.assert_allclose(value, m.compute(other)[key], **CLOSE, err_msg=key)


def test_padding_may_hold_anything(sae, rows):
    """Rows of weight 0 leave no trace, wherever they stand."""
    evaluator = evaluate.make_evaluator(sae.config, ALL)
    real = np.arange(300) % 10 < 7
    x = np.full((300, 6), 1e6, np.float32)
    x[real] = rows[: real.sum()]
    mean, scale = np.zeros(6, np.float32), np.float32(1)
    state = evaluator.update(sae.params, mean, scale, evaluator.init(), x, real.astype(np.float32))
    plain = evaluator.update(sae.params, mean, scale, evaluator.init(), x[real], np.ones(real.sum(), np.float32))
    for m, a, b in zip(ALL, state, plain, strict=True):
        for key, value in m.compute(jax.tree.map(np.asarray, a)).items():
            np.testing.assert_allclose(value, m.compute(jax.tree.map(np.asarray, b))[key], **CLOSE, err_msg=key)


def test_one_program_serves_every_batch_and_every_call(make_sae, rows):
    sae = make_sae("sparse", d_sae=24)
    evaluator = evaluate.make_evaluator(sae.config, evaluate.light_metrics())
    for seed in (0, 1):
        params = sae.config.init(jax.random.key(seed))
        evaluator.evaluate(params, [rows], batch_rows=32, mean=jnp.zeros(6), scale=jnp.float32(2.0))
    assert evaluator.update._cache_size() == 1
    assert evaluate.make_evaluator(sae.config, evaluate.light_metrics()) is evaluator


def test_normalised_parameters_are_judged_in_the_scale_of_the_data(sae, forward, rows):
    """Parameters trained on (x - mean) * scale; what is compared is x and what they rebuild of it."""
    mean, scale = rows.mean(0), np.float32(0.25)
    evaluator = evaluate.make_evaluator(sae.config, ALL)
    result = evaluator.evaluate(sae.params, [rows], mean=mean, scale=scale, batch_rows=64)
    z = (rows.astype(np.float64) - mean) * scale
    latents, recon_z = forward(sae, z)
    recon = recon_z / scale + mean
    error = ((rows - recon) ** 2).sum(1)
    np.testing.assert_allclose(result["mse"], error.mean(), rtol=1e-5)
    np.testing.assert_allclose(result["fvu"], error.sum() / ((rows - mean) ** 2).sum(), rtol=1e-5)
    np.testing.assert_allclose(result["l0"], (latents > 0).sum(1).mean(), rtol=1e-6)
    d = np.asarray(sae.params.W_dec, np.float64) / scale
    pull, power = (latents * ((rows - recon) @ d.T)).sum(0), (latents**2).sum(0) * (d**2).sum(1)
    fired = power > 0
    np.testing.assert_allclose(result.arrays["gain"][fired], 1 + pull[fired] / power[fired], rtol=1e-4, atol=1e-4)
    assert np.isnan(result.arrays["gain"][~fired]).all()


def test_every_key_is_defined_and_named_once(sae, rows):
    result = evaluate.evaluate(sae, rows, metrics=ALL)
    assert set(result) | set(result.arrays) == set(result.definitions)
    assert all(text.endswith(".") and len(text) > 20 for text in result.definitions.values())
    keys = list(itertools.chain.from_iterable(m.definitions() for m in ALL))
    assert len(keys) == len(set(keys))
    # Other metrics of an SAE are opt-in: they need d_in x d_in sums.
    assert {m.name for m in ALL} <= {name for name, m in metric.METRICS.items() if m.batch_type is metric.EvalBatch}


def test_array_source_and_stream_agree(sae, rows):
    class Source:
        def heldout(self, batch, max_rows=None):
            yield from (rows[:max_rows][i : i + batch] for i in range(0, 150, batch))

    of_array = evaluate.evaluate(sae, jnp.asarray(rows), max_rows=None, batch_rows=50)
    assert_same(of_array, evaluate.evaluate(sae, iter([rows[:100], rows[100:]]), batch_rows=50))
    of_source = evaluate.evaluate(sae, Source(), max_rows=150, batch_rows=50)
    assert_same(of_source, evaluate.evaluate(sae, rows, max_rows=150, batch_rows=50))
    assert of_source.data["rows"] == 150


def test_a_source_with_known_features_is_scored_on_them(sae, rows):
    class Source:
        def heldout(self, batch, max_rows=None):
            yield rows

        def features(self):
            return np.asarray(sae.params.W_dec)[:5] * 3.0

    result = evaluate.evaluate(sae, Source())
    assert result["mcc"] == pytest.approx(1.0) and result["mcc_chance"] < 0.95
    assert result.arrays["match"].tolist() == [0, 1, 2, 3, 4] and "mcc" in result.definitions


def test_counts_survive_more_rows_than_int32_can_hold():
    """The host counts in int64: merging 2^20 copies of a state of 2^20 rows would wrap around in int32."""
    m = sparsity.Firing(windows=(10_000_000,))
    state = sparsity.FiringState(
        rows=np.int64(2**20), count=np.array([2**20, 0]), lead=np.array([0, 2**20]), trail=np.array([0, 2**20]),
        silent=np.zeros((1, 2), np.int64),
    )  # fmt: skip
    for _ in range(20):
        state = m.merge(state, state)
    result = m.compute(state)
    assert state.rows == 2**40 and result["l0"] == 1.0
    assert result["dead_share"] == 0.5 and result["dead_fraction_1e7_tokens"] == 0.5


def test_wrong_width_and_no_rows_end_in_one_line(sae):
    with pytest.raises(UserError, match=r"d_in=6.*\[4, 5\]"):
        evaluate.evaluate(sae, np.zeros((4, 5), np.float32))
    with pytest.raises(UserError, match="no rows"):
        evaluate.evaluate(sae, iter([]))


def test_json_is_plain_and_whole(sae, rows, tmp_path):
    sae.params = sae.params.replace(b_enc=sae.params.b_enc.at[4].set(-1e9))
    result = evaluate.evaluate(sae, rows)
    assert np.isnan(result.arrays["gain"][4])
    evaluate.write_json(result, tmp_path / "eval.json")
    read = json.loads((tmp_path / "eval.json").read_text())
    assert set(read) == {"metrics", "arrays", "definitions", "data"}
    assert read["metrics"]["fvu"] == result["fvu"] and read["data"] == {"rows": 211, "batch_rows": 4096}
    assert read["arrays"]["gain"][4] is None and len(read["arrays"]["firing_rate"]) == 16
    assert [p.name for p in tmp_path.iterdir()] == ["eval.json"]
