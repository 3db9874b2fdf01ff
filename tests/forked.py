"""Commands in processes of their own, without the seconds of importing that each would begin with.

One process per test worker imports everything, opens no device, and forks for each command. What a test asks of a
process is real: descriptors, working directory, exit status. Tests about the start itself start Python afresh.
"""

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path


def run(*arguments: str, cwd: Path | None = None, seconds: float = 250) -> subprocess.CompletedProcess[str]:
    """`saejax arguments...` in a fork: its exit status (-n: killed by signal n), stdout and stderr."""
    server = _server()
    assert server.stdin and server.stdout
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        wanted = {"arguments": arguments, "cwd": os.fspath(cwd or os.getcwd()), "out": str(out), "err": str(err)}
        server.stdin.write(json.dumps(wanted | {"seconds": seconds}) + "\n")
        server.stdin.flush()
        status = int(server.stdout.readline())
        return subprocess.CompletedProcess(arguments, status, out.read_text(), err.read_text())


@functools.cache
def _server() -> subprocess.Popen[str]:
    """It ends with the worker, when its stdin is closed."""
    return subprocess.Popen([sys.executable, __file__], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def _serve() -> dict:
    """Returns in every fork, with what it shall do."""
    for line in sys.stdin:
        wanted = json.loads(line)
        child = os.fork()
        if child == 0:
            return wanted
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    os._exit(0)


if __name__ == "__main__":
    import signal

    from saejax import cli
    from saejax.cli import commands, program  # noqa: F401
    from saejax.report import page, sweep  # noqa: F401
    from saejax.runs import ensembles, run  # noqa: F401, F811

    wanted = _serve()
    signal.alarm(int(wanted["seconds"]))
    os.chdir(wanted["cwd"])
    files = (os.open(wanted[name], os.O_WRONLY | os.O_CREAT) for name in ("out", "err"))
    for descriptor, file in enumerate((os.open(os.devnull, os.O_RDONLY), *files)):
        os.dup2(file, descriptor)
    sys.exit(cli.main(wanted["arguments"]))
