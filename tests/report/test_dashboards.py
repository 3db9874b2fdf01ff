"""Dashboards of every latent: what brute force finds in the same rows, under the names that are published."""

import dataclasses
import json

import numpy as np
import pytest
from conftest import D_IN, D_SAE, WORDS, decode

from saejax.errors import UserError
from saejax.report import corpus, dashboards
from saejax.sae import SAE

SILENT, N_TOP, N_RANDOM, BEFORE, AFTER, PER_FILE = 3, 4, 6, 2, 3, 10
FEATURE = {
    "feature_index", "neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1",
    "correlated_neurons_indices", "correlated_neurons_l1", "correlated_neurons_pearson", "correlated_features_indices",
    "correlated_features_l1", "correlated_features_pearson", "neg_str", "neg_values", "pos_str", "pos_values",
    "frac_nonzero", "freq_hist_data_bar_values", "freq_hist_data_bar_heights", "logits_hist_data_bar_heights",
    "logits_hist_data_bar_values", "n_prompts_total", "n_tokens_in_prompt", "dataset", "decoder_weights_dist",
    "activations", "vector",
}  # fmt: skip
ACTIVATION = {"bin_min", "bin_max", "bin_contains", "tokens", "values", "qualifying_token_index"}


@pytest.fixture(scope="module")
def texts(store_path):
    return corpus.StoreCorpus(store_path)


@pytest.fixture(scope="module")
def quiet(sae):
    """An SAE one latent of which is never active."""
    params = dataclasses.replace(sae.params, b_enc=sae.params.b_enc.at[SILENT].set(-1e3))
    return SAE(sae.sparsifier, params, sae.provenance)


@pytest.fixture(scope="module")
def unembedding():
    return np.random.default_rng(0).normal(size=(D_IN, len(WORDS))).astype(np.float32)


@pytest.fixture(scope="module")
def folder(quiet, texts, unembedding, tmp_path_factory):
    path = tmp_path_factory.mktemp("dashboards")
    (path / "batch-9.json").write_text("of a wider SAE")
    header = dashboards.Header(
        model_id="tiny", layer=1, sae_set="res-me", n_prompts=40, n_tokens_in_prompt=12, dataset="words"
    )
    settings = dashboards.DashboardConfig(
        n_top=N_TOP, n_random=N_RANDOM, before=BEFORE, after=AFTER, per_file=PER_FILE, max_rows=10**6
    )
    counts = dashboards.write(quiet, texts, decode, path, header, settings=settings, unembedding=unembedding)
    assert counts == (D_SAE - 1, 1)
    return path


@pytest.fixture(scope="module")
def features(folder):
    return [f for n in range(3) for f in json.loads((folder / f"batch-{n}.json").read_text())["features"]]


def test_files_and_names(folder, features):
    assert sorted(p.name for p in folder.iterdir()) == [
        "batch-0.json", "batch-1.json", "batch-2.json", "skipped_indexes.json",
    ]  # fmt: skip
    batch = json.loads((folder / "batch-1.json").read_text())
    assert {key: batch[key] for key in batch if key != "features"} == {
        "model_id": "tiny", "layer": 1, "sae_set": "res-me", "sae_id_suffix": None,
    }  # fmt: skip
    assert [f["feature_index"] for f in features] == [n for n in range(D_SAE) if n != SILENT]
    assert all(set(f) == FEATURE and f["dataset"] == "words" and f["n_prompts_total"] == 40 for f in features)
    assert all(set(a) == ACTIVATION for f in features for a in f["activations"])
    skipped = json.loads((folder / "skipped_indexes.json").read_text())
    assert skipped["skipped_indexes"] == [SILENT] and skipped["layer"] == "1"


def test_figures_are_those_of_brute_force(features, quiet, texts, unembedding):
    dense = np.asarray(quiet.encode(texts.read(0, texts.n_rows)))
    W_dec = np.asarray(quiet.params.W_dec)
    for feature in features:
        latent = feature["feature_index"]
        column, largest = dense[:, latent], dense[:, latent].max()
        assert feature["frac_nonzero"] == pytest.approx((column > 0).mean())
        heights, edges = np.histogram(column[column > 0], bins=50, range=(0, largest))
        assert np.abs(np.asarray(feature["freq_hist_data_bar_heights"]) - heights).sum() <= 2  # a value on an edge
        np.testing.assert_allclose(feature["freq_hist_data_bar_values"], (edges[1:] + edges[:-1]) / 2, atol=1e-5)
        effect = W_dec[latent] @ unembedding - (W_dec[latent] @ unembedding).mean()
        np.testing.assert_allclose(feature["pos_values"], np.sort(effect)[::-1][:10], atol=2e-5)
        assert feature["neg_str"][0] == WORDS[effect.argmin()]
        assert sum(feature["logits_hist_data_bar_heights"]) == len(WORDS)
        assert feature["neuron_alignment_indices"][0] == W_dec[latent].argmax()


def test_texts_show_the_activation_of_every_token(features, quiet, texts):
    dense = np.asarray(quiet.encode(texts.read(0, texts.n_rows)))
    for feature in features:
        column = dense[:, feature["feature_index"]]
        top = [a for a in feature["activations"] if a["bin_min"] == -1]
        assert 1 <= len(top) <= N_TOP and top[0]["bin_max"] == pytest.approx(column.max(), rel=1e-5)
        window = texts.window(int(column.argmax()), BEFORE, AFTER)
        expected = np.where(window.rows >= 0, column[window.rows], 0)
        np.testing.assert_allclose(top[0]["values"], expected, atol=1e-5)
        assert top[0]["tokens"] == [WORDS[t] for t in window.tokens]
        assert top[0]["qualifying_token_index"] == window.centre
        peaks = [a["values"][a["qualifying_token_index"]] for a in top]
        assert peaks == sorted(peaks, reverse=True)


def test_random_texts_stand_in_their_interval(features, quiet, texts):
    dense = np.asarray(quiet.encode(texts.read(0, texts.n_rows)))
    seen = 0
    for feature in features:
        column = dense[:, feature["feature_index"]]
        drawn = [a for a in feature["activations"] if a["bin_min"] != -1]
        seen += len(drawn)
        assert [a["bin_min"] for a in drawn] == sorted((a["bin_min"] for a in drawn), reverse=True)
        for a in drawn:
            low, high, value = a["bin_min"], a["bin_max"], a["values"][a["qualifying_token_index"]]
            assert low - 1e-5 <= value <= high + 1e-5 and value > 0
            inside = ((column > low) | (low == 0)) & (column <= high * (1 + 1e-6))
            assert a["bin_contains"] == pytest.approx(inside.mean(), abs=2 / len(column))
    assert seen > 2 * len(features)


def test_tokens_of_any_tokenizer():
    def words(tokens):  # drops the space before the first word, as SentencePiece does
        return " ".join(["cat", "dog"][t] for t in tokens)

    def by_bytes(tokens):
        return bytes(tokens).decode(errors="replace")

    assert [dashboards.text_of(words, t) for t in (0, 1)] == [" cat", " dog"]
    assert dashboards.text_of(by_bytes, ord("a")) == "a"
    assert dashboards.text_of(by_bytes, *"é".encode()) == "é"


def test_a_character_of_several_tokens_is_one_piece():
    tokens = np.frombuffer("a—b".encode(), np.uint8).astype(np.int32)
    window = corpus.Window(tokens, np.arange(5), 2, 0, 2)

    def text(*some):
        return dashboards.text_of(lambda ids: bytes(ids).decode(errors="replace"), *some)

    shown = dashboards._activation(window, np.asarray([0.0, 1.0, 3.0, 2.0, 0.5]), -1, 3.0, -1, text)
    assert (shown["tokens"], shown["values"]) == (["a", "—", "b"], [0.0, 3.0, 0.5])
    assert shown["qualifying_token_index"] == 1


def test_settings_are_checked():
    with pytest.raises(UserError, match="dashboards.n_top must be at least 1, got 0"):
        dashboards.DashboardConfig(n_top=0)


@pytest.mark.filterwarnings("default")
def test_saedashboard_reads_every_field(folder):
    """Where `pip install --no-deps sae-dashboard==0.8.0` is beside: its classes take the files and give them back."""
    theirs = pytest.importorskip("sae_dashboard.neuronpedia.neuronpedia_dashboard")
    for file in folder.glob("batch-*.json"):
        batch = json.loads(file.read_text())
        assert theirs.NeuronpediaDashboardBatch(**batch).to_dict() == batch
