"""layer_norm and whiten against their definitions; what was trained on normalised rows works on the rows themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_runs as runs

from saejax import config, interop
from saejax.activations import normalize
from saejax.activations.normalize import NormMode
from saejax.errors import UserError
from saejax.parallel import sharding
from saejax.runs import run
from saejax.sae import per_row
from saejax.sparse_coding import inference_time
from saejax.training import fold

RNG = np.random.default_rng(0)
MIXING = RNG.normal(size=(64, 64)) * np.linspace(0.2, 3, 64)[:, None]
ROWS = (RNG.normal(size=(3000, 64)) @ MIXING + RNG.normal(size=64) * 5).astype(np.float32)


def test_whitened_rows_have_the_covariance_that_the_shrinkage_leaves():
    eps = 0.05
    found = normalize.estimate(ROWS, NormMode.whiten, whiten_eps=eps)
    y = np.asarray(normalize.apply(found, ROWS), np.float64)
    variances, axes = np.linalg.eigh(np.cov(ROWS.astype(np.float64).T, bias=True))
    left = variances / ((1 - eps) * variances + eps * variances.mean())
    expected = (axes * left) @ axes.T
    covariance = np.cov(y.T, bias=True)
    # Up to the scale that gives E||y|| = sqrt(d).
    np.testing.assert_allclose(covariance / np.trace(covariance), expected / np.trace(expected), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(y, axis=1).mean(), 8, rtol=1e-5)
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(normalize.invert(found, y), ROWS, atol=2e-4)


def test_whitening_survives_fewer_rows_than_dimensions():
    y = normalize.apply(normalize.estimate(ROWS[:20], NormMode.whiten), ROWS)
    assert np.isfinite(np.asarray(y)).all()


def test_layer_norm_is_per_row_and_undone_with_the_rows():
    found = normalize.estimate(ROWS, NormMode.layer_norm, preferred=NormMode.unit)
    y = np.asarray(normalize.apply(found, ROWS))
    x = ROWS.astype(np.float64)
    expected = (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True) / 8
    np.testing.assert_allclose(y, expected, atol=1e-5)
    np.testing.assert_allclose(normalize.invert(found, y, ROWS), ROWS, atol=1e-4)
    with pytest.raises(UserError, match="needs the rows that were normalised"):
        normalize.invert(found, y)


FOLDABLE = ["topk", "batch_topk", "jumprelu", "gated", "l1", "abs_topk", "matryoshka", "p_anneal"]


@pytest.mark.parametrize("mode", [NormMode.whiten, NormMode.layer_norm])
@pytest.mark.parametrize(
    "architecture, override",
    [*((name, "seed=0") for name in FOLDABLE), ("l1", "sae.encoder=mlp"), ("topk", "sae.encoder=lista")],
)
def test_the_folded_sae_does_on_rows_what_the_trained_did_on_normalised_ones(architecture, override, mode):
    sae = runs.compose(architecture, 4, "sae.d_sae=96", override).sae
    found = normalize.estimate(ROWS, mode, center=True, preferred=NormMode[sae.preferred_norm])
    params = jax.tree.map(
        lambda leaf: leaf + 0.05 * jnp.asarray(np.random.default_rng(1).normal(size=leaf.shape)),
        sae.init(jax.random.key(0)),
    )
    rows = ROWS[:50]
    trained = sae.encode(params, normalize.apply(found, rows))
    recon = normalize.invert(found, sae.decode(params, trained), rows)
    after, folded = fold.folded(sae, params, found)
    encoding = after.encode(folded, jnp.asarray(rows))
    # A top-k may choose another latent where two are within rounding; none is here.
    assert ((np.asarray(encoding.dense()) != 0) == (np.asarray(trained.dense()) != 0)).mean() > 1 - 1e-3
    np.testing.assert_allclose(
        encoding.dense() * float(found.scale), trained.dense(), atol=2e-4 * np.abs(trained.dense()).max()
    )
    np.testing.assert_allclose(after.decode(folded, encoding), recon, atol=2e-4 * np.abs(ROWS).max())


@pytest.mark.parametrize("mode", ["whiten", "layer_norm"])
def test_a_run_evaluates_saves_loads_and_exports_in_the_datas_own_scale(mode, tmp_path):
    cfg = runs.compose("topk", 6, f"normalize.mode={mode}", "sae.d_sae=32", "sae.aux_alpha=0", "optim.lr=0.02")
    outcome = runs.train(tmp_path, cfg)
    sae = run.load(tmp_path)
    rows = np.concatenate(list(cfg.source.heldout(512, 512)))
    residual = rows - np.asarray(sae(rows))
    fvu = np.sum(residual**2) / np.sum((rows - rows.mean(0)) ** 2)
    np.testing.assert_allclose(outcome.evaluation["fvu"], fvu, rtol=1e-4)
    assert runs.train(tmp_path, config.from_run(tmp_path), resume=True).step == 6
    if mode == "whiten":
        for name in ("saelens", "dictionary_learning"):
            back = interop.load(interop.export(sae, tmp_path / name, name))
            np.testing.assert_allclose(back(rows), sae(rows), atol=2e-4 * np.abs(rows).max(), err_msg=name)
        return
    assert isinstance(sae.sparsifier, per_row.LayerNormed)
    with pytest.raises(UserError, match="format=saelens: this SAE normalises every row by itself"):
        interop.export(sae, tmp_path / "saelens")
    with pytest.raises(UserError, match="latents must be decoded together with their rows"):
        sae.decode(sae.encode(rows))
    with pytest.raises(UserError, match="which a solver does not know"):
        inference_time.encode(sae, rows[:4])
    np.testing.assert_array_equal(sae.decode(sae.encoding(rows)), sae(rows))


def test_whitening_is_estimated_alike_on_a_mesh():
    rows = jax.device_put(ROWS[:2992], jax.NamedSharding(sharding.make_mesh(8, 1), jax.P(sharding.DATA)))
    a, b = (normalize.estimate(r, NormMode.whiten) for r in (rows, ROWS[:2992]))
    np.testing.assert_allclose(a.matrix, b.matrix, atol=1e-5 * np.abs(b.matrix).max())


@pytest.mark.parametrize(
    "overrides, message",
    [
        (("matching_pursuit", 4, "normalize.mode=whiten"), "normalize.mode=whiten cannot be folded into"),
        (("topk", 4, "normalize.whiten_eps=0"), r"normalize.whiten_eps must be in \(0, 1\], got 0"),
    ],
)
def test_impossible_settings_are_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        runs.compose(*overrides)


def test_rows_without_spread_are_refused():
    with pytest.raises(UserError, match="normalize.mode = whiten: these rows are all equal"):
        normalize.estimate(jnp.ones((10, 3)), NormMode.whiten)
