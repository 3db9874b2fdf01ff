"""Latents in text: the streaming search equals brute force, and every token shows its own activation."""

import numpy as np
import pytest
from conftest import D_IN, D_SAE, WORDS, decode

from saejax import report
from saejax.activations import store
from saejax.errors import UserError
from saejax.report import corpus, decoder, latents, search, snippets


@pytest.fixture(scope="module")
def texts(store_path):
    return corpus.StoreCorpus(store_path)


@pytest.fixture(scope="module")
def dense(texts, sae):
    """All latents on all rows, [n_rows, d_sae]."""
    return np.asarray(sae.encode(texts.read(0, texts.n_rows)))


@pytest.mark.parametrize("batch", [64, 1024])
def test_search_equals_brute_force(batch, texts, sae, dense, monkeypatch):
    monkeypatch.setattr(search, "BATCH", batch)
    search._update.clear_cache()
    ids, keep = np.asarray([5, 0, 17]), 7
    found = search.search(sae, texts, ids, keep=keep, max_rows=10**6, seed=0)
    for n, latent in enumerate(ids):
        column = dense[:, latent]
        active = np.flatnonzero(column > 0)
        expected = active[np.argsort(-column[active], kind="stable")][:keep]
        assert found.top_rows[n, : len(expected)].tolist() == expected.tolist()
        assert (found.top_rows[n, len(expected) :] == -1).all()
        np.testing.assert_allclose(found.top[n, : len(expected)], column[expected], rtol=1e-5)
        assert found.count[n] == len(active)
        assert found.total[n] == pytest.approx(column.sum(), rel=1e-4)
        drawn = found.draw_rows[n][found.draw_rows[n] >= 0].tolist()
        assert len(set(drawn)) == len(drawn) == min(keep, len(active)) and set(drawn) <= set(active.tolist())
    search._update.clear_cache()


def test_firing_rate_equals_brute_force(texts, sae, dense):
    np.testing.assert_allclose(search.firing_rate(sae, texts, max_rows=10**6), (dense > 0).mean(0), rtol=1e-6)


def test_random_draw_is_fair(texts, sae, dense):
    """Each active row is drawn equally often, within five standard deviations of the binomial."""
    latent = int(np.argmax((dense > 0).sum(0)))
    active, n_seeds, keep = int((dense[:, latent] > 0).sum()), 60, 20
    counts = np.zeros(texts.n_rows)
    for seed in range(n_seeds):
        rows = search.search(sae, texts, np.asarray([latent]), keep=keep, max_rows=10**6, seed=seed).draw_rows[0]
        counts[rows] += 1
    p = keep / active
    seen = counts[dense[:, latent] > 0]
    assert seen.mean() == pytest.approx(n_seeds * p)
    assert np.abs(seen - n_seeds * p).max() < 5 * np.sqrt(n_seeds * p * (1 - p)) + 1


def test_windows_trace_rows_to_their_own_tokens(texts, store_path):
    reader = store.Reader(store_path)
    index = reader.index(0, reader.n_rows)
    for row in range(0, reader.n_rows, 3):
        window = texts.window(row, 6, 4)
        assert window.rows[window.centre] == row and window.document == index[row, 2]
        known = window.rows >= 0
        assert window.tokens[known].tolist() == index[window.rows[known], 0].tolist()
        assert set(index[window.rows[known], 2]) == {window.document}
        # Only the first token of a document is masked in this store, and it starts its window.
        assert known[1:].all() and (known[0] or index[row, 1] == window.centre)


def test_snippets_show_the_strongest_row_of_each_document(texts, sae, dense, store_path):
    documents = store.Reader(store_path).index(0, texts.n_rows)[:, 2]
    settings = report.LatentPage(n_latents=6, n_top=4, n_random=2, before=5, after=5)
    for latent in report.collect(sae, texts, decode, settings=settings).latents:
        column = dense[:, latent.id]
        order = np.argsort(-column, kind="stable")
        _, first = np.unique(documents[order], return_index=True)
        expected = [row for row in order[np.sort(first)] if column[row] > 0][: settings.n_top]
        assert [s.row for s in latent.top] == expected  # there are enough documents
        assert latent.rate == pytest.approx((column > 0).mean())
        assert latent.mean == pytest.approx(column[column > 0].mean(), rel=1e-4)
        for snippet in latent.top + latent.random:
            assert snippet.activation == pytest.approx(column[snippet.row], rel=1e-5)
            assert snippet.pieces[snippet.peak][1] == pytest.approx(column[snippet.row], rel=1e-5)
            window = texts.window(snippet.row, 5, 5)
            wanted = [column[row] if row >= 0 else None for row in window.rows]
            np.testing.assert_allclose(
                [a for _, a in snippet.pieces if a is not None],
                [w for w in wanted if w is not None],
                rtol=1e-5,
                atol=1e-6,
            )
            assert "".join(text for text, _ in snippet.pieces) == decode(window.tokens.tolist())


def test_pieces_join_parts_of_a_character():
    def decode_bytes(tokens):
        return bytes(tokens).decode("utf-8", errors="replace")

    tokens = np.asarray(list("aé日".encode()))
    acts = np.asarray([1.0, 2.0, np.nan, 0.0, 5.0, 4.0])
    assert snippets.pieces(tokens, acts, decode_bytes, 4) == ([("a", 1.0), ("é", 2.0), ("日", 5.0)], 2)

    def decode_words(tokens):  # as tokenizers do that mark the start of words
        return "".join(" ab"[t : t + 1] if t < 3 else " word" for t in tokens).removeprefix(" ")

    words, nothing = np.asarray([3, 3, 1]), np.zeros(3)
    assert [t for t, _ in snippets.pieces(words, nothing, decode_words, 0)[0]] == ["word", " word", "a"]
    broken = np.asarray([0xE6, 0x97])
    assert snippets.pieces(broken, np.zeros(2), decode_bytes, 0)[0] == [("\ufffd", 0.0)]


def test_logit_effects_are_the_extremes_of_the_direct_path(texts, sae):
    unembedding = np.random.default_rng(2).normal(size=(D_IN, len(WORDS))).astype(np.float32) + 3.0
    settings = report.LatentPage(n_latents=5, n_tokens=4)
    found = report.collect(sae, texts, decode, settings=settings, unembedding=unembedding)
    for latent in found.latents:
        effect = np.asarray(sae.params.W_dec)[latent.id] @ unembedding
        effect = effect - effect.mean()
        order = np.argsort(effect)
        assert [text for text, _ in latent.promoted] == [WORDS[t] for t in order[::-1][:4]]
        assert [text for text, _ in latent.suppressed] == [WORDS[t] for t in order[:4]]
        assert latent.promoted[0][1] == pytest.approx(effect.max(), rel=1e-4)


def test_neighbours_equal_brute_force(sae):
    W = np.asarray(sae.params.W_dec) * np.linspace(0.1, 4, D_SAE)[:, None]  # norms must not matter
    unit = W / np.linalg.norm(W, axis=1, keepdims=True)
    cosine = unit @ unit.T
    np.fill_diagonal(cosine, -np.inf)
    ids = np.asarray([3, 23, 0])
    found = decoder.neighbours(W, ids, top=4)
    np.testing.assert_allclose(found.cosine, -np.sort(-cosine[ids], axis=1)[:, :4], atol=1e-6)
    np.testing.assert_allclose(np.take_along_axis(cosine[ids], found.index, 1), found.cosine, atol=1e-6)


def test_cosines_of_random_rows_are_those_of_chance():
    W = np.random.default_rng(0).normal(size=(400, 32)).astype(np.float32)
    real, chance = decoder.nearest_cosines(W)
    assert len(real) == len(chance) == 400
    # Standard error of a mean of 400 maxima with standard deviation near 0.05 is 0.0025.
    assert abs(real.mean() - chance.mean()) < 5 * 0.0035


def test_choice_spans_the_densities_and_skips_the_dead():
    rate = np.linspace(0, 1, 101)
    chosen = latents.choose(rate, 10, seed=0)
    assert len(chosen) == 10 and 0 not in chosen
    assert [int((100 - c) // 10) for c in chosen] == list(range(10))  # one from each tenth, densest first
    assert chosen.tolist() == latents.choose(rate, 10, seed=0).tolist()
    assert chosen.tolist() != latents.choose(rate, 10, seed=1).tolist()
    assert len(latents.choose(np.zeros(5), 3, seed=0)) == 0
    assert len(latents.choose(np.ones(2), 3, seed=0)) == 2


def test_what_cannot_be_shown_is_refused(sae, texts):
    with pytest.raises(UserError, match="saejax evaluate"):
        report.collect(sae)
    with pytest.raises(UserError, match="unembedding has 7 rows, the SAE has d_in=6"):
        report.collect(sae, texts, decode, unembedding=np.zeros((7, 40)))
    with pytest.raises(UserError, match="firing_rate has shape"):
        report.collect(sae, firing_rate=np.ones(3))
    with pytest.raises(UserError, match="latents.n_top must be at least 1, got 0"):
        report.LatentPage(n_top=0)


def test_second_snippets_of_a_document_come_only_when_documents_run_out(texts, sae, store_path):
    documents = store.Reader(store_path).index(0, texts.n_rows)[:, 2]
    long = int(np.argmax(np.bincount(documents)))
    inside = np.flatnonzero(documents == long)
    other = int(np.flatnonzero(documents != long)[-1])
    rows = np.asarray([inside[0], inside[1], inside[5], other, inside[-1], -1])

    def shown(n):
        found = snippets.cut(sae, texts, decode, 0, rows, n=n, before=1, after=1)
        return [s.row for s in found]

    assert shown(2) == [inside[0], other]
    assert shown(4) == [inside[0], inside[5], other, inside[-1]]  # inside[1] would overlap
