r"""True-code metrics: found latents against known features, by correlation, support and size.

The codes are compared here, row by row; `evals.recovery` compares the directions. The matching \(\pi\) (one latent per
feature) is learnt on rows A and scored on rows B,

.. math:: \mathrm{code\_mcc} = \mathrm{mean}_j\, |\mathrm{corr}_B(z_j, \hat z_{\pi(j)})|,\qquad
   \pi = \arg\max_\pi \sum_j |\mathrm{corr}_A(z_j, \hat z_{\pi(j)})|

A field of the batch says which rows are A and which are B, so it stays with a row wherever that row goes.

Sources:
  Hyvarinen and Morioka, Unsupervised feature extraction by time-contrastive learning, 2016, matched correlation;
  O'Neill and Klindt, 2024 (arXiv:2411.13117), for its use on sparse codes.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Int

from saejax.errors import UserError
from saejax.evals import matching, metric
from saejax.fields import numeric

MATCH, SCORE, SHIFTED = 0, 1, 2
"""Values of `CodeBatch.split`: rows that choose the matching, rows that score it, rows of another distribution."""


@struct.dataclass
class CodeBatch:
    """True and found codes of the same rows.

    Attributes:
      features: True coefficients, [b, n_features] float32.
      latents: Found ones, [b, d_sae] float32.
      split: MATCH, SCORE or SHIFTED, [b] int32; see `split_rows`. Only `CodeMcc` needs it.
      match: The latent of each feature, or -1, [n_features] int32, as `evals.recovery` finds it; not for `CodeMcc`.
      weight: 1 for a real row, 0 for padding, [b] float32.
    """

    shared: ClassVar[tuple[str, ...]] = ("match",)

    features: jax.Array
    latents: jax.Array
    split: jax.Array | None = None
    match: jax.Array | None = None
    weight: jax.Array | None = None


def split_rows(ids: Int[np.ndarray, "n"], *, match_share: float = 0.5, seed: int = 0) -> Int[np.ndarray, "n"]:
    """Returns MATCH or SCORE for each row from a hash of its id, so that order and batches do not matter.

    Args:
      ids: One integer per row, its own.
      match_share: Expected share of rows that choose the matching, in (0, 1).
      seed: Of the hash.

    Examples:
      >>> split_rows(np.arange(8)).tolist() == split_rows(np.arange(8)[::-1])[::-1].tolist()
      True
    """
    if not 0 < match_share < 1:
        raise UserError(f"match_share must lie between 0 and 1, got {match_share}")
    numeric.seed(seed)
    with np.errstate(over="ignore"):  # splitmix64
        z = np.asarray(ids).astype(np.uint64) + np.uint64(seed + 1) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return np.where(z / 2.0**64 < match_share, MATCH, SCORE).astype(np.int32)


@struct.dataclass
class CodeMccState:
    """Moments of each group of rows g about its means.

    Attributes:
      rows: [g].
      mean: Means of features and latents side by side, [g, n_features + d_sae].
      spread: Sums of squares about them, the same shape.
      cross: Sums of products of feature and latent, [g, n_features, d_sae].
    """

    rows: jax.Array
    mean: jax.Array
    spread: jax.Array
    cross: jax.Array


@metric.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class CodeMcc(metric.Metric):
    """Mean |Pearson correlation| of matched features and latents, on other rows than those that chose the matching."""

    name: ClassVar[str] = "code_mcc"
    batch_type: ClassVar[type] = CodeBatch

    shifted: bool = False
    """Whether rows SHIFTED are there: the same matching is scored on them too, and the gap is reported."""

    def init(self, batch: Any) -> CodeMccState:
        if batch.split is None:
            raise UserError("split must say for every row whether it chooses the matching or scores it, got None")
        groups, n, m = 2 + self.shifted, batch.features.shape[-1], batch.latents.shape[-1]
        both = jnp.zeros((groups, n + m))
        return CodeMccState(rows=jnp.zeros(groups), mean=both, spread=both, cross=jnp.zeros((groups, n, m)))

    def update(self, state: CodeMccState, batch: Any) -> CodeMccState:
        n, both = batch.features.shape[-1], jnp.concatenate([batch.features, batch.latents], axis=-1)

        def moments(group: jax.Array) -> CodeMccState:
            rows, mean, apart = metric.centred(both, batch.weight * (batch.split == group))
            cross = jnp.matmul(apart[:, :n].T, apart[:, n:], precision=jax.lax.Precision.HIGHEST)
            return CodeMccState(rows=rows, mean=mean, spread=jnp.sum(apart**2, axis=0), cross=cross)

        return self.merge(state, jax.lax.map(moments, jnp.arange(state.rows.shape[0])))

    def merge(self, a: CodeMccState, b: CodeMccState) -> CodeMccState:
        share = metric.share_of_second(a.rows, b.rows)
        shift, factor, n = b.mean - a.mean, a.rows * share, a.cross.shape[1]
        products = shift[:, :n, None] * shift[:, None, n:]
        return CodeMccState(
            rows=a.rows + b.rows,
            mean=a.mean + shift * share[:, None],
            spread=a.spread + b.spread + shift * shift * factor[:, None],
            cross=a.cross + b.cross + products * factor[:, None, None],
        )

    def compute(self, state: CodeMccState) -> dict[str, float | np.ndarray]:
        n_features = state.cross.shape[1]
        correlations = [
            _correlation(np.asarray(state.spread[g]), np.asarray(state.cross[g])) for g in range(len(state.rows))
        ]
        varies = [np.asarray(state.spread[g])[:n_features] > 0 for g in range(len(state.rows))]
        match = matching.matched(correlations[MATCH].T)
        values: dict[str, float | np.ndarray] = {}
        for group, end in ((SCORE, ""), (SHIFTED, "_shifted"))[: 1 + self.shifted]:
            known = varies[MATCH] & varies[group]
            pairs = np.flatnonzero(known & (match >= 0))
            found = correlations[group][pairs, match[pairs]]
            values[f"code_mcc{end}"] = metric.ratio(found.sum(), len(found))
            values[f"code_mcc_features{end}"] = metric.ratio(found.sum(), known.sum())
            values[f"code_mcc{end}_chance"] = metric.ratio(
                correlations[group][pairs].sum(), len(pairs) * _n_latents(state)
            )
        if self.shifted:
            values["code_mcc_shift_gap"] = float(values["code_mcc"]) - float(values["code_mcc_shifted"])
        return values | {"code_match": match}

    def definitions(self) -> dict[str, str]:
        texts = {
            "code_mcc": "Mean |Pearson correlation| of each true feature and the latent matched to it, the one-to-one "
            "matching chosen on other rows; features that do not vary in either part are left out, a latent that does "
            "not vary counts as 0.",
            "code_mcc_features": "As code_mcc, but averaged over all features that vary, one without a partner as 0.",
            "code_mcc_chance": "Expected code_mcc of a random matching: the mean of |correlation| over all latents.",
            "code_match": "For each true feature, the latent matched to it by correlation, or -1.",
        }
        if self.shifted:
            texts |= {
                f"code_mcc{middle}_shifted{end}": f"code_mcc{middle}{end} on the shifted rows, with the same matching."
                for middle, end in (("", ""), ("_features", ""), ("", "_chance"))
            }
            texts["code_mcc_shift_gap"] = "code_mcc - code_mcc_shifted."
        return texts


def _n_latents(state: CodeMccState) -> int:
    """Number of latents."""
    return state.cross.shape[2]


def _correlation(spread: np.ndarray, cross: np.ndarray) -> np.ndarray:
    """|Pearson correlation| [n_features, d_sae], 0 where one side does not vary."""
    deviation = np.sqrt(np.asarray(spread, np.float64))
    scale = deviation[: len(cross), None] * deviation[None, len(cross) :]
    return np.minimum(np.abs(np.divide(cross, scale, out=np.zeros(cross.shape), where=scale > 0)), 1.0)


@struct.dataclass
class SupportState:
    """Counts of rows.

    Attributes:
      rows: All, scalar.
      partnered: All rows where the feature has a latent, else 0, [n_features].
      true_on: Feature on, [n_features].
      found_on: Its latent on, [n_features].
      both_on: Both, [n_features].
      firings: Latents on in all rows, matched or not, scalar.
      true_sum: Sum of the feature over rows where it is on, [n_features].
      found_sum: Sum of its latent over the same rows, [n_features].
    """

    rows: jax.Array
    partnered: jax.Array
    true_on: jax.Array
    found_on: jax.Array
    both_on: jax.Array
    firings: jax.Array
    true_sum: jax.Array
    found_sum: jax.Array


@metric.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Support(metric.Metric):
    r"""Whether matched latents fire where their features are on, and how large they are there.

    Micro: \(P = TP / \text{all firings}\), \(R = TP / \text{all features on}\), \(F_1 = 2PR / (P + R)\), pooled over
    features and rows. Macro: the mean of each feature's own. Chance: the same rates, independent of the features.
    """

    name: ClassVar[str] = "support"
    batch_type: ClassVar[type] = CodeBatch

    above: float = 0.0
    """A latent is on when its size is above this; a feature when it is not 0."""

    def init(self, batch: Any) -> SupportState:
        if batch.match is None:
            raise UserError("match must give the latent of each feature, got None; evals.recovery finds it")
        if batch.match.shape != batch.features.shape[-1:]:
            raise UserError(f"match must have {batch.features.shape[-1]} entries, got {list(batch.match.shape)}")
        zero, each = jnp.zeros(()), jnp.zeros(batch.features.shape[-1])
        return SupportState(zero, each, each, each, each, zero, each, each)

    def update(self, state: SupportState, batch: Any) -> SupportState:
        real = batch.weight[:, None] > 0
        features, latents = jnp.where(real, batch.features, 0.0), jnp.where(real, batch.latents, 0.0)
        partnered = (batch.match >= 0)[None, :]
        found = jnp.where(partnered, latents[:, jnp.maximum(batch.match, 0)], 0.0)
        true_on, found_on = features != 0, partnered & (jnp.abs(found) > self.above)

        def over_rows(a: jax.Array) -> jax.Array:
            return jnp.sum(a, axis=0, dtype=jnp.float32)

        this = SupportState(
            rows=jnp.sum(real, dtype=jnp.float32),
            partnered=over_rows(partnered & real),
            true_on=over_rows(true_on),
            found_on=over_rows(found_on),
            both_on=over_rows(true_on & found_on),
            firings=jnp.sum(jnp.abs(latents) > self.above, dtype=jnp.float32),
            true_sum=over_rows(jnp.where(partnered, features, 0.0)),
            found_sum=over_rows(jnp.where(true_on, found, 0.0)),
        )
        return self.merge(state, this)

    def merge(self, a: SupportState, b: SupportState) -> SupportState:
        return jax.tree.map(lambda p, q: p + q, a, b)

    def compute(self, state: SupportState) -> dict[str, float | np.ndarray]:
        true_on, found_on = np.asarray(state.true_on), np.asarray(state.found_on)
        values: dict[str, float | np.ndarray] = {}
        by_chance = true_on * found_on / max(float(state.rows), 1.0)
        seen = true_on > 0
        for both, end in ((np.asarray(state.both_on), ""), (by_chance, "_chance")):
            f1 = _quotient(2 * both, true_on + found_on)
            values |= {
                f"support_precision{end}": metric.ratio(both.sum(), state.firings),
                f"support_recall{end}": metric.ratio(both.sum(), true_on.sum()),
                f"support_f1{end}": metric.ratio(2 * both.sum(), true_on.sum() + state.firings),
                f"support_precision_macro{end}": metric.ratio(_quotient(both, found_on)[seen].sum(), seen.sum()),
                f"support_recall_macro{end}": metric.ratio(_quotient(both, true_on)[seen].sum(), seen.sum()),
                f"support_f1_macro{end}": metric.ratio(f1[seen].sum(), seen.sum()),
            }
        true_sum, found_sum = np.asarray(state.true_sum), np.asarray(state.found_sum)
        known = (np.asarray(state.partnered) > 0) & (true_sum != 0)
        on_truth = np.where(known, _quotient(found_sum, true_sum), np.nan)
        return values | {
            "on_truth_ratio_shared": metric.ratio(found_sum[known].sum(), true_sum[known].sum()),
            "on_truth_ratio_median": float(np.median(on_truth[known])) if known.any() else float("nan"),
            "on_truth_ratio": on_truth,
        }

    def definitions(self) -> dict[str, str]:
        on = f"above {self.above:g} in size"
        texts = {
            "support_precision": f"Share of all firings of latents ({on}; a latent without a feature counts as well) "
            "that fall on a row where the feature matched to the latent is not 0.",
            "support_recall": f"Share of all features not 0 in some row whose matched latent is {on} in that row.",
            "support_f1": "Harmonic mean of support_precision and support_recall.",
            "support_precision_macro": "Mean over features that occur of the precision of the matched latent, 0 "
            "without.",
            "support_recall_macro": "Mean over features that occur of the recall of the matched latent, 0 without.",
            "support_f1_macro": "Mean over features that occur of the F1 of the matched latent, 0 without.",
        }
        chance = {
            f"{key}_chance": f"Expected {key} of latents that fire as often as they do, but on rows drawn at random."
            for key in texts
        }
        return {
            **texts,
            **chance,
            "on_truth_ratio": "For each feature, the sum of its latent over rows where the feature is not 0, "
            "divided by "
            "the sum of the feature; below 1 is shrunk or missed. For unit decoder rows and unit features.",
            "on_truth_ratio_median": "Median of on_truth_ratio over the features with a latent that occur.",
            "on_truth_ratio_shared": "The same ratio of sums over all of these features together.",
        }


def _quotient(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Elementwise quotient, 0 where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.zeros(numerator.shape), where=denominator != 0)
