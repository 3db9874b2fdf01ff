"""Splice evaluation: the effect of a reconstruction on the language model behind the activations.

The reconstruction replaces the activation at the hook. The model's predictions are compared with its own, and with
those after zero or the mean replaced the same activations. The score "loss recovered" depends on that choice, so its
name says it. The lower half of the model runs once per batch, the upper half once per variant.

Positions that training leaves out (the first of each segment, attention sinks) stay as they are in every variant. An
SAE's output for an activation it never saw says nothing about it, and one wrong sink spoils a whole sequence.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from saejax.errors import UserError
from saejax.evals import metric
from saejax.evals.result import EvalResult
from saejax.sae.layout import Family

Tokens = Int[np.ndarray, "b s"]
Keep = Callable[
    [Float[Array, "b s"], Int[np.ndarray, "b s"], Int[np.ndarray, "b s"]], Bool[Array, "b s"] | Bool[np.ndarray, "b s"]
]

_PREDICTIONS = "over all predictions made inside a segment, those made at its position 0 left out"
_KEPT = "at the kept positions, the masked ones staying clean"

DEFINITIONS: dict[str, str] = {
    "ce_clean": f"Mean cross-entropy in nats of the unchanged model, {_PREDICTIONS}.",
    "ce_spliced": f"As ce_clean, with the activation replaced by its reconstruction {_KEPT}.",
    "ce_zero": f"As ce_clean, with the activation replaced by zero {_KEPT}.",
    "ce_mean": f"As ce_clean, with the activation replaced by the mean of the kept activations {_KEPT}.",
    "delta_ce": "ce_spliced - ce_clean, in nats.",
    "kl": "Mean Kullback-Leibler divergence in nats from the clean to the spliced next-token distribution, over the "
    "same predictions as ce_clean.",
    "kl_zero": "As kl, with the zero ablation in place of the splice.",
    "kl_mean": "As kl, with the mean ablation in place of the splice.",
    "recovered_zero": "(ce_zero - ce_spliced) / (ce_zero - ce_clean): 1 is the clean model, 0 no better than zero "
    "ablation.",
    "recovered_mean": "(ce_mean - ce_spliced) / (ce_mean - ce_clean): 1 is the clean model, 0 no better than mean "
    "ablation.",
}


def evaluate_language_model(
    sae: Callable[[Float[Array, "b s d_in"]], Float[Array, "b s d_in"]],
    backend: Any,
    batches: Iterable[tuple[Tokens, Tokens]],
    *,
    hook: str,
    keep: Keep | None = None,
    mean: Float[np.ndarray, "d_in"] | None = None,
) -> EvalResult:
    """Measures the loss of a language model with reconstructions spliced in.

    Args:
      sae: Maps activations [b, s, d_in] to reconstructions in the same scale; an `sae.model.SAE` is one.
      backend: With `lower(tokens, segments, hook) -> h` and `upper(h, tokens, segments, hook) -> logits`.
      batches: Pairs (tokens, segments), int32 [b, s]; segment 0 is padding, others are documents.
      hook: Where to splice.
      keep: (norms of h, positions in the segment, segments), each [b, s] -> True where the activation is replaced. This
        is the mask of the harvest. None keeps every position but 0 of each segment.
      mean: What mean ablation puts in; None for the mean of the kept activations, which costs one more pass through
        the lower half.

    Returns:
      The keys of DEFINITIONS; `data` says how many predictions and what share of tokens was kept.

    Raises:
      UserError: there is nothing to predict, or the SAE writes other sites than the hook.
    """
    family = getattr(getattr(sae, "sparsifier", None), "family", Family.sae)
    if family is not Family.sae:
        raise UserError(f"sae.family={family.name} cannot be spliced into one hook: evaluate with language_model=false")
    mask: Keep = _not_first if keep is None else keep
    if mean is None:
        batches = list(batches)
        mean = _mean_activation(backend, batches, hook, mask)
    sums, n_predictions, n_kept, n_tokens = {}, 0, 0, 0
    for tokens, segments in batches:
        h = backend.lower(tokens, segments, hook)
        kept = _kept(h, segments, mask)
        variants = {
            "spliced": lambda h: sae(h),
            "zero": lambda h: jnp.zeros_like(h),
            "mean": lambda h: jnp.broadcast_to(jnp.asarray(mean, jnp.float32)[None, None, :], h.shape),
        }
        valid = predicted(segments)
        clean = backend.upper(h, tokens, segments, hook)
        _add(sums, "clean", _score(clean, clean, tokens, valid))
        for name, replacement in variants.items():
            spliced = jnp.where(kept[..., None], replacement(h).astype(h.dtype), h)
            _add(sums, name, _score(clean, backend.upper(spliced, tokens, segments, hook), tokens, valid))
        n_predictions += int(valid.sum())
        n_kept, n_tokens = n_kept + int(kept.sum()), n_tokens + int((np.asarray(segments) > 0).sum())
    if not n_predictions:
        raise UserError("there is nothing to predict: every segment of the evaluation text is shorter than 3 tokens")
    data = {"lm_predictions": n_predictions, "lm_tokens": n_tokens, "lm_kept_share": n_kept / n_tokens, "hook": hook}
    return EvalResult.of(_scores({k: v / n_predictions for k, v in sums.items()}), DEFINITIONS, data)


def predicted(segments: Tokens) -> Bool[np.ndarray, "b t"]:
    """Mask of the predictions that count: of a token in the same segment, made after its position 0.

    Args:
      segments: [b, s].

    Returns:
      [b, s - 1]; entry t stands for the prediction of token t + 1.

    Examples:
      >>> predicted(np.array([[1, 1, 1, 2, 2, 2, 0, 0]])).tolist()
      [[False, True, False, False, True, False, False]]
    """
    segments = np.asarray(segments)
    same = (segments[:, 1:] == segments[:, :-1]) & (segments[:, :-1] > 0)
    return same & (_positions(segments)[:, :-1] > 0)


def _scores(means: dict[str, float]) -> dict[str, float]:
    """Mean cross-entropies and divergences to every key of DEFINITIONS."""
    ce, kl = ({name: means[f"{kind}_{name}"] for name in ("clean", "spliced", "zero", "mean")} for kind in ("ce", "kl"))
    lost = {name: metric.ratio(ce[name] - ce["spliced"], ce[name] - ce["clean"]) for name in ("zero", "mean")}
    return {
        "ce_clean": ce["clean"],
        "ce_spliced": ce["spliced"],
        "ce_zero": ce["zero"],
        "ce_mean": ce["mean"],
        "delta_ce": ce["spliced"] - ce["clean"],
        "kl": kl["spliced"],
        "kl_zero": kl["zero"],
        "kl_mean": kl["mean"],
        "recovered_zero": lost["zero"],
        "recovered_mean": lost["mean"],
    }


@jax.jit
def _score(
    clean: Float[Array, "b s vocab"], logits: Float[Array, "b s vocab"], tokens: Tokens, valid: Bool[Array, "b t"]
) -> tuple[Float[Array, "b"], Float[Array, "b"]]:
    """Sums over the valid predictions of each row of the cross-entropy and of the divergence from the clean model."""
    log_p = jax.nn.log_softmax(clean[:, :-1].astype(jnp.float32))
    log_q = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32))
    ce = -jnp.take_along_axis(log_q, tokens[:, 1:, None], axis=-1)[..., 0]
    kl = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
    return jnp.sum(jnp.where(valid, ce, 0.0), axis=1), jnp.sum(jnp.where(valid, kl, 0.0), axis=1)


def _add(sums: dict[str, float], name: str, scores: tuple[jax.Array, jax.Array]) -> None:
    """Adds the rows of one batch to those of the run, in float64."""
    for kind, value in zip(("ce", "kl"), scores, strict=True):
        sums[f"{kind}_{name}"] = sums.get(f"{kind}_{name}", 0.0) + float(np.asarray(value, np.float64).sum())


def _mean_activation(
    backend: Any, batches: Iterable[tuple[Tokens, Tokens]], hook: str, keep: Keep
) -> Float[np.ndarray, "d_in"]:
    """Mean of the kept activations, summed over batches in float64."""
    total, rows = np.zeros(backend.hook_width(hook)), 0
    for tokens, segments in batches:
        h = backend.lower(tokens, segments, hook)
        kept = _kept(h, segments, keep)
        total = total + np.asarray(_kept_sum(h, kept), np.float64)
        rows += int(kept.sum())
    if not rows:
        raise UserError("the mask keeps no position of the evaluation text: nothing would be replaced")
    return total / rows


@jax.jit
def _kept_sum(h: Float[Array, "b s d_in"], kept: Bool[Array, "b s"]) -> Float[Array, "d_in"]:
    return jnp.sum(jnp.where(kept[..., None], h.astype(jnp.float32), 0.0), axis=(0, 1))


def _kept(h: Float[Array, "b s d_in"], segments: Tokens, keep: Keep) -> Bool[Array, "b s"]:
    """Mask of the replaced activations; never at padding."""
    norms = jnp.linalg.norm(h.astype(jnp.float32), axis=-1)
    segments = np.asarray(segments)
    return jnp.asarray(keep(norms, _positions(segments), segments)) & jnp.asarray(segments > 0)


def _not_first(norms: Any, positions: Tokens, segments: Tokens) -> Bool[np.ndarray, "b s"]:
    """The mask of last resort: position 0 is a sink in most models."""
    return positions > 0


def _positions(segments: Tokens) -> Int[np.ndarray, "b s"]:
    """Position of each token in its segment."""
    place = np.arange(segments.shape[1])[None, :]
    starts = np.diff(segments, axis=1, prepend=-1) != 0
    return place - np.maximum.accumulate(np.where(starts, place, 0), axis=1)
