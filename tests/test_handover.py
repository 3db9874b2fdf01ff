"""From a run to a folder for others: of an unfinished run too, with the figures of the very checkpoint."""

import json
import shutil

import numpy as np
import pytest
import yaml

import saejax
from saejax import cli, config
from saejax.activations import language_model, store
from saejax.runs import run

SETTINGS = ["train.n_tokens=8192", "train.batch=256", "buffer.rows=1024", "train.eval_rows=512", "mesh=single"]
SETTINGS += ["checkpoint.save_every_steps=16", "train.eval_every_steps=16", "checkpoint.keep_last=2"]


@pytest.fixture(scope="module")
def unfinished(small_store, tmp_path_factory):
    """A run that was killed after its first checkpoint: the last one and run.json are not there."""
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    overrides = ["source=store", f"source.path={small_store}", "sae.d_sae=64", "sae.k=4", *SETTINGS]
    run.train(config.load("train", config.Config, overrides), run_dir)
    steps = sorted(int(p.name) for p in (run_dir / "checkpoints").iterdir() if p.name.isdigit())
    assert steps[0] == 16 and len(steps) > 1
    for step in steps[1:]:
        shutil.rmtree(run_dir / "checkpoints" / str(step))
    (run_dir / "run.json").unlink()
    return run_dir


@pytest.mark.parametrize("format", ["saelens", "dictionary_learning", "sparsify"])
def test_an_intermediate_checkpoint_is_exported(format, unfinished, tmp_path):
    assert cli.main(["export", f"run={unfinished}", f"format={format}", f"path={tmp_path / 'out'}"]) == 0
    ours, rows = saejax.load(unfinished), next(iter(config.from_run(unfinished).source.heldout(64, 64)))
    assert ours.provenance["step"] == 16
    np.testing.assert_allclose(saejax.load(tmp_path / "out")(rows), ours(rows), rtol=1e-4, atol=1e-4)


def test_the_whole_folder(unfinished, small_store, small_model, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["neuronpedia.model=tiny", "dashboards.max_rows=1500", "dashboards.per_file=20", "dashboards.before=5"]
    arguments += ["dashboards.after=6", "dashboards.n_top=3", "hub=null"]
    assert cli.main(["export", f"run={unfinished}", "format=neuronpedia", f"path={out}", *arguments]) == 0
    said = capsys.readouterr().out
    assert "latents" in said and "uploaded" not in said
    hook = "blocks.1.hook_resid_post"
    cfg = json.loads((out / hook / "cfg.json").read_text())
    assert cfg["metadata"]["model_name"] == "tiny" and cfg["metadata"]["hook_name"] == hook
    assert cfg["metadata"]["neuronpedia_id"] == "tiny/1-saejax-res-64"
    # The card quotes what was logged at the checkpoint that was exported, and at no other.
    logged = [json.loads(line) for line in (unfinished / "metrics.jsonl").read_text().splitlines()]
    (row,) = [row for row in logged if row["step"] == 16 and "eval/fvu" in row]
    card = (out / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "saelens"
    assert f"| fvu | {row['eval/fvu']:.4g} |" in card and "while training, at step 16" in card
    # Every latent has a dashboard or is said to be silent.
    batches = [json.loads(file.read_text()) for file in sorted((out / "dashboards").glob("batch-*.json"))]
    assert {(b["model_id"], b["layer"], b["sae_set"]) for b in batches} == {("tiny", 1, "saejax-res-64")}
    shown = [feature["feature_index"] for batch in batches for feature in batch["features"]]
    skipped = json.loads((out / "dashboards" / "skipped_indexes.json").read_text())["skipped_indexes"]
    assert sorted(shown + skipped) == list(range(64)) and len(shown) > 20
    # Texts are those of the store, token by token.
    tokenizer = language_model.load(small_model).tokenizer
    assert tokenizer is not None
    heldout = store.Reader(small_store / "heldout")
    tokens, _ = heldout.sequences(0, heldout.n_sequences)
    everything = " ".join(tokenizer.decode(line.tolist(), skip_special_tokens=False) for line in tokens)
    for feature in batches[0]["features"]:
        assert len(feature["pos_str"]) == 10 and sum(feature["logits_hist_data_bar_heights"]) == 257
        for activation in feature["activations"]:
            assert len(activation["tokens"]) == len(activation["values"]) <= 12
            assert "".join(activation["tokens"]).strip("\N{REPLACEMENT CHARACTER}") in everything


def test_an_imported_sae_is_measured_on_activations_that_are_named(unfinished, small_store, tmp_path, capsys):
    assert cli.main(["export", f"run={unfinished}", f"path={tmp_path / 'out'}"]) == 0
    assert cli.main(["export", f"run={tmp_path / 'out'}", f"path={tmp_path / 'again'}"]) == 0
    assert "not measured: activations=ROWS" in capsys.readouterr().out
    assert cli.main(["evaluate", f"run={tmp_path / 'out'}"]) == 2
    assert "activations=ROWS" in capsys.readouterr().err
    source, ours = config.from_run(unfinished).source, saejax.load(unfinished)
    x = np.concatenate(list(source.heldout(256))).astype(np.float32)
    wanted = ((x - np.asarray(ours(x))) ** 2).sum() / ((x - x.mean(axis=0)) ** 2).sum()
    assert cli.main(["evaluate", f"run={tmp_path / 'out'}", f"activations={small_store}"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.split()[:1] == ["fvu"]]
    assert float(line.split()[1]) == pytest.approx(wanted, rel=1e-4)
    np.save(tmp_path / "rows.npy", x)
    assert (
        cli.main(["export", f"run={tmp_path / 'out'}", f"path={tmp_path / 'b'}", f"activations={tmp_path}/rows.npy"])
        == 0
    )
    assert f"fvu {wanted:.4g}" in capsys.readouterr().out
    assert not (tmp_path / "out" / "eval.json").exists()
