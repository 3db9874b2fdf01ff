"""Reading and replacing activations: packing, early stop, splicing, sharding, refusals."""

import jax
import numpy as np
import pytest

from saejax.activations import language_model
from saejax.activations.language_model import backend, hooks, model
from saejax.errors import UserError
from saejax.parallel import sharding

pytestmark = pytest.mark.filterwarnings("ignore")
# The same float32 sums in another order (see test_families): some 1e-6 on values up to about 10.
TOLERANCE = 1e-5
PACKED = np.array([[1] * 10 + [2] * 9 + [3] * 5, [1] * 20 + [0] * 4, [5] * 3 + [7] * 21, [1] * 24], np.int32)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_packed_documents_are_as_if_alone(name: str, tiny, tokens: np.ndarray) -> None:
    lm = language_model.load(tiny(name)[0])
    wanted = ("blocks.0.hook_resid_pre", "blocks.2.hook_resid_post")
    packed = lm.capture(tokens, PACKED, wanted)
    logits = lm.logits(tokens, PACKED)
    for row, segments in enumerate(PACKED):
        for segment in set(segments.tolist()) - {0}:
            here = segments == segment
            n = here.sum()
            # Alone at the row's start; causal attention cannot see the padding behind it.
            alone, one = np.zeros((2, 1, tokens.shape[1]), np.int32)
            alone[0, :n], one[0, :n] = tokens[row, here], 1
            np.testing.assert_allclose(logits[row, here], lm.logits(alone, one)[0, :n], atol=TOLERANCE, rtol=0)
            for hook, value in lm.capture(alone, one, wanted).items():
                np.testing.assert_allclose(packed[hook][row, here], value[0, :n], atol=TOLERANCE, rtol=0)
    assert np.isfinite(logits).all()


def test_packing_matters(tiny, tokens: np.ndarray) -> None:
    """The comparison above can fail: without segment numbers the second document sees the first."""
    lm = language_model.load(tiny("llama")[0])
    difference = np.abs(lm.logits(tokens, PACKED) - lm.logits(tokens, np.ones_like(PACKED)))
    assert difference[0, 10:].max() > 0.01
    assert difference[0, :10].max() < TOLERANCE


def test_long_sequences_attend_in_pieces(tiny, tokens: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = language_model.load(tiny("gemma2")[0])
    whole = lm.logits(tokens, PACKED)
    monkeypatch.setattr(model, "_QUERY_CHUNK", 8)
    backend._logits.clear_cache()
    pieces = lm.logits(tokens, PACKED)
    backend._logits.clear_cache()
    np.testing.assert_allclose(pieces, whole, atol=TOLERANCE, rtol=0)


def test_early_stop_reads_what_a_full_run_reads(tiny, tokens: np.ndarray) -> None:
    lm = language_model.load(tiny("llama")[0])
    names = tuple(f"blocks.{layer}.{site}" for layer in range(3) for site in hooks.SITES)
    full = lm.capture(tokens, PACKED, names)
    for name in names[::13]:  # three sites, one of each layer
        alone = lm.capture(tokens, PACKED, (name,))[name]
        np.testing.assert_allclose(alone, full[name], atol=TOLERANCE, rtol=0, err_msg=name)
    assert lm.capture(tokens, PACKED, ()) == {}


def test_only_the_layers_below_the_hook_run(tiny, tokens: np.ndarray) -> None:
    """The loop of the compiled program takes as many turns as the hook needs layers."""
    lm = language_model.load(tiny("llama")[0])

    def turns(name: str) -> list[int]:
        place = (hooks.parse(name, lm.config),)
        run = jax.make_jaxpr(
            lambda state, t: backend._capture(state, t, PACKED, config=lm.config, mesh=lm.mesh, hooks=place)
        )(lm.state, tokens)
        return [eqn.params["length"] for eqn in run.eqns[0].params["jaxpr"].eqns if eqn.primitive.name == "scan"]

    assert turns("blocks.0.hook_resid_pre") == []
    assert turns("blocks.1.hook_resid_pre") == [1]
    assert turns("blocks.1.mlp.hook_post") == [2]
    assert turns("blocks.2.hook_resid_post") == [3]


@pytest.mark.parametrize("site", hooks.SITES)
def test_splice_of_the_unchanged_activation_is_the_model(site: str, tiny, tokens: np.ndarray) -> None:
    lm = language_model.load(tiny("gemma3")[0])
    wanted = lm.logits(tokens, PACKED)
    for layer in (0, 2) if site in (hooks.RESID_PRE, hooks.RESID_POST) else (1,):
        hook = f"blocks.{layer}.{site}"
        h = lm.lower(tokens, PACKED, hook)
        np.testing.assert_allclose(lm.upper(h, tokens, PACKED, hook), wanted, atol=TOLERANCE, rtol=0, err_msg=hook)
        assert np.abs(lm.upper(0 * h, tokens, PACKED, hook) - wanted).max() > 0.01  # and the place matters


@pytest.mark.parametrize("name", ["llama", pytest.param("llama-tied", marks=pytest.mark.nightly), "gpt2", "gemma3"])
def test_sharded_equals_unsharded(name: str, tiny, tokens: np.ndarray) -> None:
    path, _ = tiny(name)
    one, many = language_model.load(path), language_model.load(path, mesh=sharding.make_mesh(2, 4))
    wanted = tuple(f"blocks.1.{site}" for site in hooks.SITES)
    left, right = one.capture(tokens, PACKED, wanted), many.capture(tokens, PACKED, wanted)
    for hook in wanted:
        np.testing.assert_allclose(left[hook], right[hook], atol=TOLERANCE, rtol=0, err_msg=hook)
        assert right[hook].sharding.spec[0] == "data"
    np.testing.assert_allclose(one.logits(tokens, PACKED), many.logits(tokens, PACKED), atol=TOLERANCE, rtol=0)
    with jax.set_mesh(many.mesh):  # as inside training and evaluation
        h = many.lower(tokens, PACKED, wanted[0])
        one.lower(tokens, PACKED, wanted[0])
    np.testing.assert_allclose(many.upper(h, tokens, PACKED, wanted[0]), one.logits(tokens, PACKED), atol=TOLERANCE)
    # Weights are split, and a batch that the mesh does not divide still works.
    assert any(leaf.sharding.spec != jax.P() for leaf in jax.tree.leaves(many.state))
    odd = many.capture(tokens[:3], PACKED[:3], wanted)[wanted[0]]
    np.testing.assert_allclose(odd, left[wanted[0]][:3], atol=TOLERANCE, rtol=0)


def test_unembedding_gives_direct_effects(tiny, tokens: np.ndarray) -> None:
    lm = language_model.load(tiny("llama")[0])
    h = np.asarray(lm.lower(tokens, PACKED, "blocks.2.hook_resid_post"), np.float64)
    scale = np.sqrt((h**2).mean(-1, keepdims=True) + lm.config.norm_eps)
    wanted = lm.logits(tokens, PACKED)
    np.testing.assert_allclose((h / scale) @ np.asarray(lm.unembedding()), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "hook", ["blocks.3.hook_resid_post", "blocks.0.hook_resid", "model.layers.1", "blocks.-1.hook_resid_pre"]
)
def test_refuses_unknown_hooks(hook: str, tiny, tokens: np.ndarray) -> None:
    lm = language_model.load(tiny("llama")[0])
    with pytest.raises(UserError, match="hook="):
        lm.capture(tokens, PACKED, (hook,))
    with pytest.raises(UserError, match="hook="):
        lm.hook_width(hook)


def test_refuses_wrong_inputs(tiny, tokens: np.ndarray) -> None:
    with pytest.raises(UserError, match="dtype='int4'"):
        language_model.load(tiny("llama")[0], dtype="int4")
    lm = language_model.load(tiny("llama")[0])
    hook = "blocks.0.hook_resid_post"
    with pytest.raises(UserError, match="token 96 is outside"):
        lm.capture(np.full_like(tokens, 96), PACKED, (hook,))
    with pytest.raises(UserError, match="65 tokens exceed"):
        lm.capture(np.zeros((1, 65), np.int32), np.ones((1, 65), np.int32), (hook,))
    with pytest.raises(UserError, match="one shape"):
        lm.capture(tokens, PACKED[:2], (hook,))
    with pytest.raises(UserError, match=r"shape \(4, 24, 31\), allowed: \(4, 24, 32\)"):
        lm.upper(np.zeros((4, 24, 31), np.float32), tokens, PACKED, hook)
