"""A small run directory as a training leaves it, and a store whose rows trace back to words."""

import json

import jax
import numpy as np
import pytest

from saejax.activations import packing, store
from saejax.sae import SAE, TopK

D_IN, D_SAE, K, CONTEXT, SHARD_SEQUENCES = 6, 24, 3, 12, 4
WORDS = ["<|start|>", "<script>alert(1)</script>", "\n", "é"] + [f" word{n}" for n in range(36)]


def decode(tokens) -> str:
    """Tokens of the test's vocabulary as text."""
    return "".join(WORDS[t] for t in tokens)


@pytest.fixture(scope="session")
def sae() -> SAE:
    """A TopK SAE with random parameters."""
    config = TopK(d_in=D_IN, d_sae=D_SAE, k=K)
    return SAE(config, config.init(jax.random.key(3)), {"hook": "blocks.1.hook_resid_post"})


@pytest.fixture(scope="session")
def store_path(tmp_path_factory):
    """A store of short documents packed together; the first token of each is masked, as a sink would be."""
    rng = np.random.default_rng(0)
    documents = [(3 * n, rng.integers(1, len(WORDS), rng.integers(3, 30)).tolist()) for n in range(60)]
    sequences = list(packing.Packer(CONTEXT, bos_id=0).pack(documents))
    n_shards = -(-len(sequences) // SHARD_SEQUENCES)
    path = tmp_path_factory.mktemp("store")
    facts = {
        "hook": "blocks.1.hook_resid_post", "dtype": "float32", "d_in": D_IN, "context_length": CONTEXT,
        "shard_sequences": SHARD_SEQUENCES, "n_shards": n_shards,
    }  # fmt: skip
    with store.Writer(path, facts) as writer:
        for shard in range(n_shards):
            numbers = range(shard * SHARD_SEQUENCES, min((shard + 1) * SHARD_SEQUENCES, len(sequences)))
            with writer.shard(shard) as out:
                for number in numbers:
                    out.append(**_content(number, sequences[number], rng))
        assert writer.finish()
    return path


def _content(number: int, sequence, rng) -> dict:
    position = packing.positions(sequence.segments)
    kept = (sequence.segments > 0) & (position > 0)
    columns = sequence.tokens, position, sequence.documents(), np.full(len(position), number)
    return {
        "rows": rng.normal(size=(int(kept.sum()), D_IN)).astype(np.float32),
        "index": np.stack(columns, axis=-1).astype(np.int32)[kept],
        "tokens": np.stack([sequence.tokens, sequence.segments], axis=-1)[None].astype(np.int32),
        "segment_documents": [list(sequence.segment_documents)],
        "masked": {"position_zero": int(((sequence.segments > 0) & (position == 0)).sum())},
    }


def write_run(path, *, k=K, seed=0, fvu=0.2, l0=3.0, lr=0.001, evaluated=True, rows=60):
    """Writes a run directory; `evaluated` False leaves eval.json out, `rows` 0 leaves the metrics out."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.yaml").write_text(
        f"sae:\n  type: topk\n  d_sae: {D_SAE}\n  k: {k}\noptim:\n  lr: {lr}\nseed: {seed}\n"
    )
    lines = []
    for step in range(1, rows + 1):
        train = {
            "loss": 1 / step,
            "fvu": fvu + 1 / step,
            "l0": l0,
            "dead_share": 0.01,
            "tokens_per_second": 9e3,
        }
        row = {"step": step, "tokens": 64 * step} | {f"train/{key}": value for key, value in train.items()}
        lines.append(row | ({"eval/fvu": fvu + 0.9 / step, "eval/l0": l0} if step % 20 == 0 else {}))
    if rows:
        (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if evaluated:
        rate = np.linspace(0, 0.5, D_SAE) ** 2
        hist, edges = np.histogram(np.log10(rate[rate > 0]), bins=np.linspace(-9, 0, 91))
        arrays = {"firing_rate": rate, "log10_density_hist": hist, "log10_density_edges": edges}
        evaluation = {
            "metrics": {"fvu": fvu, "l0": l0, "dead_share": 1 / D_SAE},
            "arrays": {key: value.tolist() for key, value in arrays.items()},
            "definitions": {
                "fvu": "Squared error over variance; both summed over the set.",
                "l0": "<b>mean</b>",
            },
            "data": {"rows": 4096},
        }
        (path / "eval.json").write_text(json.dumps(evaluation))
    (path / "run.json").write_text(json.dumps({"versions": {"jax": "0"}, "seed": seed}))
    return path
