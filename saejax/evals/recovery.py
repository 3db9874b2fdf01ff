"""Dictionary recovery: how many known true features an SAE's dictionary holds, beside chance.

Directions are compared by |cos|, so the scores do not change when latents are permuted, rescaled or flipped in sign. A
latent of an SAE is never negative; `match_cos` keeps the sign and shows a flipped direction.

Sources:
  O'Neill and Klindt, Compute optimal inference and provable amortisation gap in sparse autoencoders, 2024
  (arXiv:2411.13117), for the matched mean; Sharkey et al., Taking features out of superposition with sparse
  autoencoders, 2022, for the mean of the best matches.
"""

import numpy as np
from jaxtyping import Float

from saejax.errors import UserError
from saejax.evals import matching

DEFINITIONS: dict[str, str] = {
    "mcc": "Mean |cos| between decoder rows and true features over the one-to-one matching that maximises it "
    "(Hungarian), over the smaller of both numbers of directions.",
    "mcc_features": "As mcc, but averaged over all true features, one without a partner counting as 0.",
    "recovered_features": "Share of true features whose partner in the matching of mcc has |cos| above 0.9.",
    "recovered_features_above_07": "As recovered_features, with |cos| above 0.7.",
    "mmcs_features": "Mean over true features of the largest |cos| to any decoder row.",
    "mmcs_latents": "Mean over decoder rows of the largest |cos| to any true feature; rows of zeros count as 0.",
    "uniqueness": "Distinct true features that are the best match (largest |cos|) of some decoder row, over the number "
    "of decoder rows.",
    "mcc_chance": "mcc of as many random directions as there are latents, averaged over the draws.",
    "mcc_features_chance": "mcc_features of the same random directions.",
    "recovered_features_chance": "recovered_features of the same random directions.",
    "recovered_features_above_07_chance": "recovered_features_above_07 of the same random directions.",
    "mmcs_features_chance": "mmcs_features of the same random directions.",
    "mmcs_latents_chance": "mmcs_latents of the same random directions.",
    "uniqueness_chance": "uniqueness of the same random directions.",
    "match": "For each true feature, the latent matched to it, or -1.",
    "match_cos": "For each true feature, the cosine with that latent, sign kept; 0 without a partner.",
}


def dictionary_recovery(
    dictionary: Float[np.ndarray, "d_sae d_in"],
    features: Float[np.ndarray, "n_features d_in"],
    *,
    n_chance: int | None = None,
    seed: int = 0,
    block: int = 1024,
) -> dict[str, float | np.ndarray]:
    """Compares a learnt dictionary to the true features.

    Args:
      dictionary: One direction per row; lengths do not matter.
      features: True directions, one per row; lengths do not matter.
      n_chance: Random dictionaries behind the level of chance; None for 3, or 1 from 4,096 latents on.
      seed: Of those.
      block: Rows per product. 16,384 latents and features need 3.5 GB and, with one random dictionary, two minutes.

    Returns:
      The keys of DEFINITIONS; `match` is [n_features] int64, `match_cos` [n_features] float64.

    Raises:
      UserError: the widths differ.

    Examples:
      >>> scores = dictionary_recovery(-np.eye(3)[[2, 0, 1]], np.eye(3))
      >>> scores["mcc"], scores["match"].tolist()
      (1.0, [1, 2, 0])
    """
    dictionary, features = np.asarray(dictionary), np.asarray(features)
    if dictionary.shape[-1] != features.shape[-1]:
        raise UserError(f"the true features have width {features.shape[-1]}, the SAE has d_in={dictionary.shape[-1]}")
    similarity = matching.abs_cos(dictionary, features, block=block)
    match = matching.matched(similarity)
    partnered = match >= 0
    pairs = matching.unit_rows(dictionary[match]) * matching.unit_rows(features)
    cos = np.where(partnered, pairs.sum(axis=1), 0.0)
    best_latent, best_feature = similarity.max(axis=1), similarity.max(axis=0)
    tracked = np.unique(similarity.argmax(axis=1)[best_latent > 0])
    del similarity
    return {
        "mcc": float(np.abs(cos[partnered]).mean()),
        "mcc_features": float(np.abs(cos).mean()),
        "recovered_features": float((np.abs(cos) > 0.9).mean()),
        "recovered_features_above_07": float((np.abs(cos) > 0.7).mean()),
        "mmcs_features": float(best_feature.mean(dtype=np.float64)),
        "mmcs_latents": float(best_latent.mean(dtype=np.float64)),
        "uniqueness": len(tracked) / len(dictionary),
        **_chance(dictionary.shape, features, n_chance, seed, block),
        "match": match,
        "match_cos": cos,
    }


def _chance(
    shape: tuple[int, int], features: Float[np.ndarray, "n_features d_in"], n_chance: int | None, seed: int, block: int
) -> dict[str, float]:
    """The scores of random dictionaries, averaged."""
    scores: dict[str, list[float]] = {}
    for directions in matching.random_directions(shape, n_chance, seed):
        similarity = matching.abs_cos(directions, features, block=block)
        match = matching.matched(similarity)
        found = np.flatnonzero(match >= 0)
        cos = similarity[match[found], found].astype(np.float64)
        one = {
            "mcc": cos.mean(),
            "mcc_features": cos.sum() / len(features),
            "recovered_features": (cos > 0.9).sum() / len(features),
            "recovered_features_above_07": (cos > 0.7).sum() / len(features),
            "mmcs_features": similarity.max(axis=0).mean(dtype=np.float64),
            "mmcs_latents": similarity.max(axis=1).mean(dtype=np.float64),
            "uniqueness": len(np.unique(similarity.argmax(axis=1))) / len(directions),
        }
        for key, value in one.items():
            scores.setdefault(f"{key}_chance", []).append(float(value))
    return {key: float(np.mean(values)) for key, values in scores.items()}
