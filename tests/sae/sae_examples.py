"""One small instance of every architecture; a new one enters the tests here."""

import jax
import numpy as np

from saejax import sae

D_IN, D_SAE, K, B = 16, 64, 4, 48

SIZES = {"d_in": D_IN, "d_sae": D_SAE, "k_aux": 8}

EXAMPLES = {
    "topk": sae.TopK(d_in=D_IN, d_sae=D_SAE, k=K, k_aux=8),
    "l1": sae.L1(d_in=D_IN, d_sae=D_SAE, l1_coef=0.3, l1_warmup_steps=10, decoder_init_norm=0.7),
    "batch_topk": sae.BatchTopK(**SIZES, k=K),
    # Wide enough that about a tenth of the pre-activations lies inside the window.
    "jumprelu": sae.JumpReLU(**SIZES, l0_coef=0.05, l0_warmup_steps=10, bandwidth=0.3, threshold_init=0.3),
    "gated": sae.Gated(**SIZES, l1_coef=0.3, l1_warmup_steps=10),
    "matryoshka": sae.Matryoshka(**SIZES, k=K, prefixes=(5, 20, 64)),
    "abs_topk": sae.AbsTopK(**SIZES, k=K),
    "p_anneal": sae.PAnneal(**SIZES, l1_coef=0.3, l1_warmup_steps=10, p_end=0.5, anneal_steps=8),
    "matching_pursuit": sae.MatchingPursuit(**SIZES, k=K),
}
"""One of every architecture, by its name."""

VARIANTS = {
    "topk multi": sae.TopK(**SIZES, k=K, multi_topk_alpha=0.125, k_start=8, k_anneal_steps=16),
    "topk tied": sae.TopK(**SIZES, k=K, encoder=sae.EncoderKind.tied),
    "topk lista": sae.TopK(**SIZES, k=K, encoder=sae.EncoderKind.lista),
    "l1 mlp": sae.L1(**SIZES, l1_coef=0.3, l1_warmup_steps=10, encoder=sae.EncoderKind.mlp, encoder_hidden=40),
    "l1 plain": sae.L1(
        **SIZES, penalty=sae.Penalty.plain, unit_decoder=True, subtract_b_dec=True, decoder_init_norm=1.0,
        l1_coef=0.3, l1_warmup_steps=10,
    ),
    "jumprelu tanh": sae.JumpReLU(
        **SIZES, penalty=sae.SparsityPenalty.tanh, bandwidth=0.3, threshold_init=0.3, ste_to_input=True,
        pre_act_coef=0.1, unit_decoder=False,
    ),
    "gated lista": sae.Gated(**SIZES, l1_coef=0.3, subtract_b_dec=False, encoder=sae.EncoderKind.lista),
    "matryoshka topk": sae.Matryoshka(**SIZES, k=K, selection=sae.Selection.topk),
}  # fmt: skip
"""Other encoders, penalties and options."""

K_AUX = {"k_aux": 8}
SITES = {
    "topk transcoder": sae.TopK(
        **K_AUX, d_in=16, d_sae=D_SAE, k=K, family=sae.Family.transcoder, sites=(16, 12), skip=True
    ),
    "batch_topk crosscoder": sae.BatchTopK(
        **K_AUX, d_in=24, d_sae=D_SAE, k=K, family=sae.Family.crosscoder, sites=(6, 10, 8)
    ),
    "l1 crosscoder": sae.L1(
        **K_AUX, d_in=20, d_sae=D_SAE, l1_coef=0.3, l1_warmup_steps=10, family=sae.Family.crosscoder, sites=(12, 8)
    ),
    "jumprelu clt": sae.JumpReLU(
        **K_AUX, d_in=24, d_sae=72, l0_coef=0.05, l0_warmup_steps=10, bandwidth=0.3, threshold_init=0.3,
        family=sae.Family.clt, sites=(8, 8, 8, 6, 8, 10),
    ),
}  # fmt: skip
"""Rows of several sites: every way to read and write them."""
VARIANTS |= SITES


def moved(start):
    """Initial parameters with everything that starts at a constant moved off it."""
    rng = np.random.default_rng(1)
    biases = {
        "b_enc": jax.numpy.asarray(0.1 * rng.standard_normal(start.b_enc.shape), "float32"),
        "b_dec": jax.numpy.asarray(0.1 * rng.standard_normal(start.b_dec.shape), "float32"),
    }
    extra = dict(start.extra)
    for name in sorted(extra.keys() - {"W_hidden"}):
        offset = (
            0.3 + 0.1 * rng.random(extra[name].shape)
            if name == "threshold"
            else 0.1 * rng.standard_normal(extra[name].shape)
        )
        extra[name] = jax.numpy.asarray(offset, "float32")
    return start.replace(**biases, extra=extra)
