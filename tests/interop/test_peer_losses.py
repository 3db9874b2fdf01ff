"""Training losses equal those of the installed packages, term by term, wherever the definitions do.

Value and gradients, in float32, to 1e-5 of the largest entry. Where a package means something else on purpose or by
mistake is in `test_peer_loss_differences`. As there, tests skip where a package is missing (see `test_peers`).
"""

import jax.numpy as jnp
import numpy as np
import pytest
from peer_losses import (
    D_IN,
    D_SAE,
    GATES,
    SIZES,
    STEP,
    THRESHOLD,
    WARM,
    WARMUP,
    K,
    X,
    agree,
    dictionary_learning,
    filled,
    mask,
    needs,
    ours,
    residual_variance,
    saelens,
    terms_of,
    torch,
    trainer,
    weights,
)

from saejax import sae
from saejax.sae import base

pytestmark = pytest.mark.filterwarnings("default")
ALPHA, PREFIXES = 1 / 32, (4, 10, 24)
subtracting = pytest.mark.parametrize("subtract", [True, False])
# Fewer and more than k_aux = d_in / 2 = 4, which both packages fix.
dying = pytest.mark.parametrize("n_dead", [3, 6])


@needs("sae_lens", "dictionary_learning")
def test_coefficients_warm_up_alike():
    """SAELens, dictionary_learning and we: step / warm-up steps before each step, then 1."""
    scheduling = pytest.importorskip("sae_lens.training.optim")
    trainers = pytest.importorskip("dictionary_learning.trainers.trainer")
    theirs = scheduling.CoefficientScheduler(WARMUP, 0.5)
    other = trainers.get_sparsity_warmup_fn(100, WARMUP)
    for step in range(WARMUP + 3):
        mine = float(base.warmed_up(0.5, jnp.asarray(step), WARMUP))
        np.testing.assert_allclose([theirs.value, 0.5 * other(step)], mine, rtol=1e-6)
        theirs.step()


@needs("sae_lens")
@subtracting
def test_saelens_standard(subtract):
    config = sae.L1(**SIZES, l1_coef=0.3, l1_warmup_steps=WARMUP, subtract_b_dec=subtract, aux_alpha=0)
    params = weights(unit=False)
    mine = ours(config, params)
    coefficient = 0.3 * WARM
    theirs, _ = saelens("standard", params, coefficients={"l1": coefficient}, apply_b_dec_to_input=subtract)
    agree(mine["mse"], theirs["mse_loss"])
    agree(mine["l1"], theirs["l1_loss"], factor=1 / coefficient)
    agree(mine["loss"], theirs["loss"])


TOP_K = {
    "topk": (sae.TopK(**SIZES, k=K), {}),
    "batchtopk": (sae.BatchTopK(**SIZES, k=K), {}),
    "abstopk": (sae.AbsTopK(**SIZES, k=K), {}),
    "matryoshka_batchtopk": (sae.Matryoshka(**SIZES, k=K, prefixes=PREFIXES), {"matryoshka_widths": list(PREFIXES)}),
}


@needs("sae_lens")
@dying
@pytest.mark.parametrize("subtract, rescale", [(True, True), (False, False)])
@pytest.mark.parametrize("architecture", TOP_K)
def test_saelens_top_k_family(architecture, subtract, rescale, n_dead):
    """AuxK as well: theirs is not divided by the residual's variance, and moves b_dec where that is subtracted."""
    config, fields = TOP_K[architecture]
    config = sae.ARCHITECTURES[config.name](**vars(config) | {"subtract_b_dec": subtract})
    extra = {"threshold": 0.0} if architecture.endswith("batchtopk") else {}
    params = weights(n_dead, **extra)
    mine, variance = ours(config, params, n_dead), residual_variance(config, params)
    fields = fields | {"k": K, "apply_b_dec_to_input": subtract, "rescale_acts_by_decoder_norm": rescale}
    theirs, _ = saelens(architecture, params, n_dead, aux_loss_coefficient=ALPHA / variance, **fields)
    agree(mine["mse"], theirs["mse_loss"])
    without = {"b_dec"} if subtract else ()
    agree(mine["aux_k"], theirs["auxiliary_reconstruction_loss"], factor=1 / ALPHA, without=without)
    if architecture == "matryoshka_batchtopk":
        # A sum over prefixes against a mean; AuxK is not part of either.
        inner = [name for name in theirs if name.startswith("inner_mse_loss")]
        total = sum(theirs[name][0] for name in ["mse_loss", *inner])
        grads = {leaf: sum(theirs[n][1][leaf] for n in ["mse_loss", *inner]) for leaf in theirs["mse_loss"][1]}
        agree(mine["prefix_mse"], (total, grads), factor=1 / len(PREFIXES))
    else:
        agree(mine["loss"], theirs["loss"], without=without)


@needs("sae_lens")
@subtracting
@pytest.mark.parametrize("ste_to_input", [True, False])
@pytest.mark.parametrize("penalty", ["step", "tanh"])
def test_saelens_jumprelu(penalty, ste_to_input, subtract):
    """With every latent dead, whose pre-activation losses are the paper's."""
    config = sae.JumpReLU(
        **SIZES, l0_coef=0.02, l0_warmup_steps=WARMUP, penalty=sae.SparsityPenalty[penalty], bandwidth=0.4,
        pre_act_coef=0.1, ste_to_input=ste_to_input, subtract_b_dec=subtract, unit_decoder=False, aux_alpha=0,
    )  # fmt: skip
    params = weights(unit=False, **THRESHOLD)
    mine = ours(config, params)
    fields = {"jumprelu_bandwidth": 0.4, "jumprelu_sparsity_loss_mode": penalty, "pre_act_loss_coefficient": 0.1}
    fields |= {"jumprelu_ste_to_input": ste_to_input, "apply_b_dec_to_input": subtract}
    theirs, _ = saelens("jumprelu", params, D_SAE, coefficients={"l0": 0.02 * WARM}, **fields)
    agree(mine["mse"], theirs["mse_loss"])
    agree(mine["sparsity"], theirs["l0_loss"], factor=1 / (0.02 * WARM))
    agree(mine["pre_act"], theirs["pre_act_loss"], factor=1 / 0.1)
    agree(mine["loss"], theirs["loss"])


@needs("sae_lens")
def test_saelens_quadratic_penalty_of_one_row():
    """On a single row: of several, theirs averages the squares, ours squares the average."""
    config = sae.JumpReLU(
        **SIZES, l0_coef=0.02, penalty=sae.SparsityPenalty.quadratic, target_l0=3, bandwidth=2.0, aux_alpha=0
    )
    params = weights(**THRESHOLD)
    mine = ours(config, params, x=X[:1])
    fields = {"jumprelu_sparsity_loss_mode": "quadratic", "jumprelu_bandwidth": 2.0, "target_l0": 3}
    theirs, _ = saelens("jumprelu", params, x=X[:1], coefficients={"l0": 0.02}, **fields, apply_b_dec_to_input=True)
    agree(mine["sparsity"], theirs["l0_loss"], factor=1 / 0.02)
    agree(mine["loss"], theirs["loss"])


@needs("sae_lens")
@subtracting
def test_saelens_gated(subtract):
    """But for gradients into the decoder of its two extra terms."""
    config = sae.Gated(**SIZES, l1_coef=0.3, l1_warmup_steps=WARMUP, subtract_b_dec=subtract, aux_alpha=0)
    params = weights(**GATES)
    mine = ours(config, params)
    coefficient = 0.3 * WARM
    theirs, _ = saelens("gated", params, coefficients={"l1": coefficient}, apply_b_dec_to_input=subtract)
    agree(mine["mse"], theirs["mse_loss"])
    agree(mine["l1"], theirs["l1_loss"], factor=1 / coefficient, without={"W_dec"})
    agree(mine["gate_mse"], theirs["auxiliary_reconstruction_loss"], without={"W_dec", "b_dec"})
    agree(mine["loss"], theirs["loss"], without={"W_dec", "b_dec"})


@needs("sae_lens")
def test_saelens_matching_pursuit():
    """The gradient of the one matrix that there is: `project` adds our two."""
    config, params = sae.MatchingPursuit(**SIZES, k=K, aux_alpha=0), weights()
    params = params.replace(W_enc=params.W_dec.T, b_enc=jnp.zeros(D_SAE))
    value, grads = ours(config, params)["mse"]
    mine = value, {"W_dec": grads["W_dec"] + grads["W_enc"].T, "b_dec": grads["b_dec"]}
    fields = {"max_iterations": K, "residual_threshold": 0.0, "stop_on_duplicate_support": False}
    theirs, _ = saelens("matching_pursuit", params, **fields, decoder_init_norm=1.0, apply_b_dec_to_input=True)
    agree(mine, theirs["mse_loss"])


@needs("dictionary_learning")
def test_dictionary_learning_standard():
    config = sae.L1(
        **SIZES, l1_coef=0.3, l1_warmup_steps=WARMUP, penalty=sae.Penalty.plain, unit_decoder=True,
        decoder_init_norm=1.0, subtract_b_dec=True, aux_alpha=0,
    )  # fmt: skip
    params = weights()
    mine = ours(config, params)
    theirs = dictionary_learning(trainer("StandardTrainer", params, l1_penalty=0.3, sparsity_warmup_steps=WARMUP))
    agree(mine["mse"], theirs["mse_loss"])
    agree(mine["l1"], theirs["sparsity_loss"])
    agree(mine["loss"], theirs["loss"])


@needs("dictionary_learning")
def test_dictionary_learning_april_update():
    config = sae.L1(**SIZES, l1_coef=0.3, l1_warmup_steps=WARMUP, subtract_b_dec=True, aux_alpha=0)
    params = weights(unit=False)
    mine = ours(config, params)
    made = trainer("StandardTrainerAprilUpdate", params, l1_penalty=0.3, sparsity_warmup_steps=WARMUP)
    theirs = dictionary_learning(made)
    agree(mine["mse"], theirs["mse_loss"])
    agree(mine["l1"], theirs["sparsity_loss"])
    agree(mine["loss"], theirs["loss"])


@needs("dictionary_learning")
@pytest.mark.parametrize("name", ["TopKTrainer", "BatchTopKTrainer"])
def test_dictionary_learning_top_k(name):
    """With centred rows of E||x||^2 = 1 and at least k_aux dead latents the whole losses are one."""
    kind, extra = (sae.TopK, {}) if name == "TopKTrainer" else (sae.BatchTopK, {"threshold": 0.0})
    config, params = kind(**SIZES, k=K), weights(6, **extra)
    mine = ours(config, params, 6)
    theirs = dictionary_learning(trainer(name, params, 6, k=K, auxk_alpha=ALPHA))
    agree(mine["mse"], theirs["l2_loss"])
    agree(mine["aux_k"], theirs["auxk_loss"])
    agree(mine["loss"], theirs["loss"], without={"b_dec"})  # AuxK moves theirs


@needs("dictionary_learning")
def test_dictionary_learning_gated():
    """But for b_dec, which its auxiliary term moves through the encoder."""
    config = sae.Gated(**SIZES, l1_coef=0.3, l1_warmup_steps=WARMUP, aux_alpha=0)
    params = weights(**GATES)
    mine = ours(config, params)
    theirs = dictionary_learning(trainer("GatedSAETrainer", params, l1_penalty=0.3, sparsity_warmup_steps=WARMUP))
    agree(mine["mse"], theirs["mse_loss"])
    agree(mine["l1"], theirs["sparsity_loss"])
    agree(mine["gate_mse"], theirs["aux_loss"])
    agree(mine["loss"], theirs["loss"], without={"b_dec"})


@needs("dictionary_learning")
def test_dictionary_learning_jumprelu():
    """2 / L0* (L0 - L0*)^2 is its (L0 / L0* - 1)^2 times 2 L0*; but for the penalty's gradient, see the differences."""
    target = 5.0
    config = sae.JumpReLU(
        **SIZES, l0_coef=0.02, l0_warmup_steps=WARMUP, penalty=sae.SparsityPenalty.quadratic, target_l0=target,
        bandwidth=0.4, subtract_b_dec=False, aux_alpha=0,
    )  # fmt: skip
    params = weights(**THRESHOLD)
    mine = ours(config, params)
    fields = {"bandwidth": 0.4, "target_l0": target, "sparsity_warmup_steps": WARMUP}
    whole = dictionary_learning(trainer("JumpReluTrainer", params, sparsity_penalty=0.02 * 2 * target, **fields))
    agree(mine["loss"], whole["loss"], without={"threshold"})
    bare = dictionary_learning(trainer("JumpReluTrainer", params, sparsity_penalty=0.0, **fields))
    agree(mine["mse"], bare["l2_loss"])
    agree(mine["mse"], bare["loss"])


@needs("dictionary_learning")
def test_dictionary_learning_matryoshka():
    """The mean over prefixes, divided there by their number once more."""
    config, params = sae.Matryoshka(**SIZES, k=K, prefixes=PREFIXES), weights(6, threshold=0.0)
    mine = ours(config, params, 6)
    fields = {"k": K, "group_fractions": [4 / 24, 6 / 24, 14 / 24]}
    theirs = dictionary_learning(trainer("MatryoshkaBatchTopKTrainer", params, 6, **fields))
    agree(mine["prefix_mse"], theirs["l2_loss"], factor=len(PREFIXES))
    agree(mine["aux_k"], theirs["auxk_loss"])
    bare = dictionary_learning(trainer("MatryoshkaBatchTopKTrainer", params, **fields, auxk_alpha=0.0))
    agree(mine["prefix_mse"], bare["loss"], factor=len(PREFIXES))


@needs("dictionary_learning")
@pytest.mark.parametrize("p", [1.0, 0.7, 0.4])
def test_dictionary_learning_p_anneal(p):
    """Lp^p with the coefficient that its queue would hold after this one batch: L1 / Lp^p.

    Rows are scaled up: the millionth that we add before the power is then nothing beside the latents.
    """
    x, coefficient = 1000 * X, 0.3 * WARM
    config = sae.PAnneal(
        **SIZES, l1_coef=0.3, l1_warmup_steps=WARMUP, p_end=p, anneal_steps=1, anneal_start_step=0, aux_alpha=0
    )
    params = weights()
    mine = ours(config, params, x=x)
    made = trainer("PAnnealTrainer", params, sparsity_function="Lp^p", sparsity_warmup_steps=WARMUP, anneal_start=50)
    f = made.ae.encode(torch.from_numpy(x)).detach()
    made.p, made.sparsity_coeff = p, 0.3 * float(made.lp_norm(f, 1) / made.lp_norm(f, p))
    theirs = dictionary_learning(made, x)
    agree(mine["loss"], theirs["loss"])
    agree(mine["lp"], terms_of({"lp": made.scaled_lp_loss}, made.ae)["lp"], factor=1 / coefficient)


@needs("sparsify")
def test_sparsify():
    """Its unit is the variance of the batch, here 1. Of AuxK and Multi-TopK only values: they do not train there."""
    sparsify, settings = pytest.importorskip("sparsify.sparse_coder"), pytest.importorskip("sparsify.config")
    for n_dead in (3, 6):
        config, params = sae.TopK(**SIZES, k=K, multi_topk_alpha=1 / 8), weights(n_dead)
        mine, variance = ours(config, params, n_dead), residual_variance(config, params)
        cfg = settings.SparseCoderConfig(k=K, num_latents=D_SAE, multi_topk=True)
        module = filled(sparsify.SparseCoder(D_IN, cfg), params)
        out = module(torch.from_numpy(X), dead_mask=torch.from_numpy(mask(n_dead)))
        theirs = terms_of({"fvu": out.fvu, "aux": out.auxk_loss, "multi": out.multi_topk_fvu}, module)
        agree(mine["mse"], theirs["fvu"])
        agree(mine["aux_k"], (theirs["aux"][0], {}), factor=1 / variance)
        agree(mine["multi_mse"], (theirs["multi"][0], {}))


def test_the_step_is_within_the_warm_up():
    assert 0 < STEP < WARMUP and 0 < WARM < 1
