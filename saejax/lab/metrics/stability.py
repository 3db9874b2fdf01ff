"""Stability: agreement of SAEs over seeds, over encoder and decoder, over training, over widths.

Dictionaries are rows, `W_dec` [d_sae, d_in] and `W_enc.T`. All similarities are |cos|, in blocks; every score stands
beside that of random directions. Agreement is not correctness: two SAEs with the same seed agree before they learn
anything. `stabilisation` guards against that.

Sources:
  Song et al., Position: mechanistic interpretability should prioritize feature consistency in SAEs, 2025, pairwise MCC;
  Paulo and Belrose, Sparse autoencoders trained on the same data learn different features, 2025 (arXiv:2501.16615), the
  share of latents in both.
"""

import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from saejax.errors import UserError
from saejax.evals import matching

IDENTICAL_ABOVE = 0.99
"""Pairwise MCC of two initial dictionaries above which they are the same draw, not two."""

DEFINITIONS: dict[str, str] = {
    "pw_mcc": "Mean over pairs of dictionaries of the mean |cos| of their best one-to-one matching.",
    "pw_mcc_chance": "pw_mcc of random directions of the same shape.",
    "pw_shared_above_07_chance": "pw_shared_above_07 of random directions.",
    "pw_shared_above_09_chance": "pw_shared_above_09 of random directions.",
    "pw_mcc_pairs": "Matrix [n, n] of the matched mean of each pair; 1 on the diagonal.",
    "pw_shared_above_07": "Mean over pairs of the share of rows matched with |cos| above 0.7, over the larger "
    "dictionary.",
    "pw_shared_above_09": "The same above 0.9.",
    "shared_fraction": "Share of latents matched to the same partner by decoder and by encoder, with decoder |cos| "
    "above "
    "the threshold.",
    "shared_fraction_both": "The same with encoder |cos| above the threshold too.",
    "same_partner": "Share of latents matched to the same partner by decoder and by encoder, whatever the |cos|.",
    "shared_fraction_chance": "shared_fraction of random directions.",
    "shared_fraction_both_chance": "shared_fraction_both of random directions.",
    "same_partner_chance": "same_partner of random directions.",
    "stabilisation": "pw_mcc at the end minus pw_mcc at the start of training.",
    "pw_mcc_initial": "pw_mcc at the start.",
    "pw_mcc_final": "pw_mcc at the end.",
    "identical_init": "1 where two runs started from the same dictionary (matched |cos| above 0.99), so that "
    "pw_mcc_final "
    "is no evidence; else 0.",
    "children": "For each narrow latent, the number of wide latents with |cos| above the threshold.",
    "children_mean": "Mean of children.",
    "split_share": "Share of narrow latents with at least two children.",
    "lost_share": "Share of narrow latents without a child.",
    "novel_share": "Share of wide latents that are no narrow latent's child.",
    "children_mean_chance": "children_mean of a random wide dictionary.",
}


def pairwise_mcc(
    dictionaries: Sequence[Float[np.ndarray, "_ d_in"]],
    *,
    n_chance: int | None = None,
    seed: int = 0,
    block: int = 1024,
) -> dict[str, float | np.ndarray]:
    """Agreement of dictionaries of different seeds, up to order, length and sign.

    Args:
      dictionaries: At least two, of one width.
      n_chance: Random pairs behind the level of chance; None for 3, or 1 from 4,096 rows on.
      seed: Of those.
      block: Rows per product.

    Returns:
      `pw_mcc` and the keys that start with `pw_` of DEFINITIONS; scores in [0, 1].

    Raises:
      UserError: fewer than two dictionaries, or of different widths.

    Examples:
      >>> pairwise_mcc([np.eye(4), -2 * np.eye(4)[::-1]])["pw_mcc"]
      1.0
    """
    if len(dictionaries) < 2:
        raise UserError(f"stability needs at least two dictionaries, got {len(dictionaries)}")
    pairs, scores = np.eye(len(dictionaries)), []
    for a, b in itertools.combinations(range(len(dictionaries)), 2):
        scores.append(_agreement(dictionaries[a], dictionaries[b], block))
        pairs[a, b] = pairs[b, a] = scores[-1][0]
    first, second = np.asarray(dictionaries[0]).shape, np.asarray(dictionaries[1]).shape
    draws = zip(
        matching.random_directions(first, n_chance, seed),
        matching.random_directions(second, n_chance, seed + 1),
        strict=False,
    )
    found, chance = np.mean(scores, axis=0), np.mean([_agreement(a, b, block) for a, b in draws], axis=0)
    names = ("pw_mcc", "pw_shared_above_07", "pw_shared_above_09")
    return {
        **{name: float(value) for name, value in zip(names, found, strict=True)},
        **{f"{name}_chance": float(value) for name, value in zip(names, chance, strict=True)},
        "pw_mcc_pairs": pairs,
    }


def shared_fraction(
    decoders: tuple[Float[np.ndarray, "n d_in"], Float[np.ndarray, "m d_in"]],
    encoders: tuple[Float[np.ndarray, "n d_in"], Float[np.ndarray, "m d_in"]],
    *,
    above: float = 0.7,
    seed: int = 0,
    block: int = 1024,
) -> dict[str, float]:
    """Share of latents that two SAEs have in common, by decoder and encoder together.

    Args:
      decoders: W_dec of both, rows are latents.
      encoders: W_enc.T of both, rows are latents.
      above: |cos| a pair must exceed.
      seed: Of the random directions behind the level of chance.
      block: Rows per product.

    Returns:
      `shared_fraction`, `shared_fraction_both`, `same_partner` and the `_chance` of each; shares of the larger SAE.

    Raises:
      UserError: decoder and encoder of one SAE differ in shape.
    """
    for decoder, encoder in zip(decoders, encoders, strict=True):
        if np.shape(decoder) != np.shape(encoder):
            raise UserError(
                f"encoders must have latents as rows like decoders, {list(np.shape(decoder))}, got "
                f"{list(np.shape(encoder))}"
            )

    def shares(decoder_cos: np.ndarray, encoder_cos: np.ndarray) -> tuple[float, float, float]:
        by_decoder, by_encoder = matching.matched(decoder_cos), matching.matched(encoder_cos)
        agree = np.flatnonzero((by_decoder == by_encoder) & (by_decoder >= 0))
        partners, size = by_decoder[agree], max(decoder_cos.shape)
        near = decoder_cos[partners, agree] > above
        near_both = near & (encoder_cos[partners, agree] > above)
        return near.sum() / size, near_both.sum() / size, len(agree) / size

    found = shares(matching.abs_cos(*decoders, block=block), matching.abs_cos(*encoders, block=block))
    n, m = np.shape(decoders[0]), np.shape(decoders[1])
    random = [matching.random_directions(shape, 1, seed + i)[0] for i, shape in enumerate((n, m, n, m))]
    chance = shares(matching.abs_cos(*random[:2], block=block), matching.abs_cos(*random[2:], block=block))
    names = ("shared_fraction", "shared_fraction_both", "same_partner")
    return {
        **{name: float(value) for name, value in zip(names, found, strict=True)},
        **{f"{name}_chance": float(value) for name, value in zip(names, chance, strict=True)},
    }


def stabilisation(
    initial: Sequence[Float[np.ndarray, "_ d_in"]],
    final: Sequence[Float[np.ndarray, "_ d_in"]],
    *,
    seed: int = 0,
    block: int = 1024,
) -> dict[str, float]:
    """Gain in agreement during training, and whether the dictionaries began as one.

    Args:
      initial: Dictionaries before training, one per run.
      final: Dictionaries of the same runs after it.
      seed: Of the random directions behind the level of chance.
      block: Rows per product.

    Returns:
      `stabilisation` in [-1, 1], `pw_mcc_initial`, `pw_mcc_final`, `pw_mcc_chance`, `identical_init` (0 or 1).

    Raises:
      UserError: different numbers of dictionaries.

    Examples:
      >>> same = [np.eye(4), np.eye(4)]
      >>> stabilisation(same, same)["identical_init"]
      1.0
    """
    if len(initial) != len(final):
        raise UserError(f"initial and final must hold the same runs, got {len(initial)} and {len(final)}")
    start = pairwise_mcc(initial, n_chance=1, seed=seed, block=block)
    end = pairwise_mcc(final, seed=seed, block=block)
    pairs = np.asarray(start["pw_mcc_pairs"])[np.triu_indices(len(initial), 1)]
    return {
        "stabilisation": float(end["pw_mcc"]) - float(start["pw_mcc"]),
        "pw_mcc_initial": float(start["pw_mcc"]),
        "pw_mcc_final": float(end["pw_mcc"]),
        "pw_mcc_chance": float(end["pw_mcc_chance"]),
        "identical_init": float((pairs > IDENTICAL_ABOVE).any()),
    }


def splitting(
    narrow: Float[np.ndarray, "n d_in"],
    wide: Float[np.ndarray, "m d_in"],
    *,
    above: float = 0.7,
    seed: int = 0,
    block: int = 1024,
) -> dict[str, float | np.ndarray]:
    """Into how many latents of a wide SAE each latent of a narrow one splits.

    Args:
      narrow: Decoder rows of the narrow SAE.
      wide: Decoder rows of the wide SAE.
      above: |cos| from which a wide latent is a child.
      seed: Of the random wide dictionary behind the level of chance.
      block: Narrow rows per product; the whole matrix never exists.

    Returns:
      `children` [n] int64, `children_mean`, `split_share`, `lost_share`, `novel_share`, `children_mean_chance`.

    Examples:
      >>> splitting(np.eye(2), np.array([[1.0, 0.1], [1.0, -0.1]]))["children"].tolist()
      [2, 0]
    """
    children, is_child = _children(narrow, wide, above, block)
    random = matching.random_directions((len(wide), np.shape(wide)[1]), 1, seed)[0]
    return {
        "children_mean": float(children.mean()),
        "split_share": float((children >= 2).mean()),
        "lost_share": float((children == 0).mean()),
        "novel_share": float(1 - is_child.mean()),
        "children_mean_chance": float(_children(narrow, random, above, block)[0].mean()),
        "children": children,
    }


def _children(narrow: np.ndarray, wide: np.ndarray, above: float, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Children of each narrow row, and whether each wide row is one."""
    narrow = matching.checked(narrow, "narrow")
    counts, is_child = np.zeros(len(narrow), np.int64), np.zeros(len(wide), bool)
    for start in range(0, len(narrow), block):
        near = matching.abs_cos(narrow[start : start + block], wide, block=block) > above
        counts[start : start + block] = near.sum(axis=1)
        is_child |= near.any(axis=0)
    return counts, is_child


def _agreement(a: np.ndarray, b: np.ndarray, block: int) -> tuple[float, float, float]:
    """Mean |cos| of the best matching of two dictionaries, and the shares of the larger one above 0.7 and 0.9."""
    similarity = matching.abs_cos(a, b, block=block)
    match = matching.matched(similarity)
    found = np.flatnonzero(match >= 0)
    cos, size = similarity[match[found], found].astype(np.float64), max(similarity.shape)
    return float(cos.mean()), float((cos > 0.7).sum() / size), float((cos > 0.9).sum() / size)
