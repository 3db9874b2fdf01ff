"""Meeting of several processes before JAX joins them: do all come, and do all bring the same facts?

JAX waits as long as it may for a process that counts the others differently or has failed on its own command line. It
crashes where another program holds the coordinator's port. So process 0 first listens on that port itself. Every other
process sends one line: its number and the facts that must match (`Facts`), or the reason why it cannot come. Process 0
answers each with one line: all go on, or why all end. Then JAX gets the port.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import selectors
import signal
import socket
import time
from collections.abc import Iterator, Mapping
from typing import Any

from saejax.errors import Stopped, UserError
from saejax.parallel import signals

Facts = Mapping[str, str | None]
"""What all processes must have alike: name of a field -> value, None where there is none."""

_ENDING_SECONDS = 10.0
"""How long process 0 stays to tell those who come late that all have ended."""
_RETRY_SECONDS = 0.2
_ANSWER_SECONDS = 5.0  # for what another program at the address may say
_LONGEST = 1 << 20  # bytes of a line
_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Address:
    """Meeting place of a run's processes.

    Attributes:
      coordinator: host:port of process 0.
      process_id: number of this one.
      n_processes: how many it expects.
    """

    coordinator: str
    process_id: int
    n_processes: int

    @property
    def target(self) -> tuple[str, int]:
        """Host and port."""
        host, _, port = self.coordinator.rpartition(":")
        return host.strip("[]"), int(port)


def differences(facts: Mapping[int, Facts]) -> str | None:
    """The first field in which processes differ, with all its values, in one line; None where all are alike.

    Args:
      facts: number of a process -> what it has.

    >>> differences({0: {"seed": "0", "optim.lr": "0.1"}, 1: {"seed": "0", "optim.lr": "0.2"}})
    'the processes of this run differ in optim.lr: process 0 has 0.1, process 1 has 0.2; start all with the same'
    """
    names = list(dict.fromkeys(name for have in facts.values() for name in have))
    differing = [name for name in names if len({have.get(name) for have in facts.values()}) > 1]
    if not differing:
        return None
    holders: dict[str | None, list[int]] = {}
    for number, have in sorted(facts.items()):
        holders.setdefault(have.get(differing[0]), []).append(number)
    said = ", ".join(f"{_named(numbers)} {'nothing' if v is None else v}" for v, numbers in holders.items())
    more = f" (and in {', '.join(differing[1:4])}{' ...' if len(differing) > 4 else ''})" if differing[1:] else ""
    return f"the processes of this run differ in {differing[0]}: {said}{more}; start all with the same"


def _named(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return f"process {numbers[0]} has"
    return f"processes {', '.join(map(str, numbers[:4]))}{' ...' if len(numbers) > 4 else ''} have"


def meet(at: Address, facts: Facts, timeout_seconds: float) -> None:
    """Wait until all processes are there.

    Args:
      at: where, and who this is.
      facts: of this process; the number of processes is compared as well.
      timeout_seconds: how long to wait.

    Raises:
      UserError: alike in all of them: they differ, one of them has failed, or not all have come; in process 0 also
        that the port is taken.
      Stopped: one of them was stopped.
    """
    facts = {"mesh.num_processes": str(at.n_processes), **facts}
    mine = {"saejax": _VERSION, "process": at.process_id, "facts": facts}
    end = time.monotonic() + timeout_seconds
    if at.process_id == 0:
        with _listening(at, mine) as listener:
            _Gathering(at, listener).run(mine, end, timeout_seconds)
        return
    why = _visit(at, mine, end + _ANSWER_SECONDS, patience=end)
    if why is not None:
        raise UserError(f"mesh.coordinator={at.coordinator}: {why} within mesh.timeout_seconds={timeout_seconds:g}")


def give_up(at: Address, error: BaseException, seconds: float) -> None:
    """Tell the others why this process does not come, so that they do not wait for it.

    Args:
      at: where they wait.
      error: why.
      seconds: how long to try: process 0 to tell all others, another one to tell process 0, which tells the rest.
    """
    mine = {"saejax": _VERSION, "process": at.process_id, "failed": _kind(error)}
    end = time.monotonic() + seconds
    with contextlib.suppress(UserError, Stopped, OSError):  # what they answer is that they end as well
        if at.process_id == 0:
            with _listening(at, None) as listener:
                _Gathering(at, listener).run(mine, end, seconds)
        else:
            _visit(at, mine, end, patience=end)


def _kind(error: BaseException) -> list[str]:
    if isinstance(error, KeyboardInterrupt):
        return ["stopped", str(int(getattr(error, "signum", signal.SIGINT)))]
    text = (str(error).splitlines() or [""])[0]
    return ["user", text] if isinstance(error, (UserError, OSError)) else ["defect", f"{type(error).__name__}: {text}"]


def _raise(kind: str, text: str) -> None:
    if kind == "stopped":
        raise Stopped(int(text))
    raise UserError("".join(letter if letter.isprintable() else " " for letter in text))  # it comes from elsewhere


class _Gathering:
    """Process 0 among the others."""

    def __init__(self, at: Address, listener: socket.socket) -> None:
        self._at, self._listener = at, listener
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._heard: dict[socket.socket, bytearray] = {}  # what came so far from those who have not said all
        self._came: dict[socket.socket, int] = {}  # number of those who have
        self._told: set[socket.socket] = set()
        self._facts: Facts | None = None
        self._verdict: list[str] | None = None

    def run(self, mine: dict[str, Any], end: float, timeout_seconds: float) -> None:
        """Hear the others until all have come or one, perhaps this one, ends all; answer; raise what ends this one."""
        failing = "failed" in mine
        self._facts = mine.get("facts")
        self._verdict = self._failure(mine)
        try:
            while self._missing() and time.monotonic() < end:
                before = self._verdict
                self._hear()
                if before is None and self._verdict is not None:
                    end = min(end, time.monotonic() + _ENDING_SECONDS)
            if self._verdict is None and (missing := self._missing()):
                numbers = ", ".join(map(str, missing[:8])) + (" ..." if len(missing) > 8 else "")
                within = f"within mesh.timeout_seconds={timeout_seconds:g}"
                why = f"not all of {self._at.n_processes} processes have come {within} (missing: {numbers})"
                self._verdict = ["user", f"mesh.coordinator={self._at.coordinator}: {why}"]
            self._answer()
            self._wait_until_read()
        finally:
            for connection in [*self._heard, *self._came, self._selector]:
                connection.close()
        if self._verdict is not None and not failing:
            _raise(*self._verdict)

    def _missing(self) -> list[int]:
        """Numbers of the missing processes. A duplicate number, or one out of range, stands for somebody."""
        absent = sorted(set(range(1, self._at.n_processes)) - set(self._came.values()))
        return absent[: max(0, self._at.n_processes - 1 - len(self._came))]

    def _hear(self) -> None:
        for key, _ in self._selector.select(timeout=0.5):
            if key.fileobj is self._listener:
                with contextlib.suppress(OSError):
                    connection, _ = self._listener.accept()
                    connection.setblocking(False)
                    self._heard[connection] = bytearray()
                    self._selector.register(connection, selectors.EVENT_READ)
            else:
                self._read(key.fileobj)  # pyright: ignore[reportArgumentType]

    def _read(self, connection: socket.socket) -> None:
        try:
            more = connection.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            more = b""
        if connection in self._came:
            if not more:  # it has its answer, or it was killed; then another one may come in its place
                self._selector.unregister(connection)
                if connection not in self._told:
                    del self._came[connection]
                    connection.close()
            return
        line = self._heard[connection]
        line += more
        if more and b"\n" not in line and len(line) < _LONGEST:
            return
        del self._heard[connection]
        message = _parsed(bytes(line)) if more else None
        if message is None or "process" not in message:  # gone, or another program
            self._selector.unregister(connection)
            connection.close()
            return
        self._enter(connection, message)

    def _enter(self, connection: socket.socket, message: dict[str, Any]) -> None:
        number = message["process"]
        problem = self._failure(message)
        if problem is None and number in (0, *self._came.values()):
            problem = ["user", f"two processes of this run are process {number}: give each its own mesh.process_id"]
        if problem is None and self._facts is not None:
            said = differences({0: self._facts, number: message.get("facts", {})})
            problem = None if said is None else ["user", said]
        self._came[connection] = number
        self._verdict = self._verdict or problem
        if self._verdict is not None:
            self._answer()

    @staticmethod
    def _failure(message: dict[str, Any]) -> list[str] | None:
        if "failed" not in message:
            return None
        kind, text = message["failed"]
        return [kind, text if kind == "stopped" else f"process {message['process']}: {text}"]

    def _answer(self) -> None:
        answer = {"saejax": _VERSION} | ({"go": True} if self._verdict is None else {"end": self._verdict})
        for connection in self._came.keys() - self._told:
            self._told.add(connection)
            with contextlib.suppress(OSError):
                connection.sendall(json.dumps(answer).encode() + b"\n")
                connection.shutdown(socket.SHUT_WR)

    def _wait_until_read(self) -> None:
        """Until all have heard and closed: the port is free again at once where those who connected close first."""
        end = time.monotonic() + _ANSWER_SECONDS
        for connection in self._came:
            with contextlib.suppress(OSError):
                connection.settimeout(max(0.01, end - time.monotonic()))
                while connection.recv(1 << 16):
                    pass


@contextlib.contextmanager
def _listening(at: Address, mine: dict[str, Any] | None) -> Iterator[socket.socket]:
    """A socket at the address where JAX's coordinator will listen."""
    host, port = at.target
    given = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS")
    bound = Address(given or f"[::]:{port}", 0, 1).target
    family = socket.AF_INET6 if ":" in bound[0] and socket.has_dualstack_ipv6() else socket.AF_INET
    if family is socket.AF_INET and ":" in bound[0]:
        bound = ("", bound[1])
    try:
        listener = socket.create_server(
            bound, family=family, backlog=1024, dualstack_ipv6=family is socket.AF_INET6 and bound[0] == "::"
        )
    except OSError as error:
        if error.errno == errno.EADDRINUSE and mine is not None:
            _visit(at, mine, time.monotonic() + 2, patience=0.0)  # if it is another process 0, both end with its answer
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise UserError(
            f"mesh.coordinator={at.coordinator}: process 0 cannot listen at port {port} ({reason}); is another run "
            "there? Take another port in all processes"
        ) from error
    with listener:
        listener.setblocking(False)
        yield listener


def _visit(at: Address, mine: dict[str, Any], end: float, patience: float) -> str | None:
    """Go to process 0 and wait for its answer.

    Args:
      at: where it is.
      mine: the line for it.
      end: when waiting for an answer ends, by the monotonic clock.
      patience: until when one that does not answer is asked again.

    Returns:
      None once it has said that all go on; otherwise why there was no answer.

    Raises:
      UserError, Stopped: what it said.
    """
    why = "process 0 does not answer"
    while True:
        try:
            answer = _asked(at, mine, end)
        except OSError as error:
            why, answer = f"process 0 does not answer ({error.strerror or error})", None
        if answer is not None:
            if "end" in answer:
                _raise(*answer["end"])
            return None
        if time.monotonic() >= min(patience, end):
            return why
        time.sleep(_RETRY_SECONDS)


def _asked(at: Address, mine: dict[str, Any], end: float) -> dict[str, Any] | None:
    """Answer of process 0 to one line; None where something else listens."""
    heard = bytearray()
    with socket.create_connection(at.target, timeout=_ANSWER_SECONDS) as connection:
        connection.sendall(json.dumps(mine).encode() + b"\n")
        connection.settimeout(1.0)
        while b"\n" not in heard and len(heard) < _LONGEST and time.monotonic() < end:
            with contextlib.suppress(TimeoutError):
                if not (more := connection.recv(1 << 16)):
                    break
                heard += more
                if not heard.startswith(b"{"):
                    return None
    return _parsed(bytes(heard))


def _parsed(line: bytes) -> dict[str, Any] | None:
    """One line of this protocol; None for anything else."""
    try:
        message = json.loads(line)
    except ValueError:
        return None
    if not isinstance(message, dict) or message.get("saejax") != _VERSION:
        return None
    for key in ("failed", "end"):
        if key in message:
            found = message[key]
            well = isinstance(found, list) and len(found) == 2 and all(isinstance(part, str) for part in found)
            stopped = well and found[0] == "stopped"
            if not well or stopped and found[1] not in {str(int(number)) for number in signals.SIGNALS}:
                return None
    if "process" in message and not isinstance(message["process"], int):
        return None
    facts = message.get("facts", {})
    if not isinstance(facts, dict) or not all(isinstance(value, str) for value in facts.values()):
        return None
    return message if {"go", "end", "failed", "facts"} & message.keys() else None
