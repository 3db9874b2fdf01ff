"""Overrides that cannot be read: one line that shows what was typed, and status 2, at every command that takes them."""

import shutil
from pathlib import Path

import pytest

from saejax import cli
from saejax.errors import UserError
from saejax.fields import key_value

RUN = Path(__file__).parent / "fixtures" / "run_format_2"

MALFORMED = [
    "=4",
    "=",
    "",
    "+",
    "~",
    "++",
    ".=3",
    "seed.=3",
    ".seed=3",
    "a..b=3",
    "a b=3",
    "seed",
    "seed:3",
    "3=seed",
    "\udcff=3",
]
"""No key=value at all."""
UNREADABLE = [
    "seed=[3",
    "seed=3]",
    "seed={3",
    "seed='3",
    'seed="3',
    "seed=(3",
    "seed=4,,8",
    "seed=,",
    "seed==3",
    "seed=${",
    "seed=\udcff",
]
"""A key, and what Hydra's grammar does not take for a value."""
WRONG = [
    "seed=",
    "seed=x",
    "seed=null",
    "seed=true",
    "seed=nan",
    "+seed=3",
    "~seed",
    "+nothing=1",
    "nothing=1",
    "~nothing",
]
"""Read well, and no value of the field."""

COMMANDS = {
    "train": ["train"],
    "sweep": ["train", "-m"],
    "dry-run": ["train", "--dry-run"],
    "harvest": ["harvest", "model=m", "text=pydoc", "path=o"],
    "evaluate": ["evaluate", "run=r"],
    "export": ["export", "run=r"],
    "report": ["report", "run=r"],
}


def complaint(arguments: list[str], capsys) -> str:
    """The one line of a command that ends with status 2."""
    assert cli.main(arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize("word", MALFORMED + UNREADABLE)
def test_what_cannot_be_read_is_shown_at_every_command(word, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, arguments in COMMANDS.items():
        said = complaint([*arguments, word], capsys)
        assert key_value.shown(word) in said or not word and name in ("dry-run", "train", "sweep"), name
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("word", WRONG)
def test_what_is_no_value_of_its_field_names_the_field(word, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("train", "sweep", "dry-run"):
        field = word.strip("+~").partition("=")[0]
        assert field in complaint([*COMMANDS[name], word], capsys), name
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "word",
    [
        w
        for w in MALFORMED + UNREADABLE
        if w not in ("seed==3", "seed=3]", "seed=4,,8", "seed=(3", "seed=${", "seed=\udcff")
    ],
)
def test_the_same_where_no_hydra_reads(word, capsys, tmp_path, monkeypatch):
    """A run that goes on, and an experiment; what is left out of the list is a text there, and no seed."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(RUN, tmp_path / "run")
    shown = key_value.shown(word)
    assert shown in complaint(["experiment", "codes/capacity", word], capsys)
    if "=" in word:  # what else is no key=value, resume says itself
        assert shown in complaint(["train", f"resume={tmp_path / 'run'}", word], capsys)


@pytest.mark.parametrize("word", ["seed==3", "seed=3]", "seed=4,,8", "seed=(3", "seed=x", "seed=", "seed=null"])
def test_a_text_is_no_seed_where_no_hydra_reads(word, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "seed must" in complaint(["experiment", "codes/capacity", word], capsys)


@pytest.mark.parametrize(
    "choice", ["optim=nan", "optim=3", "sae=[1,2]", "sae=true", "source=???", "sae@sae=3", "optim=none"]
)
def test_no_choice_of_a_group_names_those_that_there_are(choice, capsys):
    said = complaint(["train", choice], capsys)
    assert choice in said and "no such choice; choose one of" in said


def test_a_grid_that_only_another_sweeper_reads(capsys):
    assert "optim.lr=interval(0,1): a grid takes" in complaint(["train", "-m", "optim.lr=interval(0,1)"], capsys)


def test_what_is_right_is_read():
    words = ["sae.k=4", "sae=topk", "+sae/x@y=1", "++a.b=1", "~sae.k", "~sae.k=3", "a=[1,2]", "a={b:1}", "a='x=1, (y)'",
             "a=1,2", "hydra.run.dir=runs/x", "a=${b.c}", "mesh=auto", "hydra/launcher=basic", "a="]  # fmt: skip
    assert [found.input_line for found in key_value.parsed(words)] == words
    assert key_value.dotlist(["a=1", "b.c=[1,2]", "d="]) == {"a": 1, "b": {"c": [1, 2]}, "d": None}
    for word in ("+a=1", "a/b=1", "a@b=1", "~a=1"):
        with pytest.raises(UserError, match="expected key=value"):
            key_value.dotlist([word])


def test_a_message_is_one_line_of_moderate_length():
    assert key_value.shown("a\nb\tc\0=\udcff") == r"a\nb\tc\x00=\udcff"
    assert key_value.shown("") == "''" and len(key_value.shown("x" * 10**6)) < 250
    assert key_value.shown("模型=1 ü") == "模型=1 ü"
