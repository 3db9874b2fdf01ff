"""Scores of found codes against known true codes, and the inferences that they compare.

The experiments on amortisation, shifted combinations and hierarchy share this module.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from saejax import sparse_coding
from saejax.evals import matching
from saejax.lab.metrics import true_codes
from saejax.lab.metrics.over import over
from saejax.sae.model import SAE

DROP_BELOW = 0.1
"""Codes below this count as absent after OMP: a fifth of the smallest amplitude of SB-iid and SB-hier."""


@dataclasses.dataclass(frozen=True)
class Dictionary:
    """Unit rows, the offset subtracted from signals first, and the true feature of each row."""

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

    def codes(
        self, y: Float[np.ndarray, "b d"], method: str, drop: float = 0.0, **options: Any
    ) -> tuple[np.ndarray, float]:
        """Codes of signals by a solver, what is below `drop` set to 0, [b, n]; and the share of rows not converged."""
        arrays = jnp.asarray(y), jnp.asarray(self.rows)
        solution = sparse_coding.infer(*arrays, method=method, bias=jnp.asarray(self.bias), **options)
        codes = np.asarray(solution.dense())
        return np.where(codes >= drop, codes, 0.0), float(1 - np.asarray(solution.converged).mean())


def scores(true: Float[np.ndarray, "b n"], found: Float[np.ndarray, "b m"], match: np.ndarray) -> dict[str, float]:
    """Support F1 (micro) and code MCC, each with its chance, L0 and share of unused atoms of found codes.

    Args:
      true: codes behind the data.
      found: codes to judge.
      match: for each true feature its column of `found`, or -1; code MCC finds a matching of its own.
    """
    batch = true_codes.CodeBatch(
        features=jnp.asarray(true, jnp.float32),
        latents=jnp.asarray(found, jnp.float32),
        split=jnp.asarray(true_codes.split_rows(np.arange(len(true)))),
        match=jnp.asarray(match, jnp.int32),
    )
    support = over(true_codes.Support(), batch)
    return {
        **{key.removeprefix("support_"): support[key] for key in ("support_f1", "support_f1_chance")},
        **{key: value for key, value in over(true_codes.CodeMcc(), batch).items() if "features" not in key},
        "l0": float((found > 0).sum(axis=1).mean()),
        "unused": float((~(found > 0).any(axis=0)).mean()),
    }
