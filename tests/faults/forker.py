"""A process that has imported everything and opened no device; each piece of work it is sent runs in a fork of it.

That saves the seconds of importing in hundreds of runs, which are processes all the same, and can be killed. In comes a
line of JSON, {"work", "arguments", "log"}, out go the fork's number and, when it has ended, its exit status (-n: killed
by signal n). `work` names a function of fault_work.py.
"""

import json
import os
import sys


def serve() -> dict:
    """Returns in every fork, with what it shall do."""
    for line in sys.stdin:
        wanted = json.loads(line)
        child = os.fork()
        if child == 0:
            return wanted
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    os._exit(0)


if __name__ == "__main__":
    import fault_work

    fault_work.prepare()
    wanted = serve()
    null, log = os.open(os.devnull, os.O_RDONLY), os.open(wanted["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for descriptor, target in ((null, 0), (log, 1), (log, 2)):
        os.dup2(descriptor, target)
    sys.exit(getattr(fault_work, wanted["work"])(**wanted["arguments"]))
