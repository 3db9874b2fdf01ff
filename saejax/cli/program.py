"""`saejax <command> [overrides]`: the program that people and cluster scripts call.

A user's mistake ends in one line and status 2. A signal ends work with 128 plus its number, and 0 means success;
`saejax.errors` has the table.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path

from saejax.cli import ending, kept_pages, quiet
from saejax.errors import DONE, FAILED, MISTAKE, Stopped, stopped_status
from saejax.fields import command_line, paths
from saejax.parallel import processes, signals
from saejax.storage import atomic
from saejax.storage.version import VERSION

HELP = """saejax: train sparse autoencoders on neural-network activations

usage: saejax <command> [key=value ...]

commands:
  harvest    run a language model over text and store its activations
  train      train one SAE, an ensemble, or with -m a sweep of them; resume=RUN_DIR goes on with a run
  evaluate   judge the SAE of a run on held-out data
  export     write the SAE of a run in another tool's format
  report     one HTML page for a run, or for a sweep
  store      look at a store of activations: store info PATH, store verify PATH
  experiment the papers' claims, each with a figure and a table of passes and failures

examples:
  saejax train                                              a minute on a laptop, known features
  saejax harvest path=data/smollm2 hook=blocks.15.hook_resid_post
  saejax train source=store source.path=data/smollm2 sae.d_sae=4608 sae.k=32

`saejax <command> --help` shows the keys of a command.
"""


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
      argv: arguments after the program's name; None takes those of the process.

    Returns:
      Exit status, see `saejax.errors`: 0 done, 1 a store that is not sound or an experiment that fails a check, 2 a
      mistake of the user, 128 + n stopped by signal n.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    name, rest = arguments[0] if arguments else "help", arguments[1:]
    command = COMMANDS.get(name) or functools.partial(_no_command, name)
    if name == "train":
        kept_pages.keep()  # before any thread
    try:
        with signals.watch(ends_process=True):  # before JAX is imported
            with processes.together() as end, ending.answering(name, rest, end):
                end.status = command(rest)
    except Stopped as stop:  # between the end of the work and here
        return stopped_status(stop.signum)
    return end.status


def _no_command(name: str, _: list[str]) -> int:
    """A question about the program itself, or a line about a word that is no command."""
    if name in ("-h", "--help", "help"):
        print(HELP)
        return DONE
    if name == "--version":
        print(VERSION)
        return DONE
    there = ", ".join(COMMANDS) + command_line.near(name, COMMANDS)
    print(f"saejax: unknown command {name}; there are {there}", file=sys.stderr)
    return MISTAKE


def train(arguments: list[str]) -> int:
    """`saejax train`: one run, a sweep (-m), or the continuation of a run (resume=RUN_DIR)."""
    from saejax import config
    from saejax.cli import dry_run, help_text, jobs, preflight
    from saejax.runs.directory import Request

    if wants_help(arguments):
        print(help_text.of_command("train", config.Config))
        return DONE
    typed = preflight.typed(arguments)
    if dry_run.DRY_RUN in arguments:
        print(dry_run.of_arguments(arguments))
        return DONE
    if resumed := preflight.resumed(arguments):
        run_dir, overrides = resumed
        quiet.log_to_stderr()
        cfg = config.from_run(run_dir, overrides)
        with jobs.logged(cfg, run_dir) as run_dir:
            todo = jobs.work(cfg, run_dir, Request.resume)
            return DONE if todo is None else jobs.told(todo(), run_dir)
    if preflight.folds(typed):
        configs = preflight.check(typed, at_most=None)
        with preflight.alone(typed, configs) as arguments:
            return jobs.folded(arguments, configs)
    arguments = [a for a in typed if not a.startswith(preflight.FOLD)]
    configs = preflight.check(arguments)
    arguments = preflight.join(arguments, configs)
    preflight.make_directories(arguments)
    with preflight.alone(arguments, configs) as arguments, jobs.under_hydra(arguments) as launch:
        launch()
    return DONE


def harvest(arguments: list[str]) -> int:
    """`saejax harvest`: activations of a language model into a store."""
    from saejax import config
    from saejax.activations.language_model import harvest as harvesting
    from saejax.cli import help_text

    if wants_help(arguments):
        print(help_text.of_command("harvest", harvesting.HarvestConfig))
        return DONE
    command_line.check_words(arguments)
    cfg = config.load("harvest", harvesting.HarvestConfig, arguments)
    atomic.check_place(Path(cfg.path))
    quiet.log_to_stderr()
    harvesting.harvest(cfg)
    return DONE


def command_of(name: str) -> Callable[[list[str]], int]:
    """The command line of one function of `saejax.cli.commands`: `NAMES[name]` is (config class, function)."""

    def command(arguments: list[str]) -> int:
        from saejax import config
        from saejax.cli import commands, help_text
        from saejax.runs import agreement

        root, function = commands.NAMES[name]
        if wants_help(arguments):
            print(help_text.of_command(name, root))
            return DONE
        command_line.check_words(arguments)
        cfg = config.load(name, root, arguments)
        quiet.log_to_stderr()
        if hasattr(cfg, "mesh"):
            agreement.join(cfg)
        said = function(cfg)
        if processes.first():
            print(said)
        return DONE

    return command


def store(arguments: list[str]) -> int:
    """`saejax store info|verify PATH`."""
    from saejax.activations import store as stores

    command_line.check_flags(arguments)
    if wants_help(arguments) or len(arguments) != 2 or arguments[0] not in ("info", "verify"):
        print("usage: saejax store info PATH    what the store holds and where it is from")
        print("       saejax store verify PATH  every checksum, size and count; status 1 if any is wrong")
        print("examples:\n  saejax store info data/smollm2\n  saejax store verify data/smollm2")
        print("  saejax store verify data/smollm2/train && echo sound")
        return DONE if wants_help(arguments) else MISTAKE
    path = paths.local(arguments[1], "PATH")
    if arguments[0] == "info":
        print(stores.describe(path))
        return DONE
    problems = stores.verify(path)
    print("\n".join(problems) if problems else f"{path}: every checksum, size and count is right")
    return FAILED if problems else DONE


def experiment(arguments: list[str]) -> int:
    """`saejax experiment [NAME key=value ... | all_quick]`: without a name, the list of them."""
    from saejax.cli import help_text
    from saejax.lab.experiments import command as experiments

    command_line.check_flags(arguments)
    names = [a for a in arguments if a not in ("-h", "--help")]
    if not names or names == [experiments.ALL_QUICK] != arguments:
        print(experiments.listing())
        return DONE
    if wants_help(arguments):
        print(experiments.describe(names[0], help_text.field_docs))
        return DONE
    quiet.log_to_stderr()
    return experiments.execute(names)


def wants_help(arguments: list[str]) -> bool:
    """Whether a command line asks for help."""
    return any(a in ("-h", "--help") for a in arguments)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "harvest": harvest,
    "train": train,
    "evaluate": command_of("evaluate"),
    "export": command_of("export"),
    "report": command_of("report"),
    "store": store,
    "experiment": experiment,
}
