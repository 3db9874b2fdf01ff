"""What runs in the forks of forker.py: a training run or a harvest, with things going wrong around it on request."""

import ctypes
import functools
import os
import pathlib
import shutil
import sys
import threading
import time
import types

import fault_runs


def prepare() -> None:
    """Everything is imported, nothing is opened."""
    sys.path.append(str(pathlib.Path(__file__).parents[1] / "activations"))
    import grain  # noqa: F401
    import scipy.sparse  # noqa: F401
    import test_harvest  # noqa: F401

    from saejax.storage import checkpoint

    checkpoint.PAUSE_SECONDS = 0.1
    for every in (2, fault_runs.SAVE_EVERY):
        composed((f"checkpoint.save_every_steps={every}",))


@functools.cache
def composed(changes: tuple[str, ...]):
    """The run of `fault_runs.ARGUMENTS`, with some changes: composed once, in the process that forks."""
    from saejax import config

    return config.load("train", config.Config, [*fault_runs.ARGUMENTS, *changes])


def train(run_dir: str, changes: list[str], **wrong: object) -> int:
    """What `saejax train` does once its line is composed, in a world that is wrong in some way."""
    from saejax import errors
    from saejax.cli import jobs, quiet
    from saejax.parallel import processes, signals
    from saejax.runs.directory import Request

    for name, value in wrong.items():
        WRONG[name](value)
    quiet.log_to_stderr()
    try:
        with signals.watch(), processes.together() as end:
            todo = jobs.work(composed(tuple(changes)), pathlib.Path(run_dir), Request.same)
            end.status = errors.DONE if todo is None else jobs.told(todo(), pathlib.Path(run_dir))
        return end.status
    except errors.Stopped as stop:
        return errors.stopped_status(stop.signum)
    except (errors.UserError, OSError) as error:
        print(f"saejax train: {error}")
        return errors.MISTAKE


def command(argv: list[str], folder: str) -> int:
    """A whole command line, typed in a folder."""
    from saejax import cli

    os.chdir(folder)
    return cli.main(argv)


def harvest(root: str, name: str) -> int:
    """A harvest of a model that is a function of tokens; slow enough to be stopped at every place."""
    import test_harvest

    from saejax import errors

    config = test_harvest._config(pathlib.Path(root), name)
    try:
        test_harvest.harvest(config, test_harvest.TinyModel(pause=0.01))
    except KeyboardInterrupt as stop:
        return errors.stopped_status(getattr(stop, "signum", 2))
    except errors.UserError as error:
        print(f"saejax harvest: {error}")
        return errors.MISTAKE
    print("harvest done")
    return 0


def _clock(shift_seconds: float) -> None:
    """Another machine's clock: all that the program can ask is off by so much."""
    seconds, nanoseconds = time.time, time.time_ns
    time.time = lambda: seconds() + shift_seconds
    time.time_ns = lambda: nanoseconds() + int(shift_seconds * 1e9)


def _host(name: str) -> None:
    """Another machine's name, in a name space of this process; needs the right to make one."""
    new_uts_namespace = 0x04000000
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(new_uts_namespace) or libc.sethostname(name.encode(), len(name)):
        sys.exit(77)


def _user(bound: bool) -> None:
    """Permissions bind this process as they bind a user: it gives up every capability of root."""
    version_3, of_self = 0x20080522, 0
    if bound and ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(version_3, of_self), (ctypes.c_uint32 * 6)()):
        sys.exit(77)


def _dashboard(fails_at: str) -> None:
    """A wandb that fails when it starts, in the middle, or when it is closed."""

    def call(name):
        def called(*args, **kwargs):
            if name == fails_at:
                raise ConnectionError(f"no network at {name}")
            return types.SimpleNamespace(id="x", log=call("log"), finish=call("finish"))

        return called

    fake = types.ModuleType("wandb")
    fake.init, fake.Settings = call("init"), lambda **_: None
    sys.modules["wandb"] = fake


def _ballast(where: list) -> None:
    """A disk that fills when a run that was resumed in it begins to train: its config.yaml is new then."""
    file, leave, config = pathlib.Path(where[0]), where[1], pathlib.Path(where[2])
    before = config.stat().st_ino

    def fill() -> None:
        while config.stat().st_ino == before:
            time.sleep(0.0002)
        file.write_bytes(bytes(shutil.disk_usage(file.parent).free - leave))

    threading.Thread(target=fill, daemon=True).start()


WRONG = {"ballast": _ballast, "clock": _clock, "host": _host, "user": _user, "dashboard": _dashboard}
