"""Agreement of dictionaries whose agreement is known."""

import itertools

import numpy as np
import pytest

from saejax.errors import UserError
from saejax.lab.metrics import stability


def directions(n, d, seed):
    return np.random.default_rng(seed).standard_normal((n, d))


def test_pairwise_mcc_of_all_pairs():
    three = [directions(5, 12, seed) for seed in range(3)]
    found = stability.pairwise_mcc(three, block=2)

    def mcc(a, b):
        cos = np.abs((a / np.linalg.norm(a, axis=1)[:, None]) @ (b / np.linalg.norm(b, axis=1)[:, None]).T)
        return max(np.mean([cos[i, p[i]] for i in range(5)]) for p in itertools.permutations(range(5)))

    wanted = [mcc(a, b) for a, b in itertools.combinations(three, 2)]
    assert found["pw_mcc"] == pytest.approx(np.mean(wanted), rel=1e-5)
    assert found["pw_mcc_pairs"][1, 2] == pytest.approx(wanted[2], rel=1e-5)


def test_random_dictionaries_agree_at_chance():
    found = stability.pairwise_mcc([directions(64, 16, seed) for seed in range(2)])
    assert found["pw_mcc"] == pytest.approx(found["pw_mcc_chance"], abs=0.03) and found["pw_mcc_chance"] > 0.4
    with pytest.raises(UserError, match="at least two"):
        stability.pairwise_mcc([np.eye(3)])


def test_shared_needs_decoder_and_encoder():
    """Ten latents, reordered: 6 agree in both, 2 only in the decoder, 2 have swapped encoders."""
    rng = np.random.default_rng(0)
    order = rng.permutation(10)
    decoder, encoder = np.eye(10, 20), np.eye(10, 20)
    other_decoder, other_encoder = decoder.copy(), encoder.copy()
    other_decoder[6:8] = np.eye(20)[10:12] + 0.5 * decoder[6:8]  # still nearest, but |cos| 0.447
    other_encoder[[8, 9]] = other_encoder[[9, 8]]
    found = stability.shared_fraction((decoder, -3 * other_decoder[order]), (encoder, other_encoder[order]))
    assert found["shared_fraction"] == 0.6 and found["same_partner"] == 0.8
    assert found["shared_fraction_both"] == 0.6 and found["shared_fraction_chance"] < 0.2
    with pytest.raises(UserError, match="latents as rows"):
        stability.shared_fraction((decoder, decoder), (encoder.T, encoder.T))


def test_the_trap_of_one_initialisation_is_flagged():
    start, end = directions(16, 8, 0), directions(16, 8, 1)
    trap = stability.stabilisation([start, start], [end, end + 0.01])
    assert trap["identical_init"] == 1.0 and trap["pw_mcc_final"] > 0.99 and trap["stabilisation"] <= 0.0
    fair = stability.stabilisation([start, directions(16, 8, 2)], [end, end + 0.01])
    assert fair["identical_init"] == 0.0
    assert fair["stabilisation"] == pytest.approx(fair["pw_mcc_final"] - fair["pw_mcc_initial"]) and (
        fair["stabilisation"] > 0.2
    )


def test_splitting_counts_children():
    narrow = np.eye(4, 8)
    wide = np.concatenate([narrow[[0, 0, 0, 1]] + 0.3 * np.eye(8)[4:], np.eye(8)[7:]])
    for block in (1, 100):
        found = stability.splitting(narrow, wide, block=block)
        assert found["children"].tolist() == [3, 1, 0, 0] and found["children_mean"] == 1.0
        assert (found["split_share"], found["lost_share"], found["novel_share"]) == (0.25, 0.5, pytest.approx(0.2))
    assert stability.splitting(narrow, wide, above=0.97)["children_mean"] == 0.0


def test_every_key_is_defined():
    a, b = directions(6, 4, 0), directions(6, 4, 1)
    keys = set(stability.pairwise_mcc([a, b])) | set(stability.shared_fraction((a, b), (a, b)))
    keys |= set(stability.stabilisation([a, b], [a, b])) | set(stability.splitting(a, b))
    assert keys == set(stability.DEFINITIONS)
