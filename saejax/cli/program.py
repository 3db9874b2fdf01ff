"""`saejax <command> [overrides]`: the program that people and cluster scripts call.

A user's mistake ends in one line and status 2. A signal ends work with 128 plus its number, and 0 means success;
`saejax.errors` has the table.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import saejax
from saejax.cli import kept_pages, quiet
from saejax.errors import DONE, FAILED, MISTAKE, Stopped, UserError, stopped_status
from saejax.fields import command_line, paths
from saejax.parallel import processes, signals
from saejax.storage import atomic, run_log

if TYPE_CHECKING:
    from saejax.runs import ensembles

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
    if arguments[:1] == ["train"]:
        kept_pages.keep()  # before any thread
    try:
        with signals.watch(ends_process=True):  # before JAX is imported
            return processes.together(lambda: _run(arguments))
    except Stopped as stop:  # between the end of the work and here
        return stopped_status(stop.signum)


def _run(arguments: list[str]) -> int:
    """One command; the exit status."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP)
        return DONE
    if arguments[0] == "--version":
        print(saejax.__version__)
        return DONE
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        there = ", ".join(COMMANDS) + command_line.near(name, COMMANDS)
        print(f"saejax: unknown command {name}; there are {there}", file=sys.stderr)
        return MISTAKE
    try:
        processes.introduce(lambda: importlib.import_module("saejax.runs.agreement").command(name, rest))
        return COMMANDS[name](rest)
    except BaseException as error:
        status = _ended(name, error)
        joins = any("mesh.distributed=" in a or a.startswith("resume=") for a in rest)
        if joins and name in ("train", "evaluate"):
            with contextlib.suppress(Exception):  # it may have been stopped while modules were imported
                importlib.import_module("saejax.runs.agreement").tell_others(rest, error)
        if status is None:
            raise
        return status


def _ended(name: str, error: BaseException) -> int | None:
    """A line about what ended a command, and its exit status; None for a defect, whose traceback is wanted."""
    match error:
        case UserError():
            print(f"saejax {name}: {error}", file=sys.stderr)
        case OSError():
            where = f" ({error.filename})" if error.filename else ""
            print(f"saejax {name}: {error.strerror or error}{where}", file=sys.stderr)
        case KeyboardInterrupt():
            return _stopped(name, error)
        case _:
            return None
    return MISTAKE


def _stopped(name: str, stop: KeyboardInterrupt) -> int:
    """A line about a command that a signal stopped, and its exit status."""
    signum = getattr(stop, "signum", signal.SIGINT)
    if processes.first():
        print(f"saejax {name}: stopped by {signals.name(signum)}; the same command continues", file=sys.stderr)
    return stopped_status(signum)


def train(arguments: list[str]) -> int:
    """`saejax train`: one run, a sweep (-m), or the continuation of a run (resume=RUN_DIR)."""
    from saejax import config
    from saejax.cli import help_text, preflight

    if wants_help(arguments):
        print(help_text.of_command("train", config.Config))
        return DONE
    typed = preflight.typed(arguments)
    if "--dry-run" in arguments:
        from saejax.cli import dry_run

        print(dry_run.of_arguments(arguments))
        return DONE
    if resumed := preflight.resumed(arguments):
        run_dir, overrides = resumed
        _log_to_stderr()
        cfg = config.from_run(run_dir, overrides)
        with _logged(cfg, run_dir):
            return _finish_training(cfg, run_dir, resume=True)
    if preflight.folds(typed):
        with preflight.alone(typed, preflight.check(typed)) as arguments:
            return _run_folded(arguments)
    arguments = [a for a in typed if not a.startswith(preflight.FOLD)]
    configs = preflight.check(arguments)
    arguments = preflight.join(arguments, configs)
    preflight.make_directories(arguments)
    with preflight.alone(arguments, configs) as arguments:
        _run_under_hydra(arguments)
    return DONE


def _run_under_hydra(arguments: list[str]) -> None:
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import CompactHydraException
    from hydra.types import RunMode
    from omegaconf import DictConfig

    from saejax import config
    from saejax.runs import directory

    config.register("train", config.Config)

    def job(composed: DictConfig) -> object:
        hydra_config = HydraConfig.get()
        multirun = hydra_config.mode == RunMode.MULTIRUN
        run_dir = Path(hydra_config.runtime.output_dir)
        try:
            with signals.watch(ends_process=True):  # in a process of a launcher this is the first line
                signals.check()
                cfg = config.to_object(composed)
                with _logged(cfg, run_dir):
                    status = _come_to(run_dir, cfg, multirun)
        except (UserError, OSError) as error:
            if multirun:  # the launcher marks this job as failed and goes on with the others
                raise CompactHydraException(f"saejax train: {error}") from None
            print(f"saejax train: {error}", file=sys.stderr)
            status = MISTAKE
        except KeyboardInterrupt as stop:
            status = _stopped("train", stop)
        except Exception as error:
            if not processes.several():
                raise
            status = processes.told(error)  # Hydra would make 1 of it
        if status:
            signals.pass_on(status - 128)
            sys.exit(status)
        return directory.objective(run_dir, hydra_config.sweeper.get("direction"))

    before = sys.argv
    sys.argv = ["saejax train", *arguments]
    try:
        hydra.main(version_base="1.3", config_path=config.conf_dir(), config_name="train")(job)()
    finally:
        sys.argv = before


def _run_folded(arguments: list[str]) -> int:
    """A sweep whose jobs are trained together where they can be, each into the directory that it would have alone."""
    from saejax import config
    from saejax.cli import preflight
    from saejax.runs import ensembles

    _log_to_stderr()
    jobs = preflight.directories(arguments)
    members = {path: config.load("train", config.Config, overrides) for path, overrides in jobs.items()}
    if any(cfg.mesh.distributed is not processes.Distributed.none for cfg in members.values()):
        raise UserError(f"{preflight.FOLD}=true is for one process: take mesh.distributed=none")
    statuses = []
    for group in ensembles.groups(members):
        signals.check()
        names, status = ", ".join(path.name for path in group), FAILED
        how = f"folded into one step: {names}" if len(group) > 1 else f"{names} runs separately: {ensembles.FOLDS}"
        for path in group:
            atomic.try_write(path)
        with run_log.kept(group):
            logging.getLogger(__name__).info(how)
            try:
                if len(group) > 1:
                    status = _say(ensembles.train_members(group), next(iter(group)).parent)
                else:
                    status = _come_to(*next(iter(group.items())))
            except (UserError, OSError) as error:
                _tell(f"saejax train: {names}: {error}", problem=True)
        statuses.append(status)
        if status > 128:  # a signal
            break
    return max(statuses)


def _logged(cfg: object, run_dir: Path) -> contextlib.AbstractContextManager[None]:
    """Copies a run's messages to its train.log; refuses a directory that cannot be written to."""
    cfg.mesh.start()  # pyright: ignore[reportAttributeAccessIssue]
    with processes.alike():
        if processes.first():
            atomic.try_write(paths.local(run_dir, "hydra.run.dir"))
    return run_log.kept([run_dir] if processes.first() else [])


def _tell(line: str, *, problem: bool = False) -> None:
    """Print a line of a run, and keep it in the run's log."""
    print(line, file=sys.stderr if problem else sys.stdout, flush=True)
    run_log.note(line)


def _say(result: ensembles.Result, where: Path) -> int:
    """Lines about members that were trained together, and the exit status."""
    if not processes.first():
        return FAILED if result.failed else DONE if result.signum is None else stopped_status(result.signum)
    if result.signum is not None:
        _tell(f"stopped, all members saved; the same command continues ({where})", problem=True)
        return stopped_status(result.signum)
    for path, evaluation in result.evaluations.items():
        shown = (f"{name} {evaluation[name]:.4g}" for name in ("fvu", "l0", "dead_share") if name in evaluation)
        _tell(f"done: {path}; held-out {'  '.join(shown)}")
    if result.tokens_per_second:
        _tell(f"{result.tokens_per_second:.0f} tokens/s, each seen by every member")
    _tell(f"next: saejax report {paths.typed('sweep', where)}")
    for path in result.failed:
        _tell(f"saejax train: {path} is not finite any more; its last good checkpoint stays", problem=True)
    return FAILED if result.failed else DONE


def _come_to(run_dir: Path, cfg: object, of_sweep: bool = True) -> int:
    """Start a run in its directory, continue it, or leave it alone if it is finished; a line says which."""
    from saejax.runs import agreement, directory

    if cfg.ensemble.points:  # pyright: ignore[reportAttributeAccessIssue]
        return _finish_training(cfg, run_dir, resume=False)
    agreement.join(cfg)
    run_dir = Path(processes.gather(str(run_dir))[0])
    found = directory.decide(cfg, run_dir, directory.Request.same)  # pyright: ignore[reportArgumentType]
    if of_sweep or found.action is not directory.Action.start:  # one new run may be a mistake, which is one line
        logging.getLogger(__name__).info("%s %s", run_dir, found)
    if found.action is directory.Action.skip:
        return DONE
    return _finish_training(cfg, run_dir, resume=found.action is directory.Action.go_on)


def _finish_training(cfg: object, run_dir: Path, *, resume: bool) -> int:
    from saejax.runs import agreement, ensembles, run

    agreement.join(cfg)
    _quiet_libraries()
    if cfg.ensemble.points:  # pyright: ignore[reportAttributeAccessIssue]
        return _say(ensembles.train(cfg, run_dir, resume=resume), run_dir)  # pyright: ignore[reportArgumentType]
    outcome = run.train(cfg, run_dir, resume=resume)  # pyright: ignore[reportArgumentType]
    if not processes.first():
        return DONE if outcome.signum is None else stopped_status(outcome.signum)
    if outcome.signum is not None:
        again = paths.typed("resume", run_dir)
        _tell(f"stopped at step {outcome.step}, saved; continue with: saejax train {again}", problem=True)
        return stopped_status(outcome.signum)
    if not outcome.speed["steps"]:
        _tell(f"{run_dir} is finished, at step {outcome.step}; give a larger train.n_tokens to continue")
        return DONE
    figures = "  ".join(f"{name} {value:.4g}" for name, value in outcome.evaluation.items())
    _tell(f"done: {outcome.step} steps, {outcome.speed['tokens_per_second']:.0f} tokens/s; held-out {figures}")
    _tell("next: saejax evaluate {0}   saejax report {0}".format(paths.typed("run", run_dir)))
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
    _log_to_stderr()
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
        _log_to_stderr()
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
    _log_to_stderr()
    return experiments.execute(names)


def wants_help(arguments: list[str]) -> bool:
    """Whether a command line asks for help."""
    return any(a in ("-h", "--help") for a in arguments)


def _log_to_stderr() -> None:
    logging.basicConfig(level=quiet.level(), format="%(message)s", stream=sys.stderr, force=True)
    _quiet_libraries()


def _quiet_libraries() -> None:
    quiet.libraries()
    if not processes.first():
        logging.getLogger().setLevel(logging.ERROR)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "harvest": harvest,
    "train": train,
    "evaluate": command_of("evaluate"),
    "export": command_of("export"),
    "report": command_of("report"),
    "store": store,
    "experiment": experiment,
}
