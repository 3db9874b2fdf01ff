"""Several processes as one run: how they start, agree and leave. `clusters` tells each its number.

The engine is `jax.distributed`: process 0 is the coordinator. It hears from every other process, and ends all of them
when one falls silent. Nothing here touches it unless `mesh.distributed` asks.

Processes agree through `gather`, which needs no device, on everything that must not differ: which checkpoint to read,
where the run lies, whether a save failed. `together` decides how a process leaves. Processes that end well wait for
one another. One that fails alone does not wait, because the others hang in a collective until it is gone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import re
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from saejax.errors import DONE, FAILED, LOST, MISTAKE, Stopped, UserError
from saejax.parallel import rendezvous, signals
from saejax.parallel.clusters import Distributed, Place, place

__all__ = [
    "Distributed", "Ending", "Place", "agree", "alike", "first", "gather", "give_up", "introduce", "place", "several",
    "start", "stop_here", "stopped_by", "together", "told",
]  # fmt: skip


_command: Callable[[], Mapping[str, str]] = dict
_settled = False  # whether the others know what this process does


def introduce(facts: Callable[[], Mapping[str, str]]) -> None:
    """Describes what this process is about to do; all processes of a run must agree on it before they join.

    Args:
      facts: asked for them where there are others.
    """
    global _command, _settled
    _command, _settled = facts, False


def start(at: Place | None, *, timeout_seconds: int, dead_after_seconds: int) -> None:
    """Join the other processes; once in the life of a process, before any array or device is asked for.

    To ask for a device afterwards waits for all others to do so: `agree` comes first.

    Args:
      at: from `place`; None, or a place among one, starts nothing.
      timeout_seconds: how long to wait for all of them.
      dead_after_seconds: silence after which a process counts as dead, and all others end.

    Raises:
      UserError: process 0 cannot listen at its address; in all of them alike: not all have come, they differ in what
        they are about to do, or one of them has failed.
    """
    import jax

    if at is None or at.n_processes == 1 or jax.distributed.is_initialized():
        return
    signals.check()
    if (address := at.address) is not None:
        _meet(address, timeout_seconds)
    # They are all there. Should JAX not join them all the same, it would abort this process; that is one line, too.
    waiting = threading.Timer(timeout_seconds, _not_together, (at, timeout_seconds))
    waiting.daemon = True
    waiting.start()
    given: dict[str, Any] = {} if at.how is Distributed.tpu else {"cluster_detection_method": "deactivate"}
    signals.share(lambda: stopped_by() if stop_here() else None)
    try:
        jax.distributed.initialize(
            *(at.coordinator, at.n_processes, at.process_id, at.local_devices),
            initialization_timeout=timeout_seconds + 60,
            heartbeat_timeout_seconds=dead_after_seconds,
            shutdown_timeout_seconds=dead_after_seconds,
            **given,
        )
    except (RuntimeError, ValueError) as error:
        signals.share(None)
        reason = str(error).splitlines()[0]
        where = f" at mesh.coordinator={at.coordinator}" if at.coordinator else ""
        raise UserError(f"mesh.distributed={at.how.name} could not start{where}: {reason}") from error
    finally:
        waiting.cancel()
    if signals.noted() is not None:  # before JAX was there to hear of it
        os.kill(os.getpid(), signal.SIGTERM)
    if address is None:
        agree(_command())


def _meet(address: rendezvous.Address, timeout_seconds: int) -> None:
    global _settled
    try:
        rendezvous.meet(address, _command(), timeout_seconds)
    except UserError:
        _settled = True  # all have heard it
        raise
    except Stopped:
        _settled = signals.noted() is None  # another one was stopped
        raise
    _settled = True


def give_up(at: Place | None, error: BaseException) -> None:
    """Tell those who wait for this process that it does not come, and why: they end at once, with that line.

    Args:
      at: where it would have joined them; None where it is alone.
      error: what ended it.
    """
    address = None if at is None else at.address
    if address is not None and address.n_processes > 1 and not _settled and not several():
        rendezvous.give_up(address, error, _WORD_SECONDS)


def _not_together(at: Place, seconds: int) -> None:
    """Tell why the processes did not come together, and end this one."""
    why = f"not all of {at.n_processes} processes have come"
    if at.coordinator is not None and at.process_id != 0:
        host, _, port = at.coordinator.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except OSError as error:
            why = f"process 0 does not answer ({error.strerror or error})"
    where = f" at mesh.coordinator={at.coordinator}" if at.coordinator else ""
    text = f"saejax: mesh.distributed={at.how.name}{where}: {why} within mesh.timeout_seconds={seconds}"
    os.write(2, f"{text}\n".encode())
    os._exit(MISTAKE)


def several() -> bool:
    """Whether this process has company. Touches no device, and does not import JAX."""
    return "jax" in sys.modules and _joined().client is not None and _joined().num_processes > 1


def first() -> bool:
    """Whether this process logs and writes the files that are written once."""
    return not several() or _joined().process_id == 0


_numbers = itertools.count()
_agreements = itertools.count()
_DAY_MS = 86_400_000
_WORD_SECONDS = 30  # others may still be importing what this one failed in


def gather(value: str) -> list[str]:
    """The values of all processes, in their order. All must call it, in the same order; one alone gets its own.

    It waits for the slowest, for example one that still writes its part of a checkpoint. The silence of a dead process
    ends this one (`mesh.dead_after_seconds`).
    """
    if not several():
        return [value]
    here, key = _joined(), f"saejax/{next(_numbers)}"
    here.client.key_value_set(f"{key}/{here.process_id}", f"={value}")
    return [here.client.blocking_key_value_get(f"{key}/{i}", _DAY_MS)[1:] for i in range(here.num_processes)]


def agree(facts: Mapping[str, str]) -> None:
    """End all processes if they differ, before they wait in vain or mix their results.

    Args:
      facts: of this process: name of a field -> value. All call it at the same place.

    Raises:
      UserError: the same in all of them: the first field in which some differ, and its values.
    """
    if not several():
        return
    here, key = _joined(), f"saejax/agree/{next(_agreements)}"
    if here.process_id == 0:
        here.client.key_value_set(f"{key}/all", json.dumps(dict(facts)))
    wanted: dict[str, str] = json.loads(here.client.blocking_key_value_get(f"{key}/all", _DAY_MS))
    names = [name for name in {**wanted, **facts} if facts.get(name) != wanted.get(name)]
    # Only what differs is sent to all: a config of some kilobytes from each to each of a thousand would be gigabytes.
    here.client.key_value_set(f"{key}/{here.process_id}", json.dumps({name: facts.get(name) for name in names[:8]}))
    heard = (here.client.blocking_key_value_get(f"{key}/{i}", _DAY_MS) for i in range(here.num_processes))
    differing = {number: found for number, text in enumerate(heard) if (found := json.loads(text))}
    if differing:
        told = {name for found in differing.values() for name in found}
        order = [name for name in {**wanted, **dict.fromkeys(sorted(told))} if name in told]
        table = {i: wanted | differing.get(i, {}) for i in range(here.num_processes)}
        raise UserError(rendezvous.differences({i: {n: have.get(n) for n in order} for i, have in table.items()}))


@contextlib.contextmanager
def alike() -> Iterator[None]:
    """Turns an error in one process into an error in all, so that they continue alike.

    Raises:
      UserError, RuntimeError: what another process met, where this one met nothing.
    """
    met: Exception | None = None
    try:
        yield
    except Exception as error:
        met = error
    kind = " " if met is None else "u" if isinstance(met, UserError) else "e"
    heard = gather(kind + (str(met or "").splitlines() or [""])[0])
    if met is not None:
        raise met
    for number, (kind, what) in enumerate((text[0], text[1:]) for text in heard):
        if kind != " ":
            raise UserError(what) if kind == "u" else RuntimeError(f"process {number}: {what}")


_places = itertools.count(1)
_stopped = False  # whether all have stopped at one of these places


def stop_here() -> bool:
    """Whether all processes stop at this place, because one of them was told to by SIGTERM.

    JAX's preemption service notices the signal, finds the furthest place that any process has reached and names the
    one after it. To ask costs a microsecond; all processes ask at the same places, in the same order.
    """
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(next(_places))


def stopped_by() -> int:
    """The signal that stopped all processes, alike in all of them; each asks once, where it stopped."""
    global _stopped
    heard = gather(str(signals.noted() or 0))
    _stopped = True
    return max(map(int, heard)) or signal.SIGTERM


@dataclasses.dataclass
class Ending:
    """How the work of a process ends: whoever does the work sets the exit status."""

    status: int = FAILED


@contextlib.contextmanager
def together() -> Iterator[Ending]:
    """The work of a command; afterwards the other processes, if it has joined any, are left as its end demands.

    Those that end well, or fail alike, meet once more. One that fails alone says why and is gone at once.
    """
    end = Ending()
    try:
        yield end
    except BaseException as error:
        if not several():
            raise
        end.status = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else told(error)
    if several():
        _part(end.status)


_PEER_LOST = re.compile(r"gloo|nccl|connection (reset|closed)|coordination ?service|heartbeat|barrier timed out", re.I)


def told(error: BaseException) -> int:
    """Say what ended one of several processes; returns its exit status."""
    if isinstance(error, UserError) or not _PEER_LOST.search(str(error)):
        traceback.print_exception(error)
        return FAILED
    first = str(error).splitlines()[0][:200]
    print(f"saejax: another process of this run is gone, its own output says why ({first})", file=sys.stderr)
    return LOST


def _part(status: int) -> None:
    well = status == DONE or _stopped
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    try:
        # Process 0 may still be writing a report; of those that fail, none will come when it is the only one.
        _joined().client.wait_at_barrier(f"saejax/{'well' if well else 'failed'}", _DAY_MS if well else 5000)
    except Exception:
        os._exit(status or FAILED)
    import jax

    jax.distributed.shutdown()
    signals.share(None)


def _joined() -> Any:
    """State of `jax.distributed`: `client`, `process_id`, `num_processes`; JAX has no public name for it."""
    from jax._src import distributed

    return distributed.global_state
