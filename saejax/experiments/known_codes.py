"""Scores of found codes where the codes that made the data are known, and the inferences that are compared by them.

Shared by the experiments on amortisation, shifted combinations and hierarchy; no experiment lives here.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from saejax import sparse_coding
from saejax.evals import matching
from saejax.sae.model import SAE

DROP_BELOW = 0.1
"""Codes below this count as absent after OMP: a fifth of the smallest true amplitude of the benchmarks."""


@dataclasses.dataclass(frozen=True)
class Dictionary:
    """Unit rows, what is subtracted from signals first, and which row stands for which true feature."""

    rows: np.ndarray
    """[n, d] float32, norm 1."""
    bias: np.ndarray
    """[d] float32."""
    match: np.ndarray
    """[n_features] int64, -1 without a partner."""
    mcc: float
    """Mean |cos| of the partners."""

    @staticmethod
    def of(rows: Any, features: Float[np.ndarray, "n_features d"], bias: Any = None) -> Dictionary:
        """Matches rows of any length to the true features by |cos| (Hungarian); dead directions keep a row."""
        similarity = matching.abs_cos(np.asarray(rows), features)
        match = matching.matched(similarity)
        found = np.flatnonzero(match >= 0)
        return Dictionary(
            rows=matching.unit_rows(rows).astype(np.float32),
            bias=np.zeros(features.shape[1], np.float32) if bias is None else np.asarray(bias),
            match=match,
            mcc=float(similarity[match[found], found].mean()),
        )

    @staticmethod
    def of_sae(sae: SAE, features: Float[np.ndarray, "n_features d"]) -> Dictionary:
        """The decoder of an SAE."""
        return Dictionary.of(sae.params.W_dec, features, sae.params.b_dec)

    def codes(self, y: Float[np.ndarray, "b d"], method: str, drop: float = 0.0, **options: Any) -> np.ndarray:
        """Codes of signals by a solver, what is below `drop` set to 0: [b, n]."""
        arrays = jnp.asarray(y), jnp.asarray(self.rows)
        solution = sparse_coding.infer(*arrays, method=method, bias=jnp.asarray(self.bias), **options)
        codes = np.asarray(solution.dense())
        return np.where(codes >= drop, codes, 0.0)


def scores(true: Float[np.ndarray, "b n"], found: Float[np.ndarray, "b m"], match: np.ndarray) -> dict[str, float]:
    """Support F1 (micro), code MCC, L0 and share of unused atoms of found codes.

    Args:
      true: codes behind the data.
      found: codes to judge.
      match: for each true feature its column of `found`, or -1.
    """
    return {
        "f1": support_f1(true > 0, found > 0, match),
        "code_mcc": code_mcc(true, found),
        "l0": float((found > 0).sum(axis=1).mean()),
        "unused": float((~(found > 0).any(axis=0)).mean()),
    }


def support_f1(true: Bool[np.ndarray, "b n"], found: Bool[np.ndarray, "b m"], match: np.ndarray) -> float:
    """2 TP / (true + found), all entries of all rows together; columns without a partner count as found."""
    partnered = match >= 0
    both = (true[:, partnered] & found[:, match[partnered]]).sum()
    return float(2 * both / max(true.sum() + found.sum(), 1))


def code_mcc(true: Float[np.ndarray, "b n"], found: Float[np.ndarray, "b m"]) -> float:
    """Mean |Pearson correlation| of matched columns: matched on even rows, scored on odd rows, 0 for a dead column."""
    match = matching.matched(correlation(found[::2], true[::2]))
    return matched_correlation(true[1::2], found[1::2], match)


def matched_correlation(true: Float[np.ndarray, "b n"], found: Float[np.ndarray, "b m"], match: np.ndarray) -> float:
    """Mean |Pearson correlation| under a given matching, over the true columns that vary."""
    vary = true.std(axis=0) > 0
    agreement = correlation(found, true)[match, np.arange(len(match))]
    return float(np.where(match >= 0, agreement, 0.0)[vary].mean())


def correlation(a: Float[np.ndarray, "b m"], b: Float[np.ndarray, "b n"]) -> Float[np.ndarray, "m n"]:
    """|Pearson correlation| of all pairs of columns, 0 where a column is constant."""
    return np.abs(_standard(a).T @ _standard(b))


def _standard(a: np.ndarray) -> np.ndarray:
    centred = a - a.mean(axis=0)
    length = np.linalg.norm(centred, axis=0)
    return centred / np.where(length > 1e-9, length, np.inf)
