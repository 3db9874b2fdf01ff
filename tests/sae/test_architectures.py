"""What holds for every registered architecture."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sae_examples import EXAMPLES, VARIANTS

from saejax import sae
from saejax.errors import UserError

STEP = jnp.zeros((), jnp.int32)
# Sums of up to 64 products of O(1) numbers in float32, in either order.
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


def alive(config):
    """No latent is dead."""
    return jnp.zeros(config.d_sae, bool)


def columns(config, params):
    """The encoder with every latent's column over all that is read, zeros where it does not read."""
    if config.family is not sae.Family.clt:
        return params.W_enc
    size = config.d_sae // config.n_groups
    blocks = [params.W_enc[:, g * size : (g + 1) * size] for g in range(config.n_groups)]
    return jax.scipy.linalg.block_diag(*blocks)


def naive_pre_acts(config, params, x, activate):
    """What the encoder gives, written out."""
    centred = x - params.b_dec[None, :] if config.subtract_b_dec and config.mirrors else x
    if config.encoder is sae.EncoderKind.mlp:
        centred = jax.nn.relu(centred @ params.extra["W_hidden"] + params.extra["b_hidden"][None, :])
    pre_acts = centred @ columns(config, params) + params.b_enc[None, :]
    if config.encoder is sae.EncoderKind.lista:
        for _ in range(config.encoder_steps - 1):
            z = activate(pre_acts)
            pre_acts = z + (centred - z @ params.W_dec) @ params.W_enc + params.b_enc[None, :]
    return pre_acts


def largest(a, k):
    """Entries that are at least the k-th largest of their row."""
    return a >= jnp.sort(a, axis=1)[:, -k][:, None]


def surrogate_jump(config, u, threshold):
    """JumpReLU and its step as functions whose ordinary derivative is the pseudo-derivative of the papers."""
    fixed = jax.lax.stop_gradient
    t = threshold[None, :]
    window = fixed((jnp.abs(u - t) < config.bandwidth / 2) / config.bandwidth)
    drift = (u - fixed(u)) * config.ste_to_input - (t - fixed(t))
    return jnp.where(u > t, u, 0) + fixed(t) * window * drift, (u > t) + window * drift


def naive_pursuit(config, params, pre_acts):
    latents, scores = 0.0, pre_acts
    for _ in range(config.k):
        chosen = jax.nn.one_hot(jnp.argmax(scores, axis=1), config.d_sae)
        latents = latents + chosen * jax.nn.relu(scores)
        scores = pre_acts - (latents @ params.W_dec) @ params.W_dec.T
    return latents


def naive_latents(config, params, pre_acts, k):
    """Training latents of given pre-activations."""
    acts = jax.nn.relu(pre_acts)
    match config:
        case sae.TopK() | sae.Matryoshka(selection=sae.Selection.topk):
            return jnp.where(largest(pre_acts, k), acts, 0)
        case sae.AbsTopK():
            return jnp.where(largest(jnp.abs(pre_acts), k), pre_acts, 0)
        case sae.BatchTopK() | sae.Matryoshka():
            return jnp.where(acts >= jnp.sort(acts.ravel())[-k * len(acts)], acts, 0)
        case sae.JumpReLU():
            return surrogate_jump(config, pre_acts, params.extra["threshold"])[0]
        case sae.Gated():
            sizes = jnp.exp(params.extra["r_mag"])[None, :] * (pre_acts - params.b_enc[None, :])
            return (pre_acts > 0) * jax.nn.relu(sizes + params.extra["b_mag"][None, :])
        case sae.MatchingPursuit():
            return naive_pursuit(config, params, pre_acts)
    return acts


def naive_loss(config, params, rows, *, step):
    """The loss as the papers write it: dense latents, no kernels, autodiff."""
    x, target = (rows, rows) if config.mirrors else (rows[:, : config.d_in], rows[:, config.d_in :])
    if config.skip:
        target = target - x @ params.extra["W_skip"]
    k = getattr(config, "k", None)
    if getattr(config, "k_start", None):
        k = round(config.k_start + (config.k - config.k_start) * step / config.k_anneal_steps)

    def latents_of(params, k):
        def activate(pre_acts):
            return naive_latents(config, params, pre_acts, k)

        pre_acts = naive_pre_acts(config, params, x, activate)
        return pre_acts, activate(pre_acts)

    def error(latents, p=params):
        return jnp.mean(jnp.sum((target - latents @ p.W_dec - p.b_dec[None, :]) ** 2, axis=1))

    def mean(a):
        return jnp.mean(jnp.sum(a, axis=1))

    pre_acts, latents = latents_of(params, k)
    norms, warm = jnp.linalg.norm(params.W_dec, axis=1)[None, :], min(step / 10, 1.0)
    if config.family is sae.Family.crosscoder:
        parts = jnp.split(params.W_dec, np.cumsum(config.sites)[:-1], axis=1)
        norms = sum(jnp.linalg.norm(part, axis=1) for part in parts)[None, :]
    match config:
        case sae.TopK(multi_topk_alpha=alpha) if alpha:
            return error(latents) + alpha * error(latents_of(params, 4 * k)[1])
        case sae.L1(penalty=sae.Penalty.plain):
            return error(latents) + config.l1_coef * warm * mean(latents)
        case sae.L1():
            return error(latents) + config.l1_coef * warm * mean(latents * norms)
        case sae.JumpReLU(penalty=sae.SparsityPenalty.tanh):
            silent = jax.nn.relu(params.extra["threshold"][None, :] - pre_acts)
            paid = config.l0_coef * mean(jnp.tanh(4 * latents * norms))
            return error(latents) + paid + config.pre_act_coef * mean(silent * norms)
        case sae.JumpReLU():
            steps = surrogate_jump(config, pre_acts, params.extra["threshold"])[1]
            return error(latents) + config.l0_coef * warm * mean(steps)
        case sae.Gated():
            held = jax.tree.map(jax.lax.stop_gradient, params)
            held = params.replace(W_dec=held.W_dec, b_dec=held.b_dec)
            warm = warm if config.l1_warmup_steps else 1.0
            gate = jax.nn.relu(latents_of(held, k)[0])
            return error(latents) + config.l1_coef * warm * mean(jax.nn.relu(pre_acts)) + error(gate, held)
        case sae.Matryoshka():
            index = jnp.arange(config.d_sae)[None, :]
            return sum(error(latents * (index < width)) for width in config.widths) / len(config.widths)
        case sae.PAnneal():
            p = 1 + (config.p_end - 1) * step / config.anneal_steps
            powers = mean(jnp.where(latents > 0, (latents + 1e-6) ** p, 0))
            return error(latents) + config.l1_coef * warm * powers * jax.lax.stop_gradient(mean(latents) / powers)
    return error(latents)


def test_every_architecture_has_an_example():
    assert {config.name for config in EXAMPLES.values()} == set(EXAMPLES) == set(sae.ARCHITECTURES)


def test_init_shapes_and_norms(sparsifier, x):
    p = sparsifier.init(jax.random.key(0))
    d, n, out = sparsifier.d_in // sparsifier.n_groups, sparsifier.d_sae, sparsifier.d_out
    read = 40 if sparsifier.encoder is sae.EncoderKind.mlp else d
    shapes = {f: getattr(p, f).shape for f in ("W_enc", "b_enc", "W_dec", "b_dec")}
    assert shapes == {"W_enc": (read, n), "b_enc": (n,), "W_dec": (n, out), "b_dec": (out,)}
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(p))
    if not sparsifier.mirrors:
        np.testing.assert_allclose(jnp.linalg.norm(p.W_enc, axis=0), sparsifier.decoder_init_norm, rtol=1e-5)
    elif sparsifier.encoder in (sae.EncoderKind.linear, sae.EncoderKind.tied):
        np.testing.assert_array_equal(p.W_enc, p.W_dec.T)
    if sparsifier.mirrors and sparsifier.encoder is not sae.EncoderKind.lista:  # a hidden layer starts linear
        np.testing.assert_allclose(sparsifier.pre_activations(p, x), x @ p.W_dec.T, **CLOSE)
    np.testing.assert_allclose(jnp.linalg.norm(p.W_dec, axis=1), sparsifier.decoder_init_norm, rtol=1e-5)


@pytest.mark.parametrize("kind", sae.EncoderKind)
def test_independent_encoder_has_its_own_directions(kind):
    own = sae.TopK(d_in=16, d_sae=64, encoder=kind, encoder_init=sae.EncoderInit.independent)
    p = own.init(jax.random.key(0))
    map_of = own.pre_activations(p, jnp.eye(16))
    cosine = jnp.sum(map_of.T * p.W_dec, axis=1) / jnp.linalg.norm(map_of, axis=0)
    if kind is sae.EncoderKind.tied:
        np.testing.assert_allclose(cosine, 1, rtol=1e-5)
    else:
        assert abs(float(jnp.mean(cosine))) < 0.15  # 64 random pairs in 16 dimensions: sd 1/32


def test_encode_and_decode(sparsifier, params, x):
    encoding = sparsifier.encode(params, sparsifier.split(x)[0])
    latents = encoding.dense()
    assert latents.shape == (x.shape[0], sparsifier.d_sae)
    assert (float(latents.min()) < 0) == sparsifier.signed
    np.testing.assert_array_equal(encoding.l0(), jnp.sum(latents != 0, axis=1))
    np.testing.assert_array_equal(encoding.fired(), jnp.any(latents != 0, axis=0))
    assert 0 < int(jnp.sum(latents != 0)) < latents.size  # both kinds are there
    if encoding.values is not None:
        assert float(encoding.l0().max()) <= sparsifier.k
    recon = sparsifier.decode(params, encoding)
    np.testing.assert_allclose(recon, latents @ params.W_dec + params.b_dec[None, :], **CLOSE)
    dense = sparsifier.decode(params, sae.Encoding(latents=latents, d_sae=sparsifier.d_sae))
    np.testing.assert_allclose(recon, dense, **CLOSE)


def test_permuting_latents_permutes_the_code_and_nothing_else(sparsifier, params, x):
    size = sparsifier.d_sae // sparsifier.n_groups  # within the groups of a cross-layer transcoder
    order = np.concatenate([g * size + np.random.default_rng(g).permutation(size) for g in range(sparsifier.n_groups)])
    x, _ = sparsifier.split(x)
    extra = {name: a[order] if a.shape == order.shape else a for name, a in params.extra.items()}
    shuffled = params.replace(
        W_enc=params.W_enc[:, order], b_enc=params.b_enc[order], W_dec=params.W_dec[order], extra=extra
    )
    before, after = sparsifier.encode(params, x), sparsifier.encode(shuffled, x)
    np.testing.assert_allclose(after.dense(), before.dense()[:, order], **CLOSE)
    np.testing.assert_allclose(sparsifier.decode(shuffled, after), sparsifier.decode(params, before), **CLOSE)


def test_loss_and_gradients_equal_the_naive_dense_form(sparsifier, params, x):
    """Gradients of the parameters and of the data."""

    def mine(params, x, step):
        return sparsifier.loss(params, x, dead=alive(sparsifier), step=step)

    def naive(params, x):
        return naive_loss(sparsifier, params, x, step=4)

    (value, aux), grads = jax.jit(jax.value_and_grad(mine, argnums=(0, 1), has_aux=True))(params, x, jnp.asarray(4))
    expected, expected_grads = jax.jit(jax.value_and_grad(naive, argnums=(0, 1)))(params, x)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), grads, expected_grads)
    target = sparsifier.split(x)[1]
    np.testing.assert_allclose(aux.terms["mse"], jnp.mean(jnp.sum((target - aux.recon) ** 2, axis=1)), rtol=1e-5)


@pytest.mark.parametrize("name", ["topk", "l1", "l1 mlp", "gated"])
def test_bfloat16_products_stay_near_float32(name, x):
    single = (EXAMPLES | VARIANTS)[name]
    half, params = dataclasses.replace(single, matmul_dtype=sae.MatmulDtype.bfloat16), single.init(jax.random.key(0))
    low, aux = half.loss(params, x, dead=alive(half), step=STEP)
    high, _ = single.loss(params, x, dead=alive(half), step=STEP)
    assert aux.recon.dtype == jnp.float32
    assert 0 < abs(float(low - high)) / float(high) < 0.02  # operands carry 8 bits: 2^-8 each


@pytest.mark.parametrize("name", EXAMPLES)
def test_gradients_of_bfloat16_products_compile(name, x):
    """Every architecture trains with them on this device, whatever its compiler does with the products."""
    half = dataclasses.replace(EXAMPLES[name], matmul_dtype=sae.MatmulDtype.bfloat16)
    params = half.init(jax.random.key(0))
    (loss, _), grads = jax.jit(lambda p, rows: half.value_and_grad(p, rows, dead=alive(half), step=STEP))(params, x)
    assert np.isfinite(loss)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(grads))


def test_folding_moves_the_normalisation_into_the_parameters(sparsifier, params, x):
    # One number, or one for each site; then the latents stay as in training.
    scale, unit = np.float32(0.25), 0.25
    if sparsifier.sites:
        scale, unit = np.repeat(0.25 * 2.0 ** np.arange(len(sparsifier.sites)), sparsifier.sites).astype("float32"), 1
    mean = jnp.linspace(-1.0, 2.0, sparsifier.d_row)
    (read, _), (x, _) = sparsifier.split((x - mean[None, :]) * scale.reshape(1, -1)), sparsifier.split(x)
    folded = sparsifier.fold(params, mean=mean, scale=jnp.asarray(scale))
    inside, outside = sparsifier.encode(params, read), sparsifier.encode(folded, x)
    np.testing.assert_allclose(outside.dense() * unit, inside.dense(), rtol=1e-4, atol=1e-4)
    inside = sparsifier.add_skip(params, sparsifier.decode(params, inside), read)
    outside = sparsifier.add_skip(folded, sparsifier.decode(folded, outside), x)
    undone = inside / sparsifier.split(scale * np.ones(sparsifier.d_row, "float32"))[1][None, :]
    np.testing.assert_allclose(outside, undone + sparsifier.split(mean)[1][None, :], rtol=1e-4, atol=1e-4)
    # The inverse normalisation undoes it.
    back = sparsifier.fold(folded, mean=-mean * scale, scale=jnp.asarray(1 / scale))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), back, params)


@functools.cache
def both_gradients(sparsifier):
    """Autodiff of the loss, and what the architecture gives; compiled once for any number of dead latents."""

    def of_the_loss(params, x, dead):
        return jax.value_and_grad(lambda p: sparsifier.loss(p, x, dead=dead, step=STEP), has_aux=True)(params)

    return jax.jit(of_the_loss), jax.jit(lambda p, x, dead: sparsifier.value_and_grad(p, x, dead=dead, step=STEP))


@pytest.mark.parametrize("n_dead", [0, 3, 20])
def test_value_and_grad_is_that_of_the_loss(sparsifier, params, x, n_dead):
    # None dead, at most k_aux = 8 of them, more than that.
    dead = jnp.arange(sparsifier.d_sae) % 3 == 0
    dead &= jnp.cumsum(dead) <= n_dead
    wanted, found = (gradients(params, x, dead) for gradients in both_gradients(sparsifier))
    # The same sums in another order: some roundings of the largest entry.
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6 * max(1, np.abs(want).max(initial=0)))


def test_project_keeps_the_constraint_to_first_order(sparsifier, params, x):
    grads = jax.jit(jax.grad(lambda p: sparsifier.loss(p, x, dead=alive(sparsifier), step=STEP)[0]))(params)
    once = sparsifier.project(params, grads)
    free = jax.tree.map(lambda p, g: p - 1e-3 * g, params, once)
    held = sparsifier.constrain(free)
    if sparsifier.encoder is sae.EncoderKind.tied:
        np.testing.assert_array_equal(held.W_enc, held.W_dec.T)
        assert not np.any(once.W_enc)  # its gradient moved to the decoder
        held = held.replace(W_enc=free.W_enc)
    # What the constraint changes is of second order in the step.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), held, free)
    twice = sparsifier.project(params, once)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), twice, once)


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("topk", {"k": 999}, "sae.k must be in [1, d_sae=64], got 999"),
        ("topk", {"k": 0}, "sae.k must be in [1, d_sae=64], got 0"),
        ("topk", {"k_aux": 65}, "sae.k_aux must be null or in [1, d_sae=64], got 65"),
        ("topk", {"aux_alpha": -1.0}, "sae.aux_alpha must be at least 0, got -1.0"),
        ("topk", {"d_sae": 0}, "sae.d_sae must be at least 1, got 0"),
        ("l1", {"l1_coef": -0.5}, "sae.l1_coef must be at least 0, got -0.5"),
        ("l1", {"l1_warmup_steps": -1}, "sae.l1_warmup_steps must be at least 0, got -1"),
        ("l1", {"decoder_init_norm": 0.0}, "sae.decoder_init_norm must be above 0, got 0.0"),
        ("l1", {"penalty": sae.Penalty.plain}, "sae.unit_decoder must be true with penalty=plain, got False"),
        ("topk", {"decoder_init_norm": 0.1}, "sae.decoder_init_norm must be 1 with unit_decoder=true, got 0.1"),
        ("topk", {"k_start": 65}, "sae.k_start must be null or in [1, d_sae=64], got 65"),
        (
            "topk",
            {"encoder": sae.EncoderKind.mlp, "encoder_hidden": 31},
            "sae.encoder_hidden must be null or at least 32 (2 d_in) for encoder_init=transpose, got 31",
        ),
        ("topk", {"encoder": "deep"}, "sae.encoder must be one of linear, tied, mlp, lista, got deep"),
        ("topk", {"sites": (8, 8)}, "sae.family must be transcoder, crosscoder or clt for rows of 2 sites, got sae"),
        ("topk", {"sites": (8,)}, "sae.d_in must be 8, the width that is read of sae.sites=(8,), got 16"),
        ("topk", {"family": "moe"}, "sae.family must be one of sae, transcoder, crosscoder, clt, got moe"),
        (
            "topk",
            {"family": sae.Family.transcoder, "sites": (16, 4, 4)},
            "sae.sites must be an even number of widths for family=transcoder, got (16, 4, 4)",
        ),
        (
            "topk",
            {"family": sae.Family.crosscoder},
            "sae.sites must be two widths or more for family=crosscoder, got ()",
        ),
        (
            "topk",
            {"family": sae.Family.clt, "sites": (8, 8, 8, 8), "d_sae": 63},
            "sae.d_sae must be a multiple of the 2 layers for family=clt, got 63",
        ),
        (
            "topk",
            {"family": sae.Family.clt, "sites": (10, 6, 8, 8)},
            "sae.sites must read sites of one width for family=clt, got (10, 6)",
        ),
        ("topk", {"skip": True}, "sae.skip must be false but for family=transcoder, got True"),
        (
            "topk",
            {"family": sae.Family.transcoder, "sites": (16, 16), "encoder": sae.EncoderKind.tied},
            "sae.encoder must be linear or mlp for family=transcoder, got tied",
        ),
        (
            "matryoshka",
            {"family": sae.Family.clt, "sites": (8, 8, 8, 8)},
            "sae.family must not be clt: its first latents read the first layer alone, got clt",
        ),
        (
            "matching_pursuit",
            {"family": sae.Family.crosscoder, "sites": (8, 8)},
            "sae.family must be sae: the scales of several sites would change its dictionary, got crosscoder",
        ),
        ("l1", {"matmul_dtype": "fp8"}, "sae.matmul_dtype must be one of float32, bfloat16, got fp8"),
    ],
)
def test_config_errors_name_the_field(name, wrong, message):
    valid = {"d_in": 16, "d_sae": 64}
    with pytest.raises(UserError) as caught:
        sae.ARCHITECTURES[name](**(valid | wrong))
    assert str(caught.value) == message


def test_config_is_static(sparsifier):
    assert hash(sparsifier) == hash(dataclasses.replace(sparsifier))
    with pytest.raises(dataclasses.FrozenInstanceError):
        sparsifier.d_in = 3
