"""The commands as a person types them: the whole way from text to report, sweeps, messages and exit codes."""

import html.parser
import json

import numpy as np
import pytest
from forked import run as saejax_command

import saejax
from saejax import cli, config

CODE = "import sys; from saejax import cli; sys.exit(cli.main(sys.argv[1:]))"
QUICK = ["train.n_tokens=10240", "train.batch=256", "buffer.rows=1024", "train.eval_rows=512", "mesh=single"]


def test_the_whole_way_on_a_language_model(small_store, tmp_path, capsys):
    run_dir = tmp_path / "run"
    done = saejax_command(
        "train", "source=store", f"source.path={small_store}", "sae.d_sae=96", "sae.k=8", *QUICK,
        f"hydra.run.dir={run_dir}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert cli.main(["evaluate", f"run={run_dir}", "splice_sequences=8"]) == 0
    found = json.loads((run_dir / "eval.json").read_text())["metrics"]
    # The splice leaves more of the model's predictions intact than either ablation does.
    assert 0 < found["kl"] < min(found["kl_zero"], found["kl_mean"])
    assert 0 < found["fvu"] < 0.9
    # What was written is what the public function measures on the same rows.
    sae, cfg = saejax.load(run_dir), config.from_run(run_dir)
    again = saejax.evaluate(sae, cfg.source)
    assert again["fvu"] == pytest.approx(found["fvu"], rel=1e-6)
    assert cli.main(["export", f"run={run_dir}"]) == 0
    exported = saejax.load(run_dir / "export_saelens")
    rows = np.concatenate(list(cfg.source.heldout(256, 256))).astype(np.float32)
    np.testing.assert_allclose(exported(rows), sae(rows), rtol=1e-4, atol=1e-4)
    assert cli.main(["report", f"run={run_dir}", "latents.n_latents=5"]) == 0
    page = (run_dir / "report.html").read_text()
    html.parser.HTMLParser().feed(page)
    assert "hook_resid_post" in page and f"{found['l0']:.0f}" in page
    assert cli.main(["store", "verify", str(small_store)]) == 0
    record = json.loads((run_dir / "run.json").read_text())
    assert record["finished"] and record["source"]["hook"] == "blocks.1.hook_resid_post"


@pytest.mark.nightly
def test_the_whole_way_in_a_folder_with_a_space_by_relative_paths(small_model, tmp_path):
    """As the README types it, from harvest to resume; then the run is read from another folder."""
    here = tmp_path / "my project #1"
    (here / "models").mkdir(parents=True)
    (here / "models" / "a model").symlink_to(small_model)
    lines = [
        ["harvest", "path=my data/st=1", "model=models/a model", "text=pydoc", "hook=blocks.1.hook_resid_post",
         "n_tokens=4096", "heldout_tokens=1024", "context_length=64", "shard_sequences=32"],
        ["store", "verify", "my data/st=1"],
        ["train", "source=store", "source.path=my data/st=1", "sae.d_sae=64", "sae.k=4", *QUICK,
         "train.n_tokens=2560", "hydra.run.dir=runs/k=4 (first)"],
        ["train", "resume=runs/k=4 (first)", "train.n_tokens=5120"],
        ["evaluate", "run=runs/k=4 (first)", "splice_sequences=4"],
        ["export", "run=runs/k=4 (first)", "path=out/a, b", "activations=my data/st=1"],
        ["report", "run=runs/k=4 (first)", "latents.n_latents=3", "out=pages/of run.html"],
        ["train", "-m", "source=store", "source.path=my data/st=1", "sae.k=2,4", *QUICK, "train.n_tokens=2560",
         "hydra.sweep.dir=runs/a sweep", "hydra.sweep.subdir=${hydra.job.override_dirname}"],
        ["report", "sweep=runs/a sweep"],
    ]  # fmt: skip
    for line in lines:
        done = saejax_command(*line, cwd=here)
        assert done.returncode == 0, f"{line}: {done.stderr}"
    (tmp_path / "elsewhere").mkdir()
    done = saejax_command("evaluate", f"run={here}/runs/k=4 (first)", "splice_sequences=4", cwd=tmp_path / "elsewhere")
    assert done.returncode == 0 and "kl" in done.stdout, done.stderr  # the model was found, too
    done = saejax_command("train", f"resume={here}/runs/k=4 (first)", "train.n_tokens=7680", cwd=tmp_path / "elsewhere")
    assert done.returncode == 0, done.stderr
    assert not list((tmp_path / "elsewhere").iterdir())
    assert (here / "pages" / "of run.html").is_file() and (here / "out" / "a, b").is_dir()


def test_known_features_are_measured_against_the_truth(tmp_path):
    run_dir = tmp_path / "run"
    assert saejax_command("train", *QUICK, f"hydra.run.dir={run_dir}").returncode == 0
    assert cli.main(["evaluate", f"run={run_dir}"]) == 0
    found = json.loads((run_dir / "eval.json").read_text())["metrics"]
    assert found["mcc"] > found["mcc_chance"]


@pytest.mark.parametrize("launcher", ["basic", pytest.param("submitit_local", marks=pytest.mark.nightly)])
def test_a_sweep_gives_a_run_for_every_point_and_one_table(launcher, tmp_path):
    arguments = ["train", "-m", "sae.k=2,4", "seed=0,1", *QUICK, f"hydra.sweep.dir={tmp_path}"]
    if launcher == "submitit_local":
        pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
        arguments += ["launcher=submitit_local", "hydra.launcher.timeout_min=5"]
    done = saejax_command(*arguments)
    assert done.returncode == 0, done.stderr
    found = {}
    for number in range(4):
        cfg = config.from_run(tmp_path / str(number))
        found[cfg.sae.k, cfg.seed] = json.loads((tmp_path / str(number) / "run.json").read_text())
    assert sorted(found) == [(k, seed) for k in (2, 4) for seed in (0, 1)]
    assert all(record["finished"] and record["seed"] == seed for (_, seed), record in found.items())
    assert cli.main(["report", f"sweep={tmp_path}"]) == 0
    page = (tmp_path / "sweep.html").read_text()
    assert "sae.k" in page and "<svg" in page


def test_a_failing_job_does_not_stop_the_others(tmp_path):
    # Learning rates that no check can refuse: the second one overflows.
    done = saejax_command(
        "train", "-m", "optim.lr=1e-3,1e30,1e-4", *QUICK, "train.log_every_steps=1", f"hydra.sweep.dir={tmp_path}"
    )
    assert done.returncode != 0
    assert "lower optim.lr" in done.stdout + done.stderr
    assert [(tmp_path / n / "run.json").exists() for n in "012"] == [True, False, True]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["train", "sae.kk=1"], "saejax train: unknown key sae.kk"),
        (["train", "mesh.latent=64"], "saejax train: mesh.data=null x mesh.latent=64 needs 64 devices"),
        (["train", "sae.k"], "saejax train: sae.k: expected key=value"),
        (["train", "hydra.run.dir=/proc/none"], "saejax train: "),
        (["trian"], "saejax: unknown command trian"),
        (["evaluate"], "saejax evaluate: run must be given"),
        (["evaluate", "run=/nowhere"], "saejax evaluate: /nowhere is not a run directory"),
        (["report"], "saejax report: report needs exactly one of"),
        (["harvest", "hook=blocks.99.hook_resid_post", "model=/nowhere"], "saejax harvest: "),
    ],
)
def test_a_mistake_is_one_line_and_status_2(arguments, message, tmp_path):
    done = saejax_command(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_help_shows_examples(command, capsys):
    assert cli.main([command, "--help"]) == 0
    assert f"saejax {command}" in capsys.readouterr().out


def test_help_and_version(capsys):
    assert cli.main([]) == 0
    assert cli.main(["--version"]) == 0
    assert saejax.__version__ in capsys.readouterr().out
