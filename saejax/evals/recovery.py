"""Whether a dictionary holds the true features, where these are known: matching, and the level of chance.

Directions are compared by |cos|. The scores therefore do not change when latents are permuted, rescaled or flipped in
sign. A latent of an SAE is never negative, so a flipped direction is worth a look at `match_cos`, which keeps the sign.

Sources:
  O'Neill and Klindt, Compute optimal inference and provable amortisation gap in sparse autoencoders, 2024
  (arXiv:2411.13117), for the matched mean; Sharkey et al., Taking features out of superposition with sparse
  autoencoders, 2022, for the mean of the best matches.
"""

import numpy as np
from jaxtyping import Float

from saejax.errors import UserError

_CHANCE_STREAM = 0x6D6363

DEFINITIONS: dict[str, str] = {
    "mcc": "Mean |cos| between decoder rows and true features over the one-to-one matching that maximises it "
    "(Hungarian), over the smaller of both numbers of directions.",
    "mcc_features": "As mcc, but averaged over all true features, one without a partner counting as 0.",
    "recovered_features": "Share of true features whose partner in the matching of mcc has |cos| above 0.9.",
    "mmcs_features": "Mean over true features of the largest |cos| to any decoder row.",
    "mmcs_latents": "Mean over decoder rows of the largest |cos| to any true feature; rows of zeros count as 0.",
    "mcc_chance": "mcc of as many random directions as there are latents, averaged over the draws.",
    "mmcs_features_chance": "mmcs_features of the same random directions.",
    "match": "For each true feature, the latent matched to it, or -1.",
    "match_cos": "For each true feature, the cosine with that latent, sign kept; 0 without a partner.",
}


def dictionary_recovery(
    dictionary: Float[np.ndarray, "d_sae d_in"],
    features: Float[np.ndarray, "n_features d_in"],
    *,
    n_chance: int = 3,
    seed: int = 0,
) -> dict[str, float | np.ndarray]:
    """Compares a learnt dictionary to the true features.

    Args:
      dictionary: One direction per row; lengths do not matter.
      features: True directions, one per row; lengths do not matter.
      n_chance: Random dictionaries behind the level of chance.
      seed: Of those.

    Returns:
      The keys of DEFINITIONS; `match` is [n_features] int64, `match_cos` [n_features] float64.

    Raises:
      UserError: the widths differ.

    Example:
      >>> scores = dictionary_recovery(-np.eye(3)[[2, 0, 1]], np.eye(3))
      >>> scores["mcc"], scores["match"].tolist()
      (1.0, [1, 2, 0])
    """
    if dictionary.shape[-1] != features.shape[-1]:
        raise UserError(f"the true features have width {features.shape[-1]}, the SAE has d_in={dictionary.shape[-1]}")
    truth = _unit(features)
    signed = _unit(dictionary) @ truth.T
    match = _matched(np.abs(signed))
    partnered = match >= 0
    cos = np.where(partnered, signed[match, np.arange(len(truth))], 0.0)
    # Synthetic features may come from the plain seed: the same draws again would put chance at 1.
    rng = np.random.default_rng((seed, _CHANCE_STREAM))
    chance = [np.abs(_unit(rng.standard_normal(dictionary.shape)) @ truth.T) for _ in range(n_chance)]
    return {
        "mcc": float(np.abs(cos[partnered]).mean()),
        "mcc_features": float(np.abs(cos).mean()),
        "recovered_features": float((np.abs(cos) > 0.9).mean()),
        "mmcs_features": float(np.abs(signed).max(axis=0).mean()),
        "mmcs_latents": float(np.abs(signed).max(axis=1).mean()),
        "mcc_chance": float(np.mean([_mcc(c) for c in chance])),
        "mmcs_features_chance": float(np.mean([c.max(axis=0).mean() for c in chance])),
        "match": match,
        "match_cos": cos,
    }


def _mcc(similarity: Float[np.ndarray, "d_sae n_features"]) -> float:
    """Mean similarity of the matched pairs."""
    match = _matched(similarity)
    found = np.flatnonzero(match >= 0)
    return float(similarity[match[found], found].mean())


def _matched(similarity: Float[np.ndarray, "d_sae n_features"]) -> np.ndarray:
    """The row matched to each column by the assignment of largest total, or -1."""
    import scipy.optimize  # slow to import, and only data with known features need it

    rows, columns = scipy.optimize.linear_sum_assignment(similarity, maximize=True)
    match = np.full(similarity.shape[1], -1)
    match[columns] = rows
    return match


def _unit(directions: Float[np.ndarray, "n d_in"]) -> Float[np.ndarray, "n d_in"]:
    """Rows of length 1 in float64; rows of zeros stay zeros."""
    directions = np.asarray(directions, np.float64)
    norm = np.linalg.norm(directions, axis=-1, keepdims=True)
    return directions / np.where(norm > 0, norm, 1.0)
