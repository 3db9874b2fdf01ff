"""Processes that meet over real sockets, each a thread here: all go on, or all end with the same line."""

import concurrent.futures
import contextlib
import signal
import socket
import threading
import time

import process_groups
import pytest

from saejax.errors import Stopped, UserError
from saejax.parallel import rendezvous


@pytest.fixture
def at(monkeypatch):
    monkeypatch.setattr(rendezvous, "_ENDING_SECONDS", 2.0)
    where = f"127.0.0.1:{process_groups.free_port()}"
    return lambda number, n=2: rendezvous.Address(where, number, n)


def ends(*calls, seconds: float = 15.0) -> list[str]:
    """How each call ends: "" where it returns, else what it says; all within some seconds."""

    def run(call) -> str:
        try:
            call()
        except (UserError, Stopped) as error:
            return f"{type(error).__name__}: {error}"
        return ""

    started = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
        found = list(pool.map(run, calls))
    assert time.monotonic() - started < seconds
    return found


def meets(address, timeout=60, **facts):
    return lambda: rendezvous.meet(address, facts, timeout)


def test_all_come_in_any_order_and_the_port_is_free_again(at):
    n = 12
    late = lambda: (time.sleep(0.5), meets(at(0, n), seed="0")())  # noqa: E731
    assert ends(late, *(meets(at(i, n), seed="0") for i in range(1, n))) == [""] * n
    socket.create_server(at(0).target).close()


@pytest.mark.parametrize("here", [0, 1, 2])
def test_one_that_differs_ends_all_with_the_same_line(at, here):
    values = ["0", "0", "0"]
    values[here] = "7"
    said = ends(*(meets(at(i, 3), command="train", seed=values[i]) for i in range(3)))
    # Process 0 compares each that comes with itself; where it is the odd one, whoever came first is named.
    assert len(set(said)) == 1 and "differ in seed: process 0 has" in said[0]
    assert "0" in said[0] and "7" in said[0] and (here == 0 or f"process {here} has 7" in said[0])


@pytest.mark.parametrize(("first", "second"), [(2, 3), (3, 2), (5, 2)])
def test_processes_that_count_each_other_differently(at, first, second):
    said = ends(meets(at(0, first)), meets(at(1, second)))
    assert said[0] == said[1]
    assert f"differ in mesh.num_processes: process 0 has {first}, process 1 has {second}" in said[0]


def test_a_field_that_one_of_them_does_not_have(at):
    said = ends(meets(at(0), a="1"), meets(at(1)))
    assert said[0] == said[1] and "differ in a: process 0 has 1, process 1 has nothing" in said[0]


@pytest.mark.parametrize("failed", [0, 2])
@pytest.mark.parametrize(
    ("error", "heard"),
    [
        (
            UserError("sae.k must be at least 1, got 0\nand more"),
            "UserError: process {}: sae.k must be at least 1, got 0",
        ),
        (OSError("disk\x1b[2J"), "UserError: process {}: disk [2J"),
        (RuntimeError("a defect"), "UserError: process {}: RuntimeError: a defect"),
        (Stopped(signal.SIGUSR1), "Stopped: 10"),
    ],
)
def test_one_that_cannot_come_says_why_and_ends_all(at, failed, error, heard):
    others = [meets(at(i, 3)) for i in range(3) if i != failed]
    said = ends(lambda: rendezvous.give_up(at(failed, 3), error, 30), *others)
    assert said == ["", heard.format(failed), heard.format(failed)]


def test_who_is_missing_is_named_everywhere(at):
    said = ends(meets(at(0, 4), timeout=2), meets(at(2, 4)))
    assert said[0] == said[1] and "within mesh.timeout_seconds=2 (missing: 1, 3)" in said[0]
    assert (
        "process 0 does not answer (Connection refused) within mesh.timeout_seconds=1"
        in ends(meets(at(1), timeout=1))[0]
    )


def test_what_else_speaks_to_the_port_changes_nothing(at):
    def stranger() -> None:
        for line in (b"GET / HTTP/1.1\r\n\r\n", b'{"saejax": 1}\n', b'{"saejax": 1, "process": "x", "facts": {}}\n',
                     b'{"saejax": 1, "process": 1, "facts": {"a": []}}\n', b'{"saejax": 1, "failed": ["user", "x"]}\n',
                     b'{"saejax": 1, "process": 1, "failed": ["stopped", "9"]}\n', b"\x00" * 2000000):  # fmt: skip
            with contextlib.suppress(OSError):  # it is sent away
                while True:
                    with contextlib.suppress(ConnectionRefusedError):
                        with socket.create_connection(at(0).target, timeout=5) as connection:
                            connection.sendall(line)
                            connection.recv(10)
                        break
                    time.sleep(0.02)

    strange = threading.Thread(target=stranger, daemon=True)
    strange.start()

    def second() -> None:
        strange.join(10)
        meets(at(1), a="1")()

    assert ends(meets(at(0), a="1"), second) == ["", ""] and not strange.is_alive()


def test_one_that_is_killed_while_it_waits_is_waited_for_again(at):
    def killed_and_started_again() -> None:
        while True:
            with contextlib.suppress(OSError):
                with socket.create_connection(at(0).target, timeout=5) as connection:
                    connection.sendall(b'{"saejax": 1, "process": 1, "facts": {"mesh.num_processes": "3"}}\n')
                    time.sleep(0.3)
                break
        meets(at(1, 3))()
        time.sleep(0.3)

    late = lambda: (time.sleep(1), meets(at(2, 3))())  # noqa: E731
    assert ends(meets(at(0, 3)), killed_and_started_again, late) == [""] * 3


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_port_that_another_program_has_is_one_line(at, host):
    with socket.create_server((host, at(0).target[1])):
        said = ends(meets(at(0)))[0]
    assert f"mesh.coordinator={at(0).coordinator}: process 0 cannot listen" in said and "Address already in use" in said


def test_two_processes_of_one_number(at):
    said = ends(meets(at(0)), lambda: (time.sleep(0.5), meets(at(0))()))
    assert said[0] == said[1] and "two processes of this run are process 0" in said[0]
    said = ends(*(meets(at(i, 3)) for i in (0, 1, 1)))
    assert len(set(said)) == 1 and "two processes of this run are process 1" in said[0]
