"""What moves without a gradient (thresholds, schedules, tied encoders), and matching pursuit by its own laws."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sae_examples import EXAMPLES, VARIANTS

from saejax import sae

ALIVE = jnp.zeros(64, bool)


@pytest.mark.parametrize("name", ["batch_topk", "matryoshka"])
def test_threshold_is_the_running_mean_of_the_smallest_latent_kept(name, x):
    config = EXAMPLES[name]
    params = config.init(jax.random.key(0))
    batches = [x, 2 * x, -x]
    smallest = []
    for n, batch in enumerate(batches):
        _, aux = config.loss(params, batch, dead=ALIVE, step=jnp.asarray(n))
        latents = np.asarray(aux.encoding.latents)
        assert np.sum(latents > 0) == config.k * len(batch)  # no ties here
        smallest.append(latents[latents > 0].min())
        params = config.track(params, aux, jnp.asarray(n))
    expected = smallest[0]
    for value in smallest[1:]:
        expected += 0.01 * (value - expected)
    np.testing.assert_allclose(params.extra["threshold"], expected, rtol=1e-6)
    silent = sae.Aux(recon=x, encoding=sae.Encoding(latents=jnp.zeros((3, 64)), d_sae=64), terms={})
    np.testing.assert_array_equal(config.track(params, silent, 3).extra["threshold"], params.extra["threshold"])


def test_inference_uses_the_threshold_and_before_any_step_the_batch(x):
    config = EXAMPLES["batch_topk"]
    params = config.init(jax.random.key(0))
    in_training = config.code(params, x, jnp.asarray(0)).dense()
    np.testing.assert_array_equal(config.encode(params, x).dense(), in_training)
    acts = np.maximum(config.pre_activations(params, x), 0)
    tracked = params.replace(extra={"threshold": jnp.asarray(acts[0].max())})
    # Strictly above: the latent that is equal stays silent.
    np.testing.assert_array_equal(config.encode(tracked, x).dense(), np.where(acts > acts[0].max(), acts, 0))


def test_tied_encoder_stays_the_decoder_through_steps(x):
    config, tx = VARIANTS["topk tied"], optax.adam(1e-2)
    params = config.init(jax.random.key(0))

    @jax.jit
    def step(params, opt):
        grads = jax.grad(lambda p: config.loss(p, x, dead=ALIVE, step=jnp.asarray(0))[0])(params)
        # The whole gradient in the one matrix there is.
        updates, opt = tx.update(config.project(params, grads), opt, params)
        return config.constrain(optax.apply_updates(params, updates)), opt

    opt, start = tx.init(params), params
    for _ in range(3):
        params, opt = step(params, opt)
    np.testing.assert_array_equal(params.W_enc, params.W_dec.T)
    np.testing.assert_allclose(jnp.linalg.norm(params.W_dec, axis=1), 1, rtol=1e-6)
    assert np.abs(params.W_dec - start.W_dec).max() > 1e-2


def test_k_schedule_masks_by_rank(x):
    config = sae.TopK(d_in=16, d_sae=64, k=4, k_start=12, k_anneal_steps=8)
    params = config.init(jax.random.key(0))
    for step, k in [(0, 12), (4, 8), (8, 4), (50, 4)]:
        encoding = config.code(params, x, jnp.asarray(step))
        assert encoding.values.shape == (48, 12) and float(encoding.l0().max()) == k
    assert config.encode(params, x).values.shape == (48, 4)


def test_pursuit_lowers_the_residual_by_what_it_takes(x):
    params = EXAMPLES["matching_pursuit"].init(jax.random.key(0))
    before, taken = np.sum(np.square(x), axis=1), 0.0
    for k in range(1, 7):
        config = sae.MatchingPursuit(d_in=16, d_sae=64, k=k)
        encoding = config.encode(params, x)
        after = np.sum(np.square(x - config.decode(params, encoding)), axis=1)
        # ||r'||^2 = ||r||^2 - v^2, and v is the largest inner product left.
        best = np.maximum(np.max((x - residual_of(params, x, k - 1)) @ params.W_dec.T, axis=1), 0)
        np.testing.assert_allclose(after, before - best**2, rtol=1e-4, atol=1e-4)
        before = after
        taken += best.mean()
    assert taken > 0


def residual_of(params, x, k):
    """The reconstruction after k steps."""
    config = sae.MatchingPursuit(d_in=16, d_sae=64, k=max(k, 1))
    return config.decode(params, config.encode(params, x)) if k else jnp.zeros_like(x)


def test_pursuit_merges_what_it_chooses_twice():
    # Rows 60 degrees apart: the pursuit zigzags between the two.
    W_dec = jnp.array([[1.0, 0.0], [0.5, 0.75**0.5]])
    config = sae.MatchingPursuit(d_in=2, d_sae=2, k=2)
    params = sae.SAEParams(W_enc=W_dec.T, b_enc=jnp.zeros(2), W_dec=W_dec, b_dec=jnp.zeros(2))
    three = sae.MatchingPursuit(d_in=2, d_sae=2, k=2).encode(params, jnp.array([[2.0, 1.0]]))
    # 2 > 1.866: takes row 0 with 2, leaves (0, 1): takes row 1 with 0.866.
    np.testing.assert_allclose(three.dense(), [[2.0, 0.75**0.5]], rtol=1e-6)
    # A single row is chosen once; its second score is 0, so the second slot is unused.
    one = config.encode(params, jnp.array([[3.0, 0.0]]))
    assert one.l0().tolist() == [1.0] and one.dense().tolist() == [[3.0, 0.0]]
