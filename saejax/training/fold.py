"""Folding: moves normalisation into the SAE, so that it works in the data's own scale."""

from __future__ import annotations

from saejax.activations import normalize
from saejax.errors import UserError
from saejax.sae import base, encoders, per_row


def check(sparsifier: base.Sparsifier, mode: normalize.NormMode) -> None:
    """Refuse a normalisation that could not be folded at the end.

    Raises:
      UserError: a whitening, and an architecture that needs its encoder to be the decoder's transpose; a whitening or
        a normalisation of every row, and rows of several sites.
    """
    whole = mode in (normalize.NormMode.whiten, normalize.NormMode.layer_norm)
    if whole and len(sparsifier.sites) > 1:
        raise UserError(
            f"normalize.mode={mode.name} is for rows of one site, these have {len(sparsifier.sites)}: take none, "
            "sqrt_d or unit"
        )
    if mode is normalize.NormMode.whiten and not sparsifier.whitens:
        raise UserError(
            f"normalize.mode=whiten cannot be folded into sae={sparsifier.name}, whose encoder is its decoder: "
            "take none, sqrt_d, unit or layer_norm"
        )


def folded(
    sparsifier: base.Sparsifier, params: base.SAEParams, normalizer: normalize.Normalizer
) -> tuple[base.Sparsifier, base.SAEParams]:
    """The SAE of parameters that were trained on normalised rows, for the rows themselves.

    Args:
      sparsifier: architecture.
      params: as trained.
      normalizer: what the rows went through.

    Returns:
      (architecture, parameters) after the weights absorbed the normalisation. Where rows were normalised one by one,
      the architecture is a `sae.per_row.LayerNormed`, which continues to do so.
    """
    if normalizer.matrix is not None and normalizer.inverse is not None:
        params = encoders.fold_matrix(sparsifier, params, normalizer.matrix, normalizer.inverse)
    params = sparsifier.fold(params, mean=normalizer.mean, scale=normalizer.scale)
    return (per_row.LayerNormed.of(sparsifier) if normalizer.per_row else sparsifier), params
