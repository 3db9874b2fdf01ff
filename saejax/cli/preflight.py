"""Preflight: composes and checks every job of a command line, sweeps included, before the first one starts."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.errors import HydraException
from omegaconf import open_dict
from omegaconf.errors import OmegaConfBaseException

from saejax import config
from saejax.errors import UserError
from saejax.fields import command_line, key_value, paths
from saejax.parallel import processes
from saejax.runs import agreement
from saejax.storage import lock

# A sweep of thousands is checked in part: composing one job takes a fifth of a second.
MAX_JOBS = 64

# Another search path, or a question to Hydra instead of a job: only Hydra itself knows the answer.
HYDRA_ALONE = ("--config-", "-cd", "-cn", "-cp", "--cfg", "-c", "--info", "-i", "--package", "-p", "--hydra-help")

MULTIRUN = ("-m", "--multirun")

# Flags of `saejax train` after which a word of their own may come; the others.
VALUED = ("--config-path", "--config-name", "--config-dir", "-cp", "-cn", "-cd", "--cfg", "-c", "--info", "-i")
VALUED += ("--package", "-p", "--experimental-rerun")
FLAGS = (*MULTIRUN, "--dry-run", "--device-memory-gib", "--hydra-help", "--resolve", "--shell-completion", "-sc")

# Settings of Hydra itself; the groups of train.yaml that choose among them.
HYDRA_OWN = ("hydra.", "hydra/")
HYDRA_GROUPS = ("launcher=", "sweeper=")

# Not a key of a run: whether the jobs of a sweep that can be are trained in one step.
FOLD = "sweep.fold"

# What a launcher or sweeper needs, by the beginning of its name: module, and the extra of saejax that brings it.
PLUGINS = {
    "submitit": ("hydra_plugins.hydra_submitit_launcher", "submitit"),
    "optuna": ("hydra_plugins.hydra_optuna_sweeper", "optuna"),
}


def typed(arguments: list[str]) -> list[str]:
    """`saejax train ARGUMENTS` as Hydra is to read it: paths in quotes, flags first, for it takes one group of words.

    Args:
      arguments: as typed.

    Raises:
      UserError: a word that the command does not know.
    """
    command_line.check_words(arguments, FLAGS, VALUED)
    for argument in arguments:
        key, _, value = argument.lstrip("+").partition("=")
        if key in command_line.OF_HYDRA:
            paths.checked(command_line.unquoted(value), key)
    keys = command_line.path_keys(config.Config, config.GROUPS)
    words = command_line.for_hydra(arguments, keys, sweep=_multirun(arguments))
    if any(a.startswith(HYDRA_ALONE) for a in words):
        return words  # a word may belong to the flag before it
    return sorted(words, key=lambda word: not word.startswith("-"))


def resumed(arguments: list[str]) -> tuple[Path, list[str]] | None:
    """The run directory of `resume=RUN_DIR`, which Hydra never sees, and the overrides that go with it.

    Args:
      arguments: as typed.

    Returns:
      None where nothing is resumed.

    Raises:
      UserError: a flag, or no path.
    """
    named = [a for a in arguments if a.startswith("resume=")]
    if not named:
        return None
    overrides = [a for a in arguments if not a.startswith("resume=")]
    if flags := [a for a in overrides if "=" not in a or a.startswith("-")]:
        raise UserError(f"resume=RUN_DIR takes key=value overrides only, got {flags[0]}")
    return paths.local(named[-1].removeprefix("resume="), "resume"), overrides


def check(arguments: list[str], at_most: int | None = MAX_JOBS) -> list[config.Config]:
    """Compose the jobs of `saejax train ARGUMENTS`.

    Args:
      arguments: as typed, with `-m` and Hydra's own flags.
      at_most: jobs that are composed; None composes all.

    Returns:
      Their configs; those of the first jobs where there are thousands, none where only Hydra knows.

    Raises:
      UserError: the first mistake, in one line; with the overrides of the job when there are several.
    """
    if any(a.startswith(HYDRA_ALONE) for a in arguments):
        return []
    _check_plugins(arguments)
    _check_hydra(arguments)
    folds(arguments)
    jobs, configs = _jobs(arguments), []
    for overrides in jobs[:at_most]:
        try:
            configs.append(config.load("train", config.Config, overrides))
        except UserError as error:
            if len(jobs) == 1:
                raise
            raise UserError(f"{error} (in the job {' '.join(overrides)}; no job was started)") from error
    return configs


def _check_hydra(arguments: list[str]) -> None:
    """Refuse wrong settings of Hydra itself (hydra.mode, hydra/launcher, ...), which Hydra would tell in many lines."""
    overrides = _overrides(arguments)
    if not any(a.lstrip("+~").startswith(HYDRA_OWN) for a in overrides):
        return
    own = [a for a in overrides if a.lstrip("+~").startswith((*HYDRA_OWN, *HYDRA_GROUPS))]
    config.register("train", config.Config)
    try:
        with initialize_config_dir(config_dir=config.conf_dir(), version_base="1.3"):
            compose("train", own, return_hydra_config=True)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise UserError(config.one_line(error)) from error


def join(arguments: list[str], configs: list[config.Config]) -> list[str]:
    """Join the other processes of a run, where it has any, and agree with them on its directory.

    Args:
      arguments: as typed.
      configs: of its jobs, from `check`.

    Returns:
      The arguments; with the directory of process 0 where each would have made one by its own clock.
    """
    launched = any(a.lstrip("+").startswith(("launcher=", "hydra/launcher=")) for a in arguments)
    if not configs or _multirun(arguments) and launched:
        return arguments  # each job of a sweep joins its own
    agreement.join(configs[0])
    if not processes.several() or _multirun(arguments) or any(a.startswith("hydra.run.dir=") for a in arguments):
        return arguments
    with initialize_config_dir(config_dir=config.conf_dir(), version_base="1.3"):
        composed = compose("train", [a for a in arguments if not a.startswith("-")], return_hydra_config=True)
    agreed = processes.gather(str(composed.hydra.run.dir))[0]
    return [*arguments, f"hydra.run.dir={paths.for_hydra(agreed)}"]


@contextlib.contextmanager
def alone(arguments: list[str], configs: list[config.Config]) -> Iterator[list[str]]:
    """Hold the directory of a sweep before Hydra writes into it; each run holds its own by itself.

    Args:
      arguments: as typed; of a single run nothing is held.
      configs: of its jobs, from `check`.

    Returns:
      A context: the arguments, with the directory that was held where its name has the time in it.

    Raises:
      UserError: another sweep is at work there.
    """
    place = _sweep_dir(arguments) if _multirun(arguments) else None
    at = configs[0].mesh.place() if configs else None
    if place is None or at is not None and at.process_id != 0:
        yield arguments
        return
    with lock.hold(place, "saejax train -m"):
        if (place / "multirun.yaml").is_symlink():  # Hydra would write through it
            raise UserError(f"{place / 'multirun.yaml'} is a link, and is not written through; remove it")
        yield [*arguments, f"hydra.sweep.dir={paths.for_hydra(str(place))}"]


def _sweep_dir(arguments: list[str]) -> Path | None:
    """Directory of a sweep as Hydra would choose it; None where only Hydra knows."""
    overrides = [a for a in _overrides(arguments) if not a.startswith(FOLD + "=")]
    if any(a.startswith(HYDRA_ALONE) for a in arguments):
        said = [a.partition("=")[2] for a in overrides if a.lstrip("+").startswith("hydra.sweep.dir=")]
        return Path(command_line.unquoted(said[-1])).absolute() if said and "${" not in said[-1] else None
    try:
        parsed = key_value.parsed(overrides)
        once = [text for text, one in zip(overrides, parsed, strict=True) if not one.is_sweep_override()]
        with initialize_config_dir(config_dir=config.conf_dir(), version_base="1.3"):
            composed = compose("train", once, return_hydra_config=True)
        return Path(str(composed.hydra.sweep.dir)).absolute()
    except (HydraException, OmegaConfBaseException, ValueError):
        return None


def folds(arguments: list[str]) -> bool:
    """Whether a sweep is to train the runs together that can be (`sweep.fold=true`).

    Args:
      arguments: as typed.

    Raises:
      UserError: no sweep, or one that is not a grid in this process; a value that is neither true nor false.
    """
    said = [a.partition("=")[2].lower() for a in arguments if a.startswith(FOLD + "=")]
    if said and said[-1] not in ("true", "false"):
        raise UserError(f"{FOLD} must be true or false, got {said[-1]}")
    if not said or said[-1] == "false":
        return False
    if not _multirun(arguments):
        raise UserError(f"{FOLD}=true is for sweeps: add -m, or take lists as in ensemble.seed=[0,1]")
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key.lstrip("+").removeprefix("hydra/") in ("launcher", "sweeper") and value != "basic":
            raise UserError(f"{FOLD}=true trains a grid in this process, got {argument}")
        if argument.startswith(HYDRA_ALONE):
            raise UserError(f"{FOLD}=true does not go with {argument}")
    if not _jobs(arguments):
        raise UserError(f"{FOLD}=true takes lists of values, as in sae.k=16,32: a search is not known beforehand")
    return True


def directories(arguments: list[str]) -> dict[Path, list[str]]:
    """The run directory that Hydra would give to each job of a sweep, and the overrides of the job.

    Args:
      arguments: as typed.

    Raises:
      UserError: two jobs would share a directory.
    """
    of_hydra = [a for a in arguments if a.lstrip("+").startswith("hydra")]
    found: dict[Path, list[str]] = {}
    root = None
    with initialize_config_dir(config_dir=config.conf_dir(), version_base="1.3"):
        for number, job in enumerate(_jobs(arguments)):
            composed = compose("train", overrides=[*of_hydra, *job], return_hydra_config=True)
            with open_dict(composed):
                composed.hydra.job.num, composed.hydra.job.id = number, f"train_{number}"
            root = root or Path(composed.hydra.sweep.dir)  # its name holds the time
            path = root / str(composed.hydra.sweep.subdir)
            if path in found:
                raise UserError(f"hydra.sweep.subdir gives {path} to two jobs: {found[path]} and {job}")
            found[path] = job
    return found


def _check_plugins(arguments: list[str]) -> None:
    """Refuse a launcher or sweeper that is not installed, or that would not be asked because nothing is swept."""
    for argument in arguments:
        key, _, value = argument.partition("=")
        name = next((name for name in PLUGINS if value.startswith(name)), None)
        if name is None or key.lstrip("+").removeprefix("hydra/") not in ("launcher", "sweeper"):
            continue
        module, extra = PLUGINS[name]
        try:
            importlib.import_module(module)
        except ImportError:
            raise UserError(f"{argument} needs a plugin of Hydra: pip install 'saejax[{extra}]'") from None
        if not _multirun(arguments):
            raise UserError(f"{argument} is for sweeps: add -m")


def _multirun(arguments: list[str]) -> bool:
    return any(a in MULTIRUN for a in arguments)


def make_directories(arguments: list[str]) -> None:
    """Make the directory that a command line names for its runs, so that a wrong one fails in one line.

    Args:
      arguments: as typed.

    Raises:
      OSError: it cannot be made.
    """
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key.lstrip("+") in ("hydra.run.dir", "hydra.sweep.dir"):
            place = command_line.unquoted(value)
            if "${" not in place:
                paths.local(place, key).mkdir(parents=True, exist_ok=True)


def _overrides(arguments: list[str]) -> list[str]:
    return [a for a in arguments if "=" in a and not a.startswith("-") or a.startswith(("+", "~"))]


def _jobs(arguments: list[str]) -> list[list[str]]:
    """The overrides of every job: one, or one for each point of a grid."""
    key_value.parsed(a for a in arguments if not a.startswith("-"))
    ours = [o for o in _overrides(arguments) if not o.lstrip("+").startswith(("hydra", FOLD + "="))]
    if not _multirun(arguments):
        return [ours]
    parsed = key_value.parsed(ours)
    try:
        batches = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    except (HydraException, ValueError) as error:
        chosen = [a.lstrip("+").removeprefix("hydra/").partition("=") for a in arguments]
        if any(key.partition("@")[0] == "sweeper" and name != "basic" for key, _, name in chosen):
            return []  # that sweeper's syntax, say interval(0, 1): it will judge it
        swept = next((o.input_line for o in parsed if o.is_sweep_override()), ours)
        raise UserError(f"{swept}: a grid takes lists of values, as in sae.k=16,32") from error
    return [list(job) for batch in batches for job in batch]
