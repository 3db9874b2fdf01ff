"""Splicing into a model of two lines whose every loss can be written down."""

import jax.numpy as jnp
import numpy as np
import pytest

from saejax.errors import UserError
from saejax.evals import language_model

V, D = 5, 4
HOOK = "blocks.0.hook_resid_post"
TOKENS = np.array([[3, 1, 4, 1, 2, 0], [2, 2, 0, 3, 4, 1]], np.int32)
SEGMENTS = np.array([[1, 1, 1, 1, 1, 0], [1, 1, 1, 2, 2, 2]], np.int32)
# By hand: predictions of row 0 made at positions 1..3; of row 1 at place 1 (segment 1) and place 4 (segment 2).
COUNTED = [(0, 1), (0, 2), (0, 3), (1, 1), (1, 4)]


class Backend:
    """h = E[token]; logits = (running mean of h within the segment) U. Later tokens see earlier activations."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.E, self.U = rng.standard_normal((V, D)).astype(np.float32), rng.standard_normal((D, V)).astype(np.float32)
        self.seen, self.lowered = [], 0

    def hook_width(self, hook):
        return D

    def lower(self, tokens, segments, hook):
        assert hook == HOOK
        self.lowered += 1
        return jnp.asarray(self.E)[tokens]

    def upper(self, h, tokens, segments, hook):
        self.seen.append(np.asarray(h))
        return self._mix(segments) @ h @ self.U

    @staticmethod
    def _mix(segments):
        """[b, s, s]: weight of place j in the prediction made at place i."""
        sees = (segments[:, :, None] == segments[:, None, :]) & np.tri(segments.shape[1], dtype=bool)[None]
        return (sees / sees.sum(-1, keepdims=True)).astype(np.float32)


def expected(backend, h) -> tuple[float, np.ndarray]:
    """Mean cross-entropy over COUNTED, and the log-probabilities there, in float64."""
    logits = backend._mix(SEGMENTS).astype(np.float64) @ h.astype(np.float64) @ backend.U.astype(np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -np.mean([log_p[b, t, TOKENS[b, t + 1]] for b, t in COUNTED]), np.array([log_p[b, t] for b, t in COUNTED])


def replaced(backend, value) -> np.ndarray:
    """Clean activations with `value` put in everywhere but at position 0 and at padding."""
    h = backend.E[TOKENS].copy()
    kept = np.array([[0, 1, 1, 1, 1, 0], [0, 1, 1, 0, 1, 1]], bool)
    h[kept] = value(h[kept]) if callable(value) else value
    return h


def run(backend, sae, **options):
    return language_model.evaluate_language_model(sae, backend, [(TOKENS, SEGMENTS)], hook=HOOK, **options)


def test_every_value_against_hand_written_sums():
    backend = Backend()
    mean = np.arange(D) / 10.0
    result = run(backend, lambda h: 0.5 * h, mean=mean)
    clean, log_clean = expected(backend, backend.E[TOKENS])
    half, log_half = expected(backend, replaced(backend, lambda h: 0.5 * h))
    zero, log_zero = expected(backend, replaced(backend, 0.0))
    average, log_mean = expected(backend, replaced(backend, mean))
    kl = {n: np.mean((np.exp(log_clean) * (log_clean - q)).sum(-1)) for n, q in
          (("kl", log_half), ("kl_zero", log_zero), ("kl_mean", log_mean))}  # fmt: skip
    wanted = {
        "ce_clean": clean, "ce_spliced": half, "ce_zero": zero, "ce_mean": average, "delta_ce": half - clean, **kl,
        "recovered_zero": (zero - half) / (zero - clean), "recovered_mean": (average - half) / (average - clean),
    }  # fmt: skip
    assert set(result) == set(wanted) == set(result.definitions)
    for key, value in wanted.items():
        assert result[key] == pytest.approx(value, rel=1e-5, abs=1e-6), key
    assert result.data == {"lm_predictions": 5, "lm_tokens": 11, "lm_kept_share": 8 / 11, "hook": HOOK}


def test_identity_changes_nothing():
    result = run(Backend(), lambda h: h)
    assert result["delta_ce"] == 0.0 and result["kl"] == 0.0
    assert result["recovered_zero"] == 1.0 and result["recovered_mean"] == 1.0


def test_zero_recovers_nothing_of_the_zero_ablation():
    result = run(Backend(), jnp.zeros_like)
    assert result["recovered_zero"] == 0.0 and result["kl"] == result["kl_zero"] > 0


def test_mean_ablation_uses_the_kept_activations():
    backend = Backend()
    kept = np.array([[0, 1, 1, 1, 1, 0], [0, 1, 1, 0, 1, 1]], bool)
    mean = backend.E[TOKENS][kept].mean(0)
    result = run(backend, lambda h: jnp.broadcast_to(jnp.asarray(mean)[None, None], h.shape))
    assert result["recovered_mean"] == pytest.approx(0.0, abs=1e-5)
    given = run(Backend(), lambda h: h, mean=mean)
    assert given["ce_mean"] == pytest.approx(result["ce_mean"], rel=1e-6)


def test_masked_positions_stay_clean():
    """A mask that also goes by the norm: h reaches the model as it is there, at position 0 and at padding."""
    backend = Backend()
    h = backend.E[TOKENS]
    norms = np.linalg.norm(h, axis=-1)
    limit = np.median(norms)
    kept = (norms < limit) & np.array([[0, 1, 1, 1, 1, 0], [0, 1, 1, 0, 1, 1]], bool)
    assert 0 < kept.sum() < 8

    run(backend, lambda h: h + 1e6, keep=lambda norms, positions, segments: (norms < limit) & (positions > 0))
    clean, spliced, zero, mean = backend.seen
    np.testing.assert_array_equal(clean, h)
    for variant in (spliced, zero, mean):
        np.testing.assert_array_equal(variant[~kept], h[~kept])
        assert (variant[kept] != h[kept]).any(axis=-1).all()


def test_lower_half_runs_once_per_batch():
    backend = Backend()
    run(backend, lambda h: h, mean=np.zeros(D))
    assert backend.lowered == 1 and len(backend.seen) == 4


def test_batches_weigh_by_their_predictions():
    """Unequal batches: the mean over predictions, not over batches."""
    whole = run(Backend(), lambda h: 0.5 * h)
    parts = [(TOKENS[:1], SEGMENTS[:1]), (TOKENS[1:], SEGMENTS[1:])]
    split = language_model.evaluate_language_model(lambda h: 0.5 * h, Backend(), parts, hook=HOOK)
    for key in whole:
        assert split[key] == pytest.approx(whole[key], rel=1e-5, abs=1e-6), key


def test_nothing_to_predict_is_the_users_mistake():
    with pytest.raises(UserError, match="nothing to predict"):
        language_model.evaluate_language_model(
            lambda h: h, Backend(), [(TOKENS, np.array([[1, 1, 2, 2, 3, 3], [1, 1, 0, 0, 0, 0]], np.int32))], hook=HOOK
        )
