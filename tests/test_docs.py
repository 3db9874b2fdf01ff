"""The documents say what the code does: metrics are defined, parts have their layer, commands are understood."""

import re
from pathlib import Path

import pytest
from test_config import ROOTS
from test_layers import LAYERS

from saejax import cli, config
from saejax.cli import preflight
from saejax.evals import evaluate, language_model, recovery
from saejax.lab.experiments import all_experiments
from saejax.runs import directory

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"

# `saejax train a=1 b=2`, also as the batch script passes its arguments on; what follows two spaces is another column.
COMMAND = re.compile(
    r"(?:saejax (?P<name>train|harvest|evaluate|export|report|store|experiment)"
    r"|sbatch (?:--\S+ )*scripts/(?P<script>train|harvest)\.sbatch)"
    r"(?P<arguments>(?: (?:-m|info|verify|all_quick|[a-z]+/\w+|[\w+~./]+=[^\s`'\")]+)(?=[\s`'\").]|$))*)"
)


def test_every_metric_is_defined():
    page = set(re.findall(r"`(\w+)`", (DOCS / "metrics.md").read_text()))
    keys = {key for metric in evaluate.default_metrics() for key in metric.definitions()} | set(recovery.DEFINITIONS)
    keys |= set(language_model.DEFINITIONS)
    arrays_for_the_report = {"match", "match_cos"}
    assert not keys - arrays_for_the_report - page


def test_every_part_is_described():
    page = set(re.findall(r"`(\w+)`", (DOCS / "architecture.md").read_text()))
    root = DOCS.parent / "saejax"
    parts = {path.stem for path in root.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert parts <= set(LAYERS)
    assert not {part for part in parts if not part.startswith("__")} - page


def commands(text):
    """The command lines in a text, as (command, arguments)."""
    joined = re.sub(r"\s*\\\n(#?) *", " ", text)
    return [(found["name"] or found["script"], found["arguments"].split()) for found in COMMAND.finditer(joined)]


def documents():
    """Where commands stand -> text."""
    paths = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.glob("*.md"), *(ROOT / "conf").rglob("*.yaml")]
    paths += [
        *(ROOT / "scripts").iterdir(),
        ROOT / "Dockerfile",
        *(ROOT / "saejax" / name for name in ("cli/program.py", "cli/help_text.py")),
    ]
    texts = {str(path.relative_to(ROOT)): path.read_text() for path in paths if path.is_file()}
    # Commands on classes from outside are run by test_extending.
    return {
        name: re.sub(r"```console\n\$ export SAEJAX_PLUGINS.*?```", "", text, flags=re.S)
        for name, text in texts.items()
    }


def understood(name, arguments, store):
    """Compose a command as the program would, with a store that is there in the place of the named one."""
    if name == "store":
        assert not arguments or arguments[0] in ("info", "verify")
        return
    if name == "experiment":
        if arguments and arguments[0] != "all_quick":
            keys = [a for a in arguments[1:] if not a.startswith(("out=", "quick="))]
            config.override(all_experiments()[arguments[0]](), keys)
        return
    arguments = [re.sub(r"\$\w+|\{\w+\}", "0", argument) for argument in arguments]  # of a shell, of an f-string
    if any(argument.startswith("resume=") for argument in arguments):
        run_dir, overrides = preflight.resumed(arguments)
        run_dir.mkdir(parents=True, exist_ok=True)
        before = config.load("train", config.Config, [])
        (run_dir / "config.yaml").write_text(config.to_yaml(before))
        directory.check_resumable(before, config.from_run(run_dir, overrides))
        return
    arguments = [f"source.path={store}" if a.startswith("source.path=") else a for a in arguments]
    if any(a.startswith("sae.family=") and a != "sae.family=sae" for a in arguments):  # rows of two sites
        arguments = [a for a in arguments if not a.startswith("source")] + ["source=synthetic", "source.sites=[24,24]"]
    if name == "train":
        arguments += [f"source.path={store}"] * ("source=store" in arguments)
        preflight.check([a.replace("source=arrays", "source=store") for a in arguments])
    elif arguments:
        config.load(name, ROOTS[name], arguments)


@pytest.fixture
def project(tmp_path, monkeypatch, small_store):
    """A folder to type commands in, with a space in its path, and the store in it by a relative one."""
    folder = tmp_path / "my project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    (folder / "a store").symlink_to(small_store)
    return "a store"


UNDERSTOOD: set[tuple[str, tuple[str, ...]]] = set()


@pytest.mark.parametrize("place", [place for place, text in documents().items() if commands(text)])
def test_every_command_is_understood(place, project):
    """Each line once, also where several documents show it."""
    for name, arguments in dict.fromkeys((n, tuple(a)) for n, a in commands(documents()[place])):
        if (name, arguments) not in UNDERSTOOD:
            understood(name, list(arguments), project)
            UNDERSTOOD.add((name, arguments))


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_every_command_shows_three_useful_examples(name, capsys, project):
    assert cli.main([name, "--help"]) == 0
    text = capsys.readouterr().out
    shown = re.findall(rf"^ *(?:usage: )?(saejax {name} .*|saejax {name})$", text, re.MULTILINE)
    examples = [line for line in shown if "[key=value" not in line]
    assert len(examples) >= (2 if name == "store" else 3)
    for command, arguments in commands("\n".join(examples)):
        understood(command, arguments, project)


def test_commands_are_found():
    text = "`saejax train -m sae.k=1,2 seed=0` and\n$ saejax harvest path=a \\\n    hook=b   # saejax store info PATH"
    assert commands(text) == [
        ("train", ["-m", "sae.k=1,2", "seed=0"]),
        ("harvest", ["path=a", "hook=b"]),
        ("store", ["info"]),
    ]
    text = "`saejax experiment synth/sb_iid quick=true`, saejax experiment all_quick"
    assert commands(text) == [("experiment", ["synth/sb_iid", "quick=true"]), ("experiment", ["all_quick"])]
    found = {name for text in documents().values() for name, arguments in commands(text) if arguments}
    assert found == set(cli.COMMANDS)
