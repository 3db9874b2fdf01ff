"""What a typo was meant to be, in one line and before anything runs."""

import sys

import pytest
from test_config import ROOTS

from saejax import cli, config
from saejax.errors import MISTAKE, UserError

KEYS = [
    ("train", "train.lr=1", "unknown key train.lr; did you mean optim.lr"),
    ("train", "lr=1", "unknown key lr; did you mean optim.lr"),
    ("train", "sae.K=1", "unknown key sae.K; did you mean sae.k?"),
    ("train", "sea.k=1", "unknown key sea; did you mean sae?"),
    ("train", "train.n_token=1", "unknown key train.n_token; did you mean train.n_tokens?"),
    ("train", "Seed=1", "unknown key Seed; did you mean seed?"),
    ("train", "k=4", "unknown key k; did you mean sae.k or ensemble.k?"),
    ("train", "wandb=true", "unknown key wandb; did you mean tracker.wandb?"),
    ("train", "source.path=x", "unknown key source.path: it is of source=arrays, source=store"),
    ("train", "hydra.run.dri=x", "unknown key hydra.run.dri; did you mean hydra.run.dir?"),
    ("train", "sae=topkk", "did you mean topk?"),
    ("train", "tracker=wandbb", "did you mean wandb?"),
    ("train", "train.zzz=1", "unknown key train.zzz; TrainConfig has n_tokens, batch, "),
    ("train", "foo/bar=1", "unknown key foo/bar; Config has sae, source"),
    ("harvest", "text.pth=x", "unknown key text.pth"),
    ("harvest", "text.path=x", "unknown key text.path: it is of text=files"),
    ("evaluate", "runn=x", "unknown key runn; did you mean run?"),
    ("export", "neuronpedia.modl=x", "unknown key neuronpedia.modl; did you mean neuronpedia.model?"),
    ("report", "latents.n_latent=1", "unknown key latents.n_latent; did you mean latents.n_latents?"),
]


@pytest.mark.parametrize("command, typed, said", KEYS, ids=lambda v: v)
def test_a_key(command, typed, said):
    with pytest.raises(UserError) as caught:
        config.load(command, ROOTS[command], [typed])
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
@pytest.mark.parametrize("flag, meant", [("--hlep", "--help"), ("--Help", "--help")])
def test_a_flag_of_any_command(command, flag, meant, capsys):
    arguments = {"store": ["info", flag], "experiment": ["all_quick", flag]}.get(command, [flag])
    assert cli.main([command, *arguments]) == 2
    said = capsys.readouterr()
    assert said.err == f"saejax {command}: unknown flag {flag}; did you mean {meant}?\n" and not said.out


@pytest.mark.parametrize(
    "words, meant",
    [
        (["--multirum", "sae.k=2,4"], "--multirun"),
        (["--dry_run"], "--dry-run"),
        (["--device-memory=3"], "--device-memory-gib"),
        (["resume=x", "--mutlirun"], "--multirun"),
    ],
)
def test_a_flag_of_train(words, meant, capsys):
    assert cli.main(["train", *words]) == 2
    said = capsys.readouterr().err
    assert f"did you mean {meant}?" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    "words, meant",
    [
        (["trian"], "train"),
        (["Train"], "train"),
        (["experiment", "synth/sb_id"], "synth/sb_iid"),
        (["Report"], "report"),
    ],
)
def test_a_name(words, meant, capsys):
    assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert f"did you mean {meant}?" in said and said.count("\n") == 1


def test_a_word_without_a_value(capsys):
    for command in ("train", "harvest", "evaluate", "export", "report"):
        assert cli.main([command, "step"]) == 2
        assert capsys.readouterr().err == f"saejax {command}: step: expected key=value\n"


@pytest.mark.parametrize(
    "arguments", [["tracker=wandb"], ["tracker.wandb=true", "ensemble.seed=[0,1]"], ["-m", "tracker=wandb", "seed=0,1"]]
)
def test_a_tracker_that_is_not_installed_is_refused_before_a_directory_is_made(
    arguments, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)  # as Python marks what cannot be imported
    assert cli.main(["train", *arguments]) == 2
    said = capsys.readouterr().err
    assert "tracker.wandb=true needs wandb: pip install" in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_tracker_that_is_installed_and_broken_is_one_line_too(tmp_path, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "wandb.py").write_text("raise ImportError('protobuf is too old\\nfor this')")
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "tracker=wandb"]) == 2
    said = capsys.readouterr().err
    assert "wandb.py cannot be imported (protobuf is too old)" in said and said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["packages"]


def test_figures_that_cannot_be_drawn_are_refused_before_the_experiment(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["experiment", "synth/sb_iid", "quick=true", f"out={tmp_path / 'x'}"]) == 2
    said = capsys.readouterr().err
    assert "figures need matplotlib" in said and said.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("hydra/launcher=basicc", "hydra/launcher=basicc: no such choice; choose one of basic, "),
        ("hydra/sweeper=nix", "hydra/sweeper=nix: no such choice; choose one of basic, "),
        ("hydra.mode=x", "hydra.mode: Invalid value 'x', expected one of [RUN, MULTIRUN]"),
        ("hydra.run.dirr=x", "unknown key hydra.run.dirr; did you mean hydra.run.dir?"),
        ("hydra.searchpath=[gs://x]", "No config source registered for schema gs"),
    ],
)
def test_settings_of_hydra_itself_are_one_line(word, message, capsys):
    assert cli.main(["train", "train=smoke", word]) == MISTAKE
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith(f"saejax train: {message}"), said
