"""Several hooks in one store: their rows side by side, as single harvests give them, where none of them has a sink."""

import numpy as np
from test_harvest import D_IN, HOOK, TinyModel, _config, _corpus

from saejax import config
from saejax.activations import language_model, store, text
from saejax.activations.language_model.harvest import HarvestConfig, harvest
from saejax.activations.store import source as store_source


def test_several_hooks_lie_side_by_side_and_a_sink_at_any_of_them_has_no_row(tmp_path):
    # 1.5 x the median cuts deep into the tokens, and into others of them at a hook that weighs coordinates.
    both = _config(tmp_path, "both", hook=f"{HOOK}, weighted", sink_factor=1.5)
    assert both.hooks == (HOOK, "weighted") and both.hook == f"{HOOK},weighted"
    model = TinyModel()
    paths = harvest(both, model)
    assert model.batches == sum(-(-store.info(path)["sequences"] // 2) for path in paths.values())  # one pass for both
    assert store.verify(both.path) == []
    reader, facts = store.Reader(paths["train"]), store.info(paths["train"])
    assert facts["sites"] == [{"hook": HOOK, "d_in": D_IN}, {"hook": "weighted", "d_in": D_IN}]
    assert reader.sites == (D_IN, D_IN) and reader.hooks == both.hooks and reader.d_in == 2 * D_IN
    assert "norm above 1.5 x" in store.describe(both.path)
    alone = [
        store.Reader(harvest(_config(tmp_path, f"alone{i}", hook=hook, sink_factor=1.5), TinyModel())["train"])
        for i, hook in enumerate(both.hooks)
    ]
    assert all(
        "sites" not in one.manifest and one.hooks == (hook,) for one, hook in zip(alone, both.hooks, strict=True)
    )
    assert facts["sink"]["median_norm"] == [one.manifest["sink"]["median_norm"] for one in alone]
    index = reader.index(0, reader.n_rows)
    places = [{tuple(row): i for i, row in enumerate(one.index(0, one.n_rows).tolist())} for one in alone]
    shared = sorted(set(places[0]) & set(places[1]), key=lambda row: (row[3], row[2], row[1]))
    assert sorted(map(tuple, index.tolist()), key=lambda row: (row[3], row[2], row[1])) == shared
    assert 20 < len(shared) < min(map(len, places))  # each hook drops tokens that the other keeps
    for one, place, columns in zip(alone, places, (slice(0, D_IN), slice(D_IN, None)), strict=True):
        rows = one.rows(0, one.n_rows)[[place[tuple(row)] for row in index.tolist()]]
        np.testing.assert_array_equal(reader.rows(0, reader.n_rows)[:, columns], rows)


def test_two_hooks_of_a_model_are_two_harvests_side_by_side(small_model, tmp_path):
    """End to end, from the overrides of a command line: with sinks kept, one store holds the rows of two."""
    hooks, backend = ("blocks.1.ln2.hook_normalized", "blocks.0.mlp.hook_post"), language_model.load(small_model)
    _corpus(tmp_path / "text")
    for name, hook in (("both", '"' + ",".join(hooks) + '"'), ("first", hooks[0]), ("second", hooks[1])):
        settings = {
            "path": tmp_path / name, "model": small_model, "hook": hook, "text": "files",
            "text.path": tmp_path / "text", "text.heldout_share": 0.2, "context_length": 64, "batch_sequences": 4,
            "shard_sequences": 8, "sink_factor": "null", "dtype": "float32",
        }  # fmt: skip
        overrides = [f"{key}={value}" for key, value in settings.items()]
        harvest(config.load("harvest", HarvestConfig, overrides), backend)
    for split in text.SPLITS:
        both, *alone = (store.Reader(tmp_path / name / split) for name in ("both", "first", "second"))
        assert both.hooks == hooks and both.sites == (24, 48)
        wanted = np.concatenate([one.rows(0, one.n_rows) for one in alone], axis=1)
        # One program for both hooks may sum in another order than one for each.
        np.testing.assert_allclose(both.rows(0, both.n_rows), wanted, rtol=1e-5, atol=1e-5)
        assert np.array_equal(both.index(0, both.n_rows), alone[0].index(0, both.n_rows))
    sources = [store_source.Store(path=str(tmp_path / name)) for name in ("both", "first")]
    assert [source.site_widths for source in sources] == [(24, 48), (24,)] and sources[0].d_in == 72
    assert "sites" in sources[0].fingerprint() and "sites" not in sources[1].fingerprint()
    # x / rms(x): every row of the normalised hook has norm sqrt(d), up to the epsilon under the root.
    norms = np.linalg.norm(store.Reader(tmp_path / "first" / "train").rows(0, 100), axis=1)
    np.testing.assert_allclose(norms, np.sqrt(24), rtol=1e-3)
