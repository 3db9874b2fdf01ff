"""A token whose activation is not finite is named, or left out and counted; never a row, never a sink."""

import jax.numpy as jnp
import numpy as np
import pytest
from test_harvest import HOOK, TinyModel, _config

from saejax.activations import store
from saejax.activations.language_model.harvest import harvest
from saejax.activations.language_model.harvest_config import OnNonfinite
from saejax.errors import UserError


class Overflowing(TinyModel):
    """Infinite at every g."""

    def capture(self, tokens, segments, hooks):
        bad = jnp.where(tokens == self.tokenizer.token_to_id("g"), jnp.inf, 1.0)
        return {hook: h * bad[..., None] for hook, h in super().capture(tokens, segments, hooks).items()}


def test_a_token_that_is_not_finite_is_named_or_dropped_and_counted(tmp_path):
    # An infinite norm is above every threshold, and still no sink.
    with pytest.raises(UserError, match=f"activations at {HOOK} are not finite in document .*on_nonfinite=drop"):
        harvest(_config(tmp_path, sink_calibration_tokens=5), Overflowing())
    assert not list((tmp_path / "out").rglob("shard-*"))
    config = _config(tmp_path, on_nonfinite=OnNonfinite.drop)
    path = harvest(config, Overflowing())["train"]
    assert store.verify(path) == []
    straight = harvest(_config(tmp_path, "plain"), TinyModel())["train"]
    reader, facts, plain = store.Reader(path), store.info(path), store.info(straight)
    rows, index = reader.rows(0, reader.n_rows), reader.index(0, reader.n_rows)
    assert np.isfinite(rows).all() and not (index[:, 0] == TinyModel().tokenizer.token_to_id("g")).any()
    assert facts["masked"]["not_finite"] > 20 and facts["masked"]["sink"] == plain["masked"]["sink"]
    assert facts["rows"] + sum(facts["masked"].values()) == facts["tokens"]
