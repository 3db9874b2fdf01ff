"""Families over several sites against what they are on paper, written out naively."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sae_examples import K_AUX, SITES, moved

from saejax import sae
from saejax.sae import aux_k, sites

RNG = np.random.default_rng(5)
CLT = SITES["jumprelu clt"]
SKIP = SITES["topk transcoder"]
STEP = jnp.asarray(20)


def rows_of(config, n=48):
    return jnp.asarray(np.random.default_rng(2).standard_normal((n, config.d_row)) + 0.2, jnp.float32)


def alive(config):
    return jnp.zeros(config.d_sae, bool)


@functools.partial(jax.jit, static_argnums=0)
def loss_and_grads(config, params, rows):
    return jax.value_and_grad(lambda p: config.loss(p, rows, dead=alive(config), step=STEP), has_aux=True)(params)


@functools.partial(jax.jit, static_argnums=0)
def codes_and_recon(config, params, x):
    encoding = config.encode(params, x)
    return encoding.dense(), config.add_skip(params, config.decode(params, encoding), x)


def layers_one_by_one(params, x, widths, act):
    """A cross-layer transcoder as loops over source and target layers, in float64."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    n_layers, size = len(widths), p.b_enc.size // len(widths)
    d = x.shape[1] // n_layers
    latents, written = [], [np.zeros((len(x), w)) for w in widths]
    starts = np.cumsum([0, *widths])
    for layer in range(n_layers):
        own = slice(layer * size, (layer + 1) * size)
        pre = np.asarray(x, np.float64)[:, layer * d : (layer + 1) * d] @ p.W_enc[:, own] + p.b_enc[own]
        latents.append(act(p, pre, own))
    for target in range(n_layers):
        columns = slice(starts[target], starts[target + 1])
        for source in range(target + 1):
            written[target] += latents[source] @ p.W_dec[source * size : (source + 1) * size, columns]
        written[target] += p.b_dec[columns]
    return np.concatenate(latents, axis=1), np.concatenate(written, axis=1)


def test_a_cross_layer_transcoder_is_a_loop_over_layers():
    params = moved(CLT.init(jax.random.key(0)))
    x, _ = CLT.split(rows_of(CLT))

    def jump(p, pre, own):
        return np.where(pre > p.extra["threshold"][own], pre, 0)

    latents, recon = layers_one_by_one(params, x, CLT.writes, jump)
    found = codes_and_recon(CLT, params, x)
    # Sums of up to 72 products of O(1) numbers in float32.
    np.testing.assert_allclose(found[0], latents, atol=2e-5)
    np.testing.assert_allclose(found[1], recon, atol=2e-5)


def test_its_k_best_latents_compete_over_all_layers_and_their_gradient_is_dense_autodiff():
    config = sae.TopK(**K_AUX, d_in=24, d_sae=72, k=5, family=sae.Family.clt, sites=CLT.sites, aux_alpha=0)
    params, rows = moved(config.init(jax.random.key(0))), rows_of(config)
    dense = sae.L1(d_in=24, d_sae=72, l1_coef=0, family=sae.Family.clt, sites=CLT.sites, aux_alpha=0)

    def by_mask(params):
        x, target = config.split(rows)
        acts = jax.nn.relu(dense.pre_activations(params, x))
        kept = jnp.where(acts >= jnp.sort(acts, axis=1)[:, -5][:, None], acts, 0)
        return jnp.mean(jnp.sum((target - kept @ params.W_dec - params.b_dec[None, :]) ** 2, axis=1))

    (value, _), grads = loss_and_grads(config, params, rows)
    expected, expected_grads = jax.jit(jax.value_and_grad(by_mask))(params)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), grads, expected_grads)


@pytest.mark.parametrize("n_dead", [5, 40])
def test_aux_k_reads_each_dead_latents_own_site(n_dead):
    """Both of its forms equal the dense definition on the encoder spread over all sites."""
    params, rows = moved(CLT.init(jax.random.key(0))), rows_of(CLT)
    x, residual = CLT.split(rows)
    dead = jnp.zeros(72, bool).at[np.random.default_rng(0).permutation(72)[:n_dead]].set(True)

    def aux(W_enc, n_groups):
        weights = aux_k.Weights(W_enc, params.b_enc, params.W_dec)
        return aux_k.aux_k_loss(weights, x, residual, dead, aux_k.Settings(k_aux=8, n_groups=n_groups))

    def spread(W_enc):
        return jax.scipy.linalg.block_diag(*(W_enc[:, g * 24 : (g + 1) * 24] for g in range(3)))

    found = jax.jit(jax.value_and_grad(lambda W: aux(W, 3)))(params.W_enc)
    expected = jax.jit(jax.value_and_grad(lambda W: aux(spread(W), 1)))(params.W_enc)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)


def test_the_blocks_a_layer_cannot_write_are_zero_from_the_start_and_in_gradients():
    params, rows = CLT.init(jax.random.key(0)), rows_of(CLT)
    exists = np.zeros((72, 24), bool)
    for layer, start in enumerate((0, 6, 14)):
        exists[layer * 24 : (layer + 1) * 24, start:] = True
    np.testing.assert_array_equal(sites.mask(CLT), exists)
    np.testing.assert_array_equal(np.asarray(params.W_dec) != 0, exists)
    np.testing.assert_allclose(jnp.linalg.norm(params.W_dec, axis=1), 1, rtol=1e-6)
    _, raw = loss_and_grads(CLT, params, rows)
    assert np.any(np.asarray(raw.W_dec)[~exists])  # so that the projection has something to do
    assert not np.any(np.asarray(CLT.project(params, raw).W_dec)[~exists])
    assert not np.any(np.asarray(CLT.constrain(params.replace(W_dec=params.W_dec + 1)).W_dec)[~exists])


def test_a_transcoder_without_latents_follows_the_gradient_of_least_squares():
    rows = rows_of(SKIP)
    start = SKIP.init(jax.random.key(0))
    silent = start.replace(b_enc=jnp.full(64, -1e3), b_dec=jnp.linspace(-0.3, 0.3, 12))
    x, y = (np.asarray(part, np.float64) for part in SKIP.split(rows))
    centred = y - np.asarray(silent.b_dec)
    solution = np.linalg.lstsq(x, centred, rcond=None)[0]

    def at(W):
        params = silent.replace(extra={"W_skip": jnp.asarray(W, jnp.float32)})
        (_, aux), grads = loss_and_grads(SKIP, params, rows)
        np.testing.assert_allclose(aux.recon, x @ W + np.asarray(silent.b_dec), atol=1e-5)
        return np.asarray(grads.extra["W_skip"])

    np.testing.assert_allclose(at(np.zeros((16, 12))), -2 / 48 * x.T @ centred, atol=1e-5)
    W = RNG.standard_normal((16, 12))
    np.testing.assert_allclose(at(W), 2 / 48 * x.T @ x @ (W - solution), atol=2e-4)  # entries up to 5
    np.testing.assert_allclose(at(solution), 0, atol=1e-5)


def test_a_crosscoder_pays_the_sum_of_the_norms_in_its_sites():
    config = SITES["l1 crosscoder"]
    params, rows = moved(config.init(jax.random.key(0))), rows_of(config)
    (_, aux), _ = loss_and_grads(config, params, rows)
    latents, W = np.asarray(aux.encoding.dense(), np.float64), np.asarray(params.W_dec, np.float64)
    paid = sum(
        latents[row, i] * (np.sqrt(sum(W[i, :12] ** 2)) + np.sqrt(sum(W[i, 12:] ** 2)))
        for row in range(48)
        for i in range(64)
    )
    np.testing.assert_allclose(aux.terms["l1"], paid / 48, rtol=1e-5)
    # More than the norm of the whole row, but for latents that leave a site out.
    alone = params.replace(W_dec=params.W_dec.at[:, 12:].set(0))
    np.testing.assert_allclose(config.decoder_norms(alone), jnp.linalg.norm(alone.W_dec, axis=1), rtol=1e-6)
    assert np.all(config.decoder_norms(params) > 1.2 * jnp.linalg.norm(params.W_dec, axis=1).min())
    assert np.all(np.isfinite(loss_and_grads(config, alone, rows)[1].W_dec))


MEMBERS = {
    "gated transcoder": sae.Gated(d_in=10, d_sae=32, family=sae.Family.transcoder, sites=(6, 4, 5, 7)),
    "mlp transcoder": sae.TopK(
        d_in=10, d_sae=32, k=4, family=sae.Family.transcoder, sites=(10, 7), skip=True, encoder=sae.EncoderKind.mlp
    ),
    "gated clt": sae.Gated(d_in=12, d_sae=32, family=sae.Family.clt, sites=(6, 6, 5, 7)),
    "lista crosscoder": sae.L1(
        d_in=12, d_sae=32, family=sae.Family.crosscoder, sites=(8, 4), subtract_b_dec=True,
        encoder=sae.EncoderKind.lista,
    ),
    "mlp crosscoder": sae.L1(
        d_in=12, d_sae=32, family=sae.Family.crosscoder, sites=(8, 4), encoder=sae.EncoderKind.mlp
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MEMBERS)
def test_a_scale_for_each_site_folds_into_other_encoders_too(name):
    config = MEMBERS[name]
    params, rows = moved(config.init(jax.random.key(0))), rows_of(config)
    scale = np.repeat(0.5 * 2.0 ** np.arange(len(config.sites)), config.sites).astype(np.float32)
    mean = np.linspace(-1, 1, config.d_row, dtype=np.float32)
    folded = jax.jit(config.fold)(params, mean=jnp.asarray(mean), scale=jnp.asarray(scale))
    x, inside = config.split(rows)[0], config.split((rows - mean[None, :]) * scale[None, :])[0]
    found, expected = codes_and_recon(config, folded, x), codes_and_recon(config, params, inside)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-4, atol=1e-4)
    undone = expected[1] / config.split(scale)[1][None, :] + config.split(mean)[1][None, :]
    np.testing.assert_allclose(found[1], undone, rtol=1e-4, atol=2e-4)


def test_what_users_hold_takes_rows_apart_and_needs_the_input_of_a_skip():
    params, rows = moved(SKIP.init(jax.random.key(0))), rows_of(SKIP)
    trained = sae.SAE(SKIP, params)
    x, target = trained.split(rows.reshape(4, 12, 28))
    assert trained.sites == (16, 12) and x.shape == (4, 12, 16) and target.shape == (4, 12, 12)
    np.testing.assert_array_equal(jnp.concatenate([x, target], axis=2).reshape(48, 28), rows)
    latents = trained.encode(x)
    assert latents.shape == (4, 12, 64)
    np.testing.assert_allclose(trained.decode(latents, x), trained(x), atol=2e-5)
    flat = x.reshape(48, 16)
    np.testing.assert_allclose(trained.decode(trained.encoding(flat), flat), trained(flat), atol=2e-5)
    for given in (latents, trained.encoding(flat)):
        with pytest.raises(ValueError, match="decode needs x as well"):
            trained.decode(given)
    with pytest.raises(ValueError, match=r"must be d_in=16, got shape \(48, 28\)"):
        trained(rows)
    plain = sae.SAE(dataclasses.replace(SKIP, skip=False), params)
    assert plain.decode(latents).shape == (4, 12, 12)
    one = sae.SAE(sae.TopK(d_in=8, d_sae=16, k=2), None)  # pyright: ignore[reportArgumentType]
    assert one.sites == (8,) and one.split(np.ones((3, 8)))[0].shape == (3, 8)
