"""Jobs of `saejax train`: from a composed config to work in a run directory, and to the line that says how it ended.

Every way of starting takes the same two steps: `work` says what is left to do, `told` how it ended. The work is called
between them, by the function that was entered anyway: few calls lie between the command line and the compiled step
(docs/architecture.md names them).
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from omegaconf import DictConfig

from saejax import config
from saejax.cli import ending, preflight, quiet
from saejax.errors import DONE, FAILED, MISTAKE, UserError, stopped_status
from saejax.fields import paths, registry
from saejax.parallel import processes, signals
from saejax.runs import agreement, directory, ensembles, run
from saejax.runs.directory import Action, Request
from saejax.storage import atomic, run_log
from saejax.training import loop

logger = logging.getLogger(__name__)

Result = loop.Outcome | ensembles.Result


@contextlib.contextmanager
def under_hydra(arguments: list[str]) -> Iterator[Callable[[], Any]]:
    """Hydra with a command line: called inside, it composes the jobs and launches each as `job`.

    Args:
      arguments: as `preflight.typed` gives them.
    """
    config.register("train", config.Config)
    before, sys.argv = sys.argv, ["saejax train", *arguments]
    path = os.environ.get("PYTHONPATH")
    if registry.folders():  # processes of a launcher are sent classes by the names of their modules
        os.environ["PYTHONPATH"] = os.pathsep.join([*filter(None, [path]), *registry.folders()])
    try:
        yield hydra.main(version_base="1.3", config_path=config.conf_dir(), config_name="train")(job)
    finally:
        sys.argv = before
        os.environ.pop("PYTHONPATH", None)
        os.environ.update({} if path is None else {"PYTHONPATH": path})


def job(composed: DictConfig) -> object:
    """One job, as Hydra calls it here or in a process of a launcher; returns what a search is told."""
    settings = HydraConfig.get()
    of_sweep = settings.mode == RunMode.MULTIRUN
    with _ends_as_job(of_sweep) as end:
        cfg = config.to_object(composed)
        with logged(cfg, Path(settings.runtime.output_dir)) as run_dir:
            todo = work(cfg, run_dir, Request.same, of_sweep=of_sweep)
            end.status = DONE if todo is None else told(todo(), run_dir)
    return directory.objective(run_dir, settings.sweeper.get("direction"))


@contextlib.contextmanager
def _ends_as_job(of_sweep: bool) -> Iterator[processes.Ending]:
    """The end of a job as Hydra and its launcher must hear of it: by an exception or an exit, where it is not well."""
    end = processes.Ending()
    try:
        with signals.watch(ends_process=True):  # in a process of a launcher this is the first line
            signals.check()
            yield end
    except (UserError, OSError) as error:
        if of_sweep:  # the launcher marks this job as failed and goes on with the others
            raise CompactHydraException(f"saejax train: {error}") from None
        print(f"saejax train: {error}", file=sys.stderr)
        end.status = MISTAKE
    except KeyboardInterrupt as stop:
        end.status = ending.stopped("train", stop)
    except Exception as error:
        if not processes.several():
            raise
        end.status = processes.told(error)  # Hydra would make 1 of it
    if end.status:
        signals.pass_on(end.status - 128)
        sys.exit(end.status)


@contextlib.contextmanager
def logged(cfg: Any, run_dir: Path) -> Iterator[Path]:
    """A job in its directory, with the other processes of its run: what is said inside goes to train.log, too.

    Args:
      cfg: of the run.
      run_dir: where this process would have it.

    Returns:
      A context: the directory, alike in all processes.

    Raises:
      UserError: the processes differ, or nothing can be written to the directory.
    """
    agreement.join(cfg)
    quiet.libraries()
    run_dir = Path(processes.gather(str(run_dir))[0])
    with processes.alike():
        if processes.first():
            atomic.try_write(paths.local(run_dir, "hydra.run.dir"))
    with run_log.kept([run_dir] if processes.first() else []):
        yield run_dir


def work(cfg: Any, run_dir: Path, request: Request, *, of_sweep: bool = True) -> Callable[[], Result] | None:
    """What is left to do for a config in a directory: called, it trains. A line says whether the run starts.

    Args:
      cfg: one run, or an ensemble.
      run_dir: as `logged` gives it.
      request: as what it is wanted.
      of_sweep: whether the line is written also of a run that starts.

    Returns:
      None for a finished run, which is left alone.

    Raises:
      UserError: see `directory.decide`.
    """
    if cfg.ensemble.points:
        return functools.partial(ensembles.train, cfg, run_dir, resume=request is Request.resume)
    found = directory.decide(cfg, run_dir, request)
    if request is Request.same and (of_sweep or found.action is not Action.start):  # one new run may be a mistake
        logger.info("%s %s", run_dir, found)
    if found.action is Action.skip:
        return None
    return functools.partial(run.train, cfg, run_dir, resume=found.action is Action.go_on)


def folded(arguments: list[str], configs: list[config.Config]) -> int:
    """A sweep whose jobs are trained together where they can be, each into the directory that it would have alone.

    Args:
      arguments: as `preflight.alone` gives them.
      configs: of all its jobs.

    Returns:
      The exit status: the highest of its jobs'.
    """
    members = dict(zip(preflight.directories(arguments), configs, strict=True))
    if any(cfg.mesh.distributed is not processes.Distributed.none for cfg in configs):
        raise UserError(f"{preflight.FOLD}=true is for one process: take mesh.distributed=none")
    statuses = []
    for group in ensembles.groups(members):
        signals.check()
        names, status = ", ".join(path.name for path in group), FAILED
        how = f"folded into one step: {names}" if len(group) > 1 else f"{names} runs separately: {ensembles.FOLDS}"
        for path in group:
            atomic.try_write(path)
        with run_log.kept(group):
            logger.info(how)
            try:
                if len(group) > 1:
                    status = told(ensembles.train_members(group), next(iter(group)).parent)
                else:
                    ((path, cfg),) = group.items()
                    todo = work(cfg, path, Request.same)
                    status = DONE if todo is None else told(todo(), path)
            except (UserError, OSError) as error:
                _tell(f"saejax train: {names}: {error}", problem=True)
        statuses.append(status)
        if status > 128:  # a signal
            break
    return max(statuses)


def told(result: Result, where: Path) -> int:
    """Say how work ended; returns the exit status.

    Args:
      result: of one run, or of members that were trained together.
      where: their directory.
    """
    of_members = isinstance(result, ensembles.Result)
    if processes.first():
        _tell_of_members(result, where) if of_members else _tell_of_run(result, where)
    if result.signum is not None:
        return stopped_status(result.signum)
    return FAILED if of_members and result.failed else DONE


def _tell_of_run(outcome: loop.Outcome, run_dir: Path) -> None:
    if outcome.signum is not None:
        again = paths.typed("resume", run_dir)
        _tell(f"stopped at step {outcome.step}, saved; continue with: saejax train {again}", problem=True)
    elif not outcome.speed["steps"]:
        _tell(f"{run_dir} is finished, at step {outcome.step}; give a larger train.n_tokens to continue")
    else:
        figures = "  ".join(f"{name} {value:.4g}" for name, value in outcome.evaluation.items())
        _tell(f"done: {outcome.step} steps, {outcome.speed['tokens_per_second']:.0f} tokens/s; held-out {figures}")
        _tell("next: saejax evaluate {0}   saejax report {0}".format(paths.typed("run", run_dir)))


def _tell_of_members(result: ensembles.Result, where: Path) -> None:
    if result.signum is not None:
        _tell(f"stopped, all members saved; the same command continues ({where})", problem=True)
        return
    for path, evaluation in result.evaluations.items():
        shown = (f"{name} {evaluation[name]:.4g}" for name in ("fvu", "l0", "dead_share") if name in evaluation)
        _tell(f"done: {path}; held-out {'  '.join(shown)}")
    if result.tokens_per_second:
        _tell(f"{result.tokens_per_second:.0f} tokens/s, each seen by every member")
    _tell(f"next: saejax report {paths.typed('sweep', where)}")
    for path in result.failed:
        _tell(f"saejax train: {path} is not finite any more; its last good checkpoint stays", problem=True)


def _tell(line: str, *, problem: bool = False) -> None:
    """Print a line of a run, and keep it in the run's log."""
    print(line, file=sys.stderr if problem else sys.stdout, flush=True)
    run_log.note(line)
