"""Where a training loss of an installed package is not ours: each difference shown, with the reason for ours.

Everything else about the losses agrees (`test_peer_losses`). Versions read: SAELens 6.54, dictionary_learning 0.1,
sparsify 1.3.3; a test that fails with a later one may well mean that it has changed.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from peer_losses import (
    D_IN,
    D_SAE,
    GATES,
    SIZES,
    THRESHOLD,
    K,
    X,
    agree,
    dictionary_learning,
    filled,
    mask,
    needs,
    norms,
    ours,
    saelens,
    terms_of,
    torch,
    trainer,
    weights,
)

from saejax import sae

pytestmark = pytest.mark.filterwarnings("default")
TOPK, AUX = sae.TopK(**SIZES, k=K), "auxiliary_reconstruction_loss"


def top_k_of_saelens(params, n_dead, x=X, **fields):
    return saelens("topk", params, n_dead, x, **{"k": K, "aux_loss_coefficient": 1.0, **fields})[0][AUX]


@needs("sae_lens")
def test_saelens_gate_reconstruction_moves_the_decoder():
    """Rajamanoharan et al. freeze it there: the gate learns to reconstruct, the decoder is not to serve two encoders.

    Their ablation finds that unfreezing it costs performance.
    """
    params = weights(**GATES)
    mine = norms(ours(sae.Gated(**SIZES, aux_alpha=0), params)["gate_mse"])
    theirs, _ = saelens("gated", params, coefficients={"l1": 0.1}, apply_b_dec_to_input=True)
    moved = norms(theirs[AUX])
    assert mine["W_dec"] == mine["b_dec"] == 0
    assert moved["W_dec"] > 0.1 * moved["W_enc"] and moved["b_dec"] > 0.1 * moved["W_enc"]


@needs("sae_lens")
def test_saelens_gate_penalty_is_weighted_by_decoder_norms():
    """Ours keeps unit rows, where the value is the same and the extra gradient is along the rows: projected away."""
    config, params = sae.Gated(**SIZES, aux_alpha=0), weights(**GATES)
    theirs, _ = saelens("gated", params, coefficients={"l1": 1.0}, apply_b_dec_to_input=True)
    along = theirs["l1_loss"][1]["W_dec"]
    assert np.linalg.norm(along) > 0 == norms(ours(config, params)["l1"])["W_dec"]
    kept = config.project(params, params.replace(W_dec=jnp.asarray(along))).W_dec
    np.testing.assert_allclose(kept, 0, atol=1e-6 * np.abs(along).max())


@needs("dictionary_learning")
def test_dictionary_learning_gate_reconstruction_moves_its_bias():
    """Its decoder is frozen in that term, but the encoder's centring by the same bias is not; ours holds both."""
    params = weights(**GATES)
    mine = ours(sae.Gated(**SIZES, aux_alpha=0, l1_coef=0.0), params)
    theirs = dictionary_learning(trainer("GatedSAETrainer", params, l1_penalty=0.0, sparsity_warmup_steps=None))
    apart = theirs["loss"][1]["b_dec"] - mine["loss"][1]["b_dec"]
    through_encoder = -(mine["gate_mse"][1]["b_enc"] @ params.W_enc.T)
    np.testing.assert_allclose(apart, through_encoder, rtol=1e-4, atol=1e-5 * np.abs(apart).max())
    assert np.linalg.norm(apart) > 0.1 * np.linalg.norm(mine["loss"][1]["b_dec"])


@needs("dictionary_learning")
def test_dictionary_learning_p_anneal_resampling_changes_no_weight():
    """It assigns through two indexings in a row, which writes into a copy; ours (`training.resample`) is written."""
    made = trainer("PAnnealTrainer", weights(), resample_steps=1, warmup_steps=1, sparsity_warmup_steps=None)
    made.update(1, torch.from_numpy(X))  # the optimiser needs a state to clear
    before = [tensor.clone() for tensor in made.ae.state_dict().values()]
    made.resample_neurons(torch.from_numpy(mask(6)), torch.from_numpy(X))
    assert all(torch.equal(a, b) for a, b in zip(before, made.ae.state_dict().values(), strict=True))
    assert not torch.any(made.optimizer.state_dict()["state"][1]["exp_avg"][torch.from_numpy(mask(6))])


@needs("sparsify")
def test_sparsify_never_trains_the_encoder_on_aux_k_and_multi_topk():
    """Its fused backward drops the gradient of the pre-activations; dead latents come back by their encoder."""
    sparsify, settings = pytest.importorskip("sparsify.sparse_coder"), pytest.importorskip("sparsify.config")
    config, params = sae.TopK(**SIZES, k=K, multi_topk_alpha=1 / 8), weights(6)
    mine = ours(config, params, 6)
    cfg = settings.SparseCoderConfig(k=K, num_latents=D_SAE, multi_topk=True)
    module = filled(sparsify.SparseCoder(D_IN, cfg), params)
    out = module(torch.from_numpy(X), dead_mask=torch.from_numpy(mask(6)))
    theirs = terms_of({"aux_k": out.auxk_loss, "multi_mse": out.multi_topk_fvu}, module)
    for term in ("aux_k", "multi_mse"):
        for leaf in ("W_enc", "b_enc"):
            assert norms(theirs[term])[leaf] == 0 < norms(mine[term])[leaf]
        assert norms(theirs[term])["W_dec"] > 0


@needs("sae_lens")
def test_saelens_aux_k_decodes_negative_latents():
    """A ReLU autoencoder never has them: Gao et al.'s code applies the ReLU to the auxiliary latents too."""
    params = weights(6)
    params = params.replace(b_enc=jnp.where(mask(6), -0.06, params.b_enc))
    value, grads = ours(TOPK, params, 6)["aux_k"]
    assert not any(np.any(grad) for grad in grads.values())  # silent on every row: nothing is decoded
    theirs = norms(top_k_of_saelens(params, 6))
    assert theirs["W_dec"] > 0 and theirs["W_enc"] > 0


@needs("sae_lens", "dictionary_learning")
def test_aux_k_of_both_moves_b_dec():
    """Through the encoder's centring. Ours moves dead latents and nothing that live ones share."""
    params = weights(6)
    assert norms(ours(TOPK, params, 6)["aux_k"])["b_dec"] == 0
    assert norms(top_k_of_saelens(params, 6, apply_b_dec_to_input=True))["b_dec"] > 0
    made = trainer("TopKTrainer", params, 6, k=K)
    f, _, _, acts = made.ae.encode(torch.from_numpy(X), return_topk=True)
    residual = (torch.from_numpy(X) - made.ae.decode(f)).detach()
    term = terms_of({"aux": made.get_auxiliary_loss(residual, acts)}, made.ae)["aux"]
    assert norms(term)["b_dec"] > 0
    agree(ours(TOPK, params, 6)["aux_k"], term, without={"b_dec"})


@needs("sae_lens")
def test_saelens_aux_k_grows_with_the_data():
    """A sum of squares: its weight means another thing at every scale. Ours is a share of the residual's variance."""
    params = weights(6)
    large = params.replace(b_enc=8 * params.b_enc, b_dec=8 * params.b_dec)
    theirs = [top_k_of_saelens(p, 6, s * X)[0] for p, s in ((params, 1), (large, 8))]
    mine = [ours(TOPK, p, 6, s * X)["aux_k"][0] for p, s in ((params, 1), (large, 8))]
    np.testing.assert_allclose(theirs[1] / theirs[0], 64, rtol=1e-5)
    np.testing.assert_allclose(mine[1] / mine[0], 1, rtol=1e-5)


@needs("dictionary_learning")
def test_dictionary_learning_aux_k_pushes_few_dead_latents_with_the_whole_residual():
    """Ours is scaled by n_dead / k_aux (as SAELens'): k_aux latents together bear what one would else bear alone."""
    params, k_aux = weights(3), D_IN // 2
    mine = ours(TOPK, params, 3)["aux_k"]
    theirs = dictionary_learning(trainer("TopKTrainer", params, 3, k=K))["auxk_loss"]
    agree(mine, theirs, factor=3 / k_aux)


@needs("dictionary_learning")
def test_dictionary_learning_counts_the_dead_after_the_batch():
    """A latent that fires in the batch is no longer dead for its AuxK; ours goes by what was known before the batch."""
    params = weights(0)
    assert ours(TOPK, params, 6)["aux_k"][0] > 0
    assert dictionary_learning(trainer("TopKTrainer", params, 6, k=K))["auxk_loss"][0] == 0


@needs("sae_lens", "dictionary_learning")
def test_inference_threshold_of_batch_topk_starts_at_the_first_batch():
    """SAELens averages from 0, so that 1 / rate batches pass before it is right; dictionary_learning from step 1000."""
    config, params = sae.BatchTopK(**SIZES, k=K), weights(threshold=0.0)
    _, aux = config.loss(params, jnp.asarray(X), dead=jnp.zeros(D_SAE, bool), step=jnp.asarray(0))
    mine = float(config.track(params, aux, jnp.asarray(0)).extra["threshold"])
    latents = np.asarray(aux.encoding.dense())
    assert mine == latents[latents > 0].min()
    _, module = saelens("batchtopk", params, k=K)
    np.testing.assert_allclose(float(module.topk_threshold), 0.01 * mine, rtol=1e-5)
    made = trainer("BatchTopKTrainer", params, k=K)
    made.loss(torch.from_numpy(X), step=0)
    assert float(made.ae.threshold) == -1
    made.loss(torch.from_numpy(X), step=1001)
    np.testing.assert_allclose(float(made.ae.threshold), mine, rtol=1e-5)


@needs("sae_lens")
def test_saelens_quadratic_penalty_pulls_every_row_to_the_target():
    """It averages squared distances, ours squares that of the average: rows stay free to use more or fewer latents.

    So theirs is larger by 2 / L0* times the variance of L0 over rows.
    """
    target = 3
    config = sae.JumpReLU(**SIZES, penalty=sae.SparsityPenalty.quadratic, target_l0=target, aux_alpha=0)
    params = weights(**THRESHOLD)
    fields = {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": target, "apply_b_dec_to_input": True}
    theirs, _ = saelens("jumprelu", params, coefficients={"l0": 1.0}, **fields)
    l0 = np.asarray(config.encode(params, jnp.asarray(X)).l0())
    more = theirs["l0_loss"][0] - ours(config, params)["sparsity"][0]
    np.testing.assert_allclose(more, 2 / target * l0.var(), rtol=1e-4)
    assert l0.var() > 0.5


@needs("sae_lens")
def test_saelens_pre_activation_loss_is_of_dead_latents_only():
    """Anthropic's is over all latents (January 2025); where all are dead the two agree."""
    config = sae.JumpReLU(**SIZES, pre_act_coef=1.0, aux_alpha=0)
    params = weights(**THRESHOLD)
    mine = ours(config, params)["pre_act"]
    fields = {"pre_act_loss_coefficient": 1.0, "apply_b_dec_to_input": True}
    theirs = [saelens("jumprelu", params, n, coefficients={"l0": 0.0}, **fields)[0] for n in (0, 6)]
    assert theirs[0]["pre_act_loss"][0] == 0 < theirs[1]["pre_act_loss"][0] < 0.5 * mine[0]
    moved = np.any(theirs[1]["pre_act_loss"][1]["W_enc"] != 0, axis=0)
    np.testing.assert_array_equal(moved, mask(6))
    assert np.all(mine[1]["W_enc"].any(axis=0))


@needs("dictionary_learning")
def test_dictionary_learning_l0_sees_latents_after_the_jump():
    """Its step reads f, which is 0 below the threshold, so rows just below it do not vote. Ours reads u, as the paper.

    With a narrow window half of the votes are lost: those that would have made silent latents fire.
    """
    width, target = 0.3, 5.0
    config = sae.JumpReLU(
        **SIZES, penalty=sae.SparsityPenalty.quadratic, target_l0=target, bandwidth=width, subtract_b_dec=False,
        aux_alpha=0, l0_coef=1.0,
    )  # fmt: skip
    params = weights(**THRESHOLD)
    mine = ours(config, params)["sparsity"][1]["threshold"]
    fields = {"bandwidth": width, "target_l0": target, "sparsity_warmup_steps": None}
    paid, free = (
        dictionary_learning(trainer("JumpReluTrainer", params, sparsity_penalty=coefficient, **fields))["loss"]
        for coefficient in (2 * target, 0.0)
    )
    u = np.asarray(config.pre_activations(params, jnp.asarray(X)))
    inside = np.abs(u - THRESHOLD["threshold"]) < width / 2
    above = inside & (u > THRESHOLD["threshold"])
    l0 = np.mean(np.sum(u > THRESHOLD["threshold"], axis=1))
    slope = -4 / target * (l0 - target) / width / len(X)
    np.testing.assert_allclose(mine, slope * inside.sum(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(paid[1]["threshold"] - free[1]["threshold"], slope * above.sum(0), rtol=1e-3, atol=1e-4)
    assert 0 < above.sum() < 0.7 * inside.sum()


@needs("sae_lens", "dictionary_learning")
def test_matryoshka_means_three_things():
    """SAELens sums over prefixes, dictionary_learning divides their mean by their number again; ours is the mean.

    As AuxK is divided by neither, it weighs P times more there than its 1/32 says, and P times less in SAELens.
    """
    widths = (4, 10, 24)
    config, params = sae.Matryoshka(**SIZES, k=K, prefixes=widths), weights(6, threshold=0.0)
    mine = ours(config, params, 6)
    parts = {"k": K, "matryoshka_widths": list(widths), "apply_b_dec_to_input": True}
    summed, _ = saelens("matryoshka_batchtopk", params, **parts)
    fields = {"k": K, "group_fractions": [4 / 24, 6 / 24, 14 / 24]}
    divided = dictionary_learning(trainer("MatryoshkaBatchTopKTrainer", params, 6, **fields))
    n, mean = len(widths), mine["prefix_mse"][0]
    np.testing.assert_allclose([summed["loss"][0], divided["l2_loss"][0]], [n * mean, mean / n], rtol=1e-5)
    share = [(term["loss"][0] - error) / error for term, error in ((mine, mean), (divided, divided["l2_loss"][0]))]
    np.testing.assert_allclose(share[1], n * share[0], rtol=1e-4)


@needs("dictionary_learning")
def test_dictionary_learning_weighs_twice_by_decoder_norms_in_the_april_update():
    """With `AutoEncoderNew`, whose latents come out multiplied by the norms that the trainer multiplies by again.

    f ||w|| stays when scale moves between a latent and its decoder row; f ||w||^2 falls as rows shrink, without a
    sparser code. With `AutoEncoder`, its default, the norms come in once.
    """
    dictionaries = pytest.importorskip("dictionary_learning.dictionary")
    params = weights(unit=False)
    config = sae.L1(**SIZES, subtract_b_dec=False, aux_alpha=0)
    made = trainer(
        "StandardTrainerAprilUpdate", params, dict_class=dictionaries.AutoEncoderNew, sparsity_warmup_steps=None
    )
    theirs = dictionary_learning(made)["sparsity_loss"][0]
    latents = np.asarray(config.encode(params, jnp.asarray(X)).dense())
    squares = np.sum(np.asarray(params.W_dec) ** 2, axis=1)
    np.testing.assert_allclose(ours(config, params)["l1"][0], np.mean(latents @ np.sqrt(squares)), rtol=1e-5)
    np.testing.assert_allclose(theirs, np.mean(latents @ squares), rtol=1e-5)


@needs("dictionary_learning")
def test_dictionary_learning_p_anneal_keeps_its_coefficient_from_other_batches():
    """A queue of recent batches sets it when p moves; ours is the batch's own, so needs no state to save and resume."""
    made = trainer(
        "PAnnealTrainer", weights(), sparsity_function="Lp^p", anneal_start=1, anneal_end=90, p_end=0.4,
        n_sparsity_updates=4, sparsity_warmup_steps=None,
    )  # fmt: skip
    alone = made.sparsity_coeff
    made.loss(torch.from_numpy(X), step=1)  # from here on it knows the next p
    made.loss(torch.from_numpy(3 * X), step=2)  # and its queue sees another batch
    made.loss(torch.from_numpy(X), step=int(made.sparsity_update_steps[1]))
    latents = made.ae.encode(torch.from_numpy(X)).detach()
    own = alone * float(made.lp_norm(latents, 1) / made.lp_norm(latents, made.p))
    assert made.p < 1 and abs(made.sparsity_coeff / own - 1) > 0.05
    config = sae.PAnneal(**SIZES, p_end=0.4, anneal_steps=4, aux_alpha=0)
    # Ours: the value of the penalty is that of L1 on this batch, whatever came before.
    found = ours(config, weights())["lp"][0]
    np.testing.assert_allclose(found, float(made.lp_norm(latents, 1)), rtol=1e-5)


@needs("sae_lens")
def test_saelens_standard_norm_is_not_p_annealing():
    """Its `lp_norm` takes the p-th root of a row's sum, so a large latent still lowers the price of the others."""
    params = weights(unit=True)
    theirs, _ = saelens("standard", params, coefficients={"l1": 1.0}, lp_norm=0.5, apply_b_dec_to_input=True)
    config = sae.PAnneal(**SIZES, p_end=0.5, anneal_steps=1, aux_alpha=0)
    latents = np.asarray(config.encode(params, jnp.asarray(X)).dense(), np.float64)
    np.testing.assert_allclose(theirs["l1_loss"][0], np.mean(np.sum(latents**0.5, axis=1) ** 2), rtol=1e-5)
    np.testing.assert_allclose(ours(config, params)["lp"][0], latents.sum(1).mean(), rtol=1e-5)
