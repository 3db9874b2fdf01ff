"""Ablations whose outcome is known, probes by brute force, losses in closed form, shortcuts by construction."""

import dataclasses

import numpy as np
import pytest

from saejax.errors import UserError
from saejax.lab.metrics import ablation, over, shortcut, splice

RNG = np.random.default_rng(0)


def concept_batch(n=400, concepts=3, d_sae=8, d_in=6, shared_direction=False):
    """Latent c tells concept c exactly; the others are noise. Decoder rows of concepts are orthogonal axes."""
    rng = np.random.default_rng(1)
    labels = (rng.random((n, concepts)) < 0.5).astype(np.int32)
    latents = np.abs(rng.standard_normal((n, d_sae))).astype(np.float32)
    latents[:, :concepts] = labels * rng.uniform(1, 2, (n, concepts))
    W_dec = np.concatenate([np.eye(concepts, d_in), 0.05 * rng.standard_normal((d_sae - concepts, d_in))])
    if shared_direction:
        W_dec[:concepts] = np.eye(d_in)[0]
    return ablation.ConceptBatch(
        x=latents @ W_dec,
        latents=latents,
        labels=labels,
        W_dec=W_dec,
        probe_weight=np.eye(concepts, d_in),
        probe_bias=np.full(concepts, -0.5),
    )


def test_mean_difference_by_brute_force():
    batch = concept_batch()
    found = over.over(ablation.MeanDifference(), batch, rows=37).arrays["mean_difference"]
    for c in range(3):
        on = batch.labels[:, c] > 0
        np.testing.assert_allclose(found[c], batch.latents[on].mean(0) - batch.latents[~on].mean(0), atol=1e-5)


def test_ablating_the_one_latent_of_a_concept_takes_it_and_no_other():
    batch = concept_batch()
    result = ablation.targeted_perturbation(batch, batch, n=1)
    share = batch.labels.mean(0)
    assert result["probe_accuracy"] > 0.98
    # Without its latent the probe always says no: what is left is the share of rows without the concept.
    np.testing.assert_allclose(np.diag(result.arrays["ablated_accuracy"]), 1 - share, atol=0.02)
    assert result["tpp_intended"] == pytest.approx(share.mean(), abs=0.03) and abs(result["tpp_unintended"]) < 0.02
    assert result["tpp"] > 0.4 > 0.2 > abs(result["tpp_control"])
    assert result["probe_accuracy_chance"] == pytest.approx(np.maximum(share, 1 - share).mean())


def test_concepts_in_one_direction_go_together():
    batch = concept_batch(shared_direction=True)
    batch = dataclasses.replace(batch, probe_weight=np.eye(1, 6).repeat(3, axis=0), probe_bias=np.full(3, -2.5))
    result = ablation.targeted_perturbation(batch, batch, n=3)
    assert abs(result["tpp"]) < 0.1


def test_ablation_is_that_of_the_activation_itself():
    """Taking out chosen latents by hand from x, then asking the probes; -1 takes out nothing."""
    batch = concept_batch(d_sae=10)
    ablated, control = np.array([[0, 4, -1], [9, 2, 3]]), np.array([[5, -1, -1], [6, 7, 8]])
    batch = dataclasses.replace(batch, ablated=ablated, control=control)
    result = over.over(ablation.Ablation(), batch, rows=64)
    for key, sets in (("ablated_accuracy", ablated), ("ablated_accuracy_control", control)):
        for a, chosen in enumerate(sets):
            kept = chosen[chosen >= 0]
            x = batch.x - batch.latents[:, kept] @ batch.W_dec[kept]
            right = ((x @ batch.probe_weight.T + batch.probe_bias[None] > 0) == batch.labels).mean(0)
            np.testing.assert_allclose(result.arrays[key][a], right, atol=0.003)
    assert "tpp" not in result
    with pytest.raises(UserError, match="ablated"):
        over.over(ablation.Ablation(), concept_batch())
    with pytest.raises(UserError, match="n must be between 1 and d_sae"):
        ablation.targeted_perturbation(batch, batch, n=11)


def test_attribution_prefers_what_pushes_the_probe():
    difference, W_dec = np.array([[1.0, 1.0, 3.0, -1.0]]), np.array([[1.0], [2.0], [-1.0], [-0.5]])
    assert ablation.most_telling(difference, W_dec, np.ones((1, 1)), 4).tolist() == [[1, 0, 3, -1]]


def test_loss_recovered_in_closed_form():
    """Loss |a - x|^2: 0 when clean, |x|^2 under zero, the variance under the mean, .01 |x|^2 for recon = .9 x."""
    x = (RNG.standard_normal((200, 5)) + 1).astype(np.float32)

    def loss(a):
        return ((x - (x if a is None else a)) ** 2).sum(1)

    result = splice.loss_recovered(loss, x, 0.9 * x)
    power, variance = (x**2).sum(1).mean(), ((x - x.mean(0)[None]) ** 2).sum(1).mean()
    assert result["loss_clean"] == 0 and result["loss_zero"] == pytest.approx(power, rel=1e-5)
    assert result["loss_mean"] == pytest.approx(variance, rel=1e-5)
    assert result["loss_recovered_zero"] == pytest.approx(0.99, rel=1e-5)
    assert result["loss_recovered_mean"] == pytest.approx(1 - 0.01 * power / variance, rel=1e-5)
    assert result["delta_loss"] == result["loss_spliced"] == pytest.approx(0.01 * power, rel=1e-4)
    scalar = splice.loss_recovered(lambda a: loss(a).mean(), x, 0.9 * x)
    assert scalar["loss_recovered_mean"] == pytest.approx(result["loss_recovered_mean"], rel=1e-5)
    assert splice.loss_recovered(loss, x, np.zeros_like(x))["loss_recovered_zero"] == 0
    assert splice.loss_recovered(loss, x, x)["loss_recovered_mean"] == 1


def test_shortcuts():
    """A classifier that follows the cue is right where it agrees; one that knows the label is right everywhere."""
    label, cue = RNG.integers(0, 3, (2, 300))
    cue = np.where(RNG.random(300) < 0.8, label, cue)
    follows = over.over(
        shortcut.GroupAccuracy(n_classes=3), shortcut.CueBatch(prediction=cue, label=label, cue=cue), rows=64
    )
    assert follows["aligned_accuracy"] == 1 and follows["conflicting_accuracy"] == follows["worst_group_accuracy"] == 0
    assert follows["shortcut_gap"] == 1 and follows["group_accuracy_mean"] == pytest.approx((cue == label).mean())
    knows = over.over(shortcut.GroupAccuracy(n_classes=3), shortcut.CueBatch(prediction=label, label=label, cue=cue))
    assert knows["worst_group_accuracy"] == 1 and knows["shortcut_gap"] == 0
    lost = shortcut.dependence(knows, follows, ["worst_group_accuracy", "group_accuracy_mean"])
    assert lost["worst_group_accuracy_lost"] == 1
    with pytest.raises(UserError, match="probe_r2"):
        shortcut.dependence(knows, follows)
