"""Commands run by several real processes over loopback; none outlives its test."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

CODE = "import sys; from saejax import cli; sys.exit(cli.main(sys.argv[1:]))"

QUICK_DEATH = "mesh.dead_after_seconds=10"
"""The shortest silence that counts as death; what a test waits for."""


class Group:
    """Processes of one command, numbered from 0.

    Attributes:
      members: the processes.
      logs: what each of them printed, one file each.
    """

    def __init__(self, members: list[subprocess.Popen], logs: list[Path]):
        self.members, self.logs = members, logs

    def statuses(self, seconds: float = 240) -> list[int]:
        """The exit status of each; one that is still there after some seconds is a failure."""
        deadline = time.monotonic() + seconds
        return [member.wait(max(0.1, deadline - time.monotonic())) for member in self.members]

    def wait_until_said(self, number: int, text: str, seconds: float = 240) -> None:
        """Until one of them has printed something."""
        deadline = time.monotonic() + seconds
        while text not in self.said(number):
            assert time.monotonic() < deadline, f"{text} was not said: {self.said(number)[-2000:]}"
            assert all(member.poll() is None for member in self.members), f"ended early: {self.said(number)[-2000:]}"
            time.sleep(0.01)

    def wait_until_watched(self, number: int, seconds: float = 60) -> None:
        """Until one of them has handlers for signals, as Linux says."""
        deadline = time.monotonic() + seconds
        while not watches(self.members[number].pid):
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def wait_for_first_end(self, seconds: float = 240) -> None:
        """Until one of them has ended."""
        deadline = time.monotonic() + seconds
        while all(member.poll() is None for member in self.members):
            assert time.monotonic() < deadline, f"none ended: {self.said(0)[-2000:]}"
            time.sleep(0.05)

    def said(self, number: int) -> str:
        """What one of them printed so far."""
        return self.logs[number].read_text(errors="replace")

    def wait_for(self, path: Path, seconds: float = 240) -> None:
        """Until a file is there."""
        deadline = time.monotonic() + seconds
        while not path.exists():
            assert time.monotonic() < deadline, f"{path} did not come: {self.said(0)[-2000:]}"
            assert all(member.poll() is None for member in self.members), f"ended early: {self.said(0)[-2000:]}"
            time.sleep(0.02)


def watches(pid: int) -> bool:
    """Whether a process has a handler for SIGUSR2, as the kernel says."""
    status = Path(f"/proc/{pid}/status").read_text()
    return bool(int(re.findall(r"SigCgt:\s*([0-9a-f]+)", status)[0], 16) & 1 << signal.SIGUSR2 - 1)


def free_port() -> int:
    """A port that nobody listens at now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def running(
    n: int,
    folder: Path,
    *arguments: str,
    devices: int = 1,
    each: Sequence[Sequence[str]] = (),
    each_environment: Sequence[Mapping[str, str]] = (),
    **variables: str,
) -> Iterator[Group]:
    """`saejax ARGUMENTS` in n processes with some fake devices each, which find one another by JAX_* variables.

    `each` holds what a process has beside the arguments of all, `each_environment` its own variables.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # XLA sizes its thread pool by NPROC; with fewer threads than waiting devices it deadlocks.
    shared = {
        "NPROC": "16",
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
        "JAX_NUM_PROCESSES": str(n),
    }
    members, logs = [], [folder / f"{os.urandom(4).hex()}.{number}.log" for number in range(n)]
    try:
        for number, log in enumerate(logs):
            environment = os.environ | shared | {"JAX_PROCESS_ID": str(number)} | variables
            environment |= each_environment[number] if each_environment else {}
            with log.open("wb") as out:
                command = [sys.executable, "-c", CODE, *arguments, *(each[number] if each else ())]
                options = {"env": environment, "stdout": out, "stderr": subprocess.STDOUT, "start_new_session": True}
                members.append(subprocess.Popen(command, **options))
        yield Group(members, logs)
    finally:
        for member in members:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(member.pid, signal.SIGKILL)
            member.wait(30)
