"""Runs over several sites: normalised site by site, judged, saved, resumed, loaded; blocks of zeros stay zero."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import site_runs as runs

import saejax
from saejax import config, interop, sparse_coding
from saejax.activations import normalize
from saejax.activations.normalize import NormMode
from saejax.errors import UserError
from saejax.evals import evaluate, language_model
from saejax.parallel import sharding
from saejax.runs import run
from saejax.sae import sites
from saejax.training import liveness, optim, resample, start, state, step

RNG = np.random.default_rng(0)
ROWS = (RNG.normal(size=(400, 9)) * np.repeat([0.1, 3.0, 50.0], 3) + np.repeat([1.0, 0.0, -9.0], 3)).astype(np.float32)


def quick(name):
    """Families as a parameter of a test; those not named run nightly."""
    return [f if f in name else pytest.param(f, marks=pytest.mark.nightly) for f in runs.FAMILIES]


@pytest.mark.parametrize("center", [False, True])
def test_every_site_is_normalised_by_itself(center):
    found = normalize.estimate(ROWS, NormMode.unit, center=center, sites=(3, 3, 3))
    assert found.scale.shape == (9,)
    y = np.asarray(normalize.apply(found, ROWS)).reshape(-1, 3, 3)
    np.testing.assert_allclose(np.square(y).sum(2).mean(0), 1, rtol=1e-5)
    for site in range(3):
        alone = normalize.estimate(ROWS[:, 3 * site : 3 * site + 3], NormMode.unit, center=center)
        np.testing.assert_array_equal(np.asarray(found.scale).reshape(3, 3)[site], np.full(3, alone.scale))
    np.testing.assert_allclose(normalize.invert(found, normalize.apply(found, ROWS)), ROWS, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(normalize.estimate(ROWS, NormMode.none, sites=(4, 5)).scale, np.ones(9))


@pytest.mark.parametrize("family", quick(["transcoder"]))
def test_a_run_is_saved_and_goes_on_to_the_same_bits_and_what_it_says_is_what_is_loaded(family, tmp_path):
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    cfg = runs.compose(family, 6, "checkpoint.save_every_steps=3", "checkpoint.keep_last=9")
    outcome = runs.train(straight, cfg)
    shutil.copytree(straight, stopped)
    shutil.rmtree(stopped / "checkpoints" / "6")
    (stopped / "metrics.jsonl").write_text("")
    assert runs.train(stopped, config.from_run(stopped), resume=True).step == 6
    a, b = runs.saved(straight, 6), runs.saved(stopped, 6)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    # What the run measured on its normalised rows is what the loaded SAE does to the rows themselves.
    sae, rows = run.load(straight), runs.heldout(cfg)
    x, target = sae.split(rows)
    residual = np.asarray(target - sae(x), np.float64)
    spread = np.square(target - np.mean(target, axis=0, keepdims=True))
    assert outcome.evaluation["fvu"] == pytest.approx(np.sum(residual**2) / np.sum(spread), rel=1e-4)
    edges = np.cumsum([0, *sae.config.writes])
    apart = {
        f"fvu_site_{i}": np.sum(residual[:, a:b] ** 2) / np.sum(spread[:, a:b])
        for i, (a, b) in enumerate(zip(edges, edges[1:], strict=False))
    }
    found = {key: value for key, value in outcome.evaluation.items() if key.startswith("fvu_site")}
    assert found == pytest.approx(apart if len(apart) > 1 else {}, rel=1e-4)
    measured = saejax.evaluate(sae, rows, metrics=evaluate.light_metrics(sae.config))
    assert measured == pytest.approx(dict(outcome.evaluation), rel=1e-4)
    if sae.config.skip:
        with pytest.raises(UserError, match="sae.skip cannot change on resume: the run has True, got False"):
            runs.train(straight, config.from_run(straight, ["sae.skip=false"]), resume=True)


def created(cfg, mesh):
    """A new state, its compiled step and a stream of records on a mesh."""
    tx = optim.make(cfg.optim, 20, cfg.sae.lr_scales())
    rng = np.random.default_rng(0)
    features = np.random.default_rng(1).normal(size=(30, cfg.sae.d_row))

    def record(*lead):
        codes = rng.random((8, *lead, 8, 30)) * (rng.random((8, *lead, 8, 30)) < 0.1)
        return jax.device_put((codes @ features).astype(np.float32), jax.NamedSharding(mesh, jax.P(sharding.DATA)))

    made = step.make(
        cfg.sae,
        tx,
        dead_window_tokens=cfg.train.dead_window_tokens,
        learning_rate=optim.schedule(cfg.optim, 20),
        resample_every_steps=cfg.train.resample_every_steps,
    )
    born = state.create(cfg.sae, tx, cfg.train, cfg.normalize, record(4), seed=0, mesh=mesh)
    return born, jax.jit(made, out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, born), None)), record


@pytest.mark.nightly
@pytest.mark.parametrize("family", runs.FAMILIES)
def test_losses_and_parameters_do_not_depend_on_the_mesh_and_one_compilation_serves_all_steps(family):
    cfg = runs.compose(family, 20, "optim.warmup_share=0", "sae.aux_alpha=0.1")
    found = []
    for shape in ((1, 1), (4, 2), (2, 4)):
        mesh = sharding.make_mesh(*shape)
        with jax.set_mesh(mesh):
            now, compiled, record = created(cfg, mesh)
            born, losses = jax.device_get(now.params), []
            for _ in range(5):
                now, metrics = compiled(now, record())
                losses.append(float(metrics["loss"]))
        assert compiled._cache_size() <= 2  # a second entry where only outputs are committed to their devices
        found.append((losses, jax.device_get(now.params)))
        assert np.abs(found[-1][1].W_enc - born.W_enc).max() > 1e-3  # ten times what may differ below
    for losses, params in found[1:]:
        np.testing.assert_allclose(losses, found[0][0], rtol=1e-5)
        # Adam divides by the root of a running square: rounding of near-zero gradients is seen at the scale of lr.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), params, found[0][1])


@pytest.mark.parametrize(
    "name", [o.name if o.name == "adam" else pytest.param(o.name, marks=pytest.mark.nightly) for o in optim.Optimiser]
)
def test_blocks_that_a_cross_layer_transcoder_lacks_stay_zero_through_steps_and_resampling(name):
    overrides = ("train.resample_every_steps=2", "train.dead_after_tokens=64", f"optim.name={name}")
    cfg = runs.compose("clt", 20, "optim.warmup_share=0", *overrides)
    now, compiled, record = created(cfg, sharding.make_mesh())
    never = now.params.b_enc.at[jnp.array([0, 20, 40])].set(-1e3)
    placed = jax.device_put(never, now.params.b_enc.sharding)
    # In the iterates of schedule_free as well: its first step starts from those.
    iterates = optim.map_iterates(now.opt_state, lambda params: params.replace(b_enc=jnp.copy(placed)))
    now, resampled = now.replace(params=now.params.replace(b_enc=placed), opt_state=iterates), 0
    exists = np.asarray(sites.mask(cfg.sae))
    before = np.asarray(now.params.W_dec)
    for _ in range(4):
        now, metrics = compiled(now, record())
        resampled += int(metrics["resampled"])
    assert resampled >= 3
    for params in (now.params, now.chosen):
        W_dec = np.asarray(params.W_dec)
        assert not np.any(W_dec[~exists])
        np.testing.assert_allclose(np.linalg.norm(W_dec, axis=1), 1, rtol=1e-5)
    assert np.all(np.any(np.asarray(now.params.W_dec) != before, axis=1))


def test_resampled_latents_read_and_write_the_row_that_they_were_given():
    cfg = runs.compose("clt", 20)
    born, _, _ = created(cfg, sharding.make_mesh())
    rows = jnp.asarray(RNG.normal(size=(64, cfg.sae.d_row)), jnp.float32)
    x, target = (np.asarray(part) for part in cfg.sae.split(rows))
    recon = jnp.asarray(target).at[7].add(1.0)  # only row 7 is wrong
    dead = jnp.zeros(48, bool).at[20].set(True)
    after, count = jax.jit(resample.apply, static_argnums=0)(cfg.sae, born, rows, recon, dead, jax.random.key(0))
    assert int(count) == 1 and int(after.liveness.tokens_since_fired[20]) == 0
    read = (x - x.mean(0))[7, 8:16]  # latent 20 of 48 is of the second layer
    written = np.where(np.arange(24) < 6, 0, target[7] - np.asarray(born.params.b_dec))
    column, row = np.asarray(after.params.W_enc)[:, 20], np.asarray(after.params.W_dec)[20]
    np.testing.assert_allclose(column / np.linalg.norm(column), read / np.linalg.norm(read), atol=1e-5)
    np.testing.assert_allclose(row, written / np.linalg.norm(written), atol=1e-5)
    same = np.arange(48) != 20
    np.testing.assert_array_equal(after.params.W_dec[same], born.params.W_dec[same])
    assert liveness.dead(after.liveness, 1).sum() == 0


def test_biases_calibrated_on_each_latents_own_site_fire_at_the_rate():
    config = runs.compose("clt", 20).sae
    params, x = config.init(jax.random.key(0)), jnp.asarray(RNG.normal(size=(256, 24)), jnp.float32)
    b_enc = jax.jit(start.encoder_bias, static_argnums=(0, 3))(config, params, x, 0.25)
    fired = np.mean(np.asarray(config.encode(params.replace(b_enc=b_enc), x).dense()) > 0, axis=0)
    np.testing.assert_allclose(fired, 0.25, atol=1.5 / 256)  # a row on either side of the quantile


@pytest.mark.parametrize("mode", ["whiten", "layer_norm"])
def test_normalisations_of_whole_rows_are_refused(mode):
    with pytest.raises(UserError, match=f"normalize.mode={mode} is for rows of one site, these have 2"):
        runs.compose("transcoder", 4, f"normalize.mode={mode}")


def test_sites_must_be_those_of_the_source_and_commands_say_what_they_do_not_take():
    with pytest.raises(UserError, match=r"sae.sites must be those of the source, \(16, 12\), got \(12, 16\)"):
        runs.compose("transcoder", 4, "sae.sites=[12,16]")
    with pytest.raises(UserError, match="the sum of sae.sites must equal the width of the source, 28, got 30"):
        runs.compose("transcoder", 4, "sae.sites=[15,15]")
    with pytest.raises(UserError, match="sae.family must be transcoder, crosscoder or clt for rows of 2 sites"):
        runs.compose("transcoder", 4, "sae.family=sae", "sae.skip=false")
    cfg = runs.compose("clt", 4)
    sae = saejax.sae.model.SAE(cfg.sae, cfg.sae.init(jax.random.key(0)))
    x = np.zeros((2, cfg.sae.d_in), np.float32)
    with pytest.raises(UserError, match="sae.family=clt does not write what it reads"):
        sparse_coding.encode(sae, x)
    with pytest.raises(UserError, match="sae.family=clt cannot be spliced"):
        language_model.evaluate_language_model(sae, None, [], hook="blocks.0.hook_resid_post")
    for name, format in interop.FORMATS.items():
        if format.export is not None:
            with pytest.raises(UserError):
                interop.export(sae, "/nonexistent/never", name)


def one_of_each(n_rows):
    """Rows in which one of eight features is active, [n, 8], with amplitudes in [0.5, 1.5]."""
    codes = np.zeros((n_rows, 8), np.float32)
    codes[np.arange(n_rows), RNG.integers(8, size=n_rows)] = RNG.uniform(0.5, 1.5, n_rows)
    return codes


def orthonormal():
    """Eight orthonormal directions in 12 dimensions."""
    return np.linalg.qr(RNG.normal(size=(12, 12)))[0][:8].astype(np.float32)


@pytest.mark.nightly
@pytest.mark.parametrize("family", ["transcoder", "crosscoder", "clt"])
def test_arrays_of_concatenated_sites_are_learned_end_to_end(family, tmp_path):
    """Eight features at a layer hold an eighth of the variance each (that of the mean left out, 1/8 of a^2).

    A predictor without latents has fvu 1; with the share c_i of feature i explained, fvu is 1 - mean c_i to that
    accuracy, so fvu < 0.25 says that at least six of eight features were found.
    """
    codes = [one_of_each(4000), one_of_each(4000)]
    if family == "clt":
        written = [codes[0] @ orthonormal(), codes[0] @ orthonormal() + codes[1] @ orthonormal()]
        parts, k = [*(c @ orthonormal() for c in codes), *written], 2
    else:
        parts, k = [codes[0] @ orthonormal(), 10 * codes[0] @ orthonormal()], 1
    np.save(tmp_path / "rows.npy", np.concatenate(parts, axis=1))
    cfg = config.load(
        "train",
        config.Config,
        [
            "source=arrays", f"source.path={tmp_path}/rows.npy", "sae=topk", f"sae.k={k}", "sae.d_sae=32",
            f"sae.family={family}", f"sae.sites={[12] * len(parts)}".replace(" ", ""), "train.n_tokens=51200",
            "train.batch=128", "buffer.rows=1024", "optim.lr=0.01", "train.eval_every_steps=null",
            "train.eval_rows=200", "train.dead_after_tokens=1024",
        ],
    )  # fmt: skip
    outcome = runs.train(tmp_path / "run", cfg)
    assert outcome.evaluation["fvu"] < 0.25
    for site in range(len(cfg.sae.writes) if len(cfg.sae.writes) > 1 else 0):
        assert outcome.evaluation[f"fvu_site_{site}"] < 0.35, "no site is left out"
