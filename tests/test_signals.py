"""Signals: noted whatever the main thread is in the middle of, raised where that can be, and never lost."""

import gc
import importlib.machinery
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from saejax.errors import Stopped
from saejax.parallel import signals


@pytest.fixture(params=signals.SIGNALS, ids=lambda number: number.name)
def number(request):
    return request.param


def test_a_signal_stops_plain_work_at_once_and_handlers_come_back(number):
    before = signal.getsignal(number)
    with pytest.raises(Stopped) as stopped, signals.watch():
        assert signals.noted() is None
        os.kill(os.getpid(), number)
        time.sleep(20)
    assert stopped.value.signum == number and signal.getsignal(number) is before and signals.noted() is None


def test_a_signal_that_falls_into_a_callback_is_raised_all_the_same(number, capfd):
    """What JAX's hook of the garbage collector, a finaliser or a weak reference would swallow."""
    calls = []

    def callback(phase: str, info: dict) -> None:
        if not calls:
            calls.append(phase)
            os.kill(os.getpid(), number)

    try:
        with pytest.raises(Stopped) as stopped, signals.watch():
            gc.callbacks.append(callback)  # not before: other garbage may be collected at any time
            gc.collect()
            assert signals.noted() == number  # noted, but not raised yet
            time.sleep(20)
    finally:
        gc.callbacks.remove(callback)
    assert stopped.value.signum == number and calls
    assert "Exception ignored" not in capfd.readouterr().err


def test_a_signal_in_a_compiled_module_that_is_loaded_waits_for_its_end(number, monkeypatch):
    """pybind11 and nanobind make an ImportError of what is raised there, others a crash."""
    loaded = []

    def initialised(module: object) -> None:
        os.kill(os.getpid(), number)
        time.sleep(0.2)
        loaded.append(module)

    monkeypatch.setattr("_imp.exec_dynamic", initialised)
    with pytest.raises(Stopped) as stopped, signals.watch():
        importlib.machinery.ExtensionFileLoader("one", "one.so").exec_module(os)
        time.sleep(20)
    assert stopped.value.signum == number and loaded == [os]


def test_a_signal_that_something_swallowed_stops_at_the_next_boundary(number):
    with signals.watch():
        signals.check()
        try:
            os.kill(os.getpid(), number)
            time.sleep(20)
        except BaseException:  # as a careless library has it
            pass
        with pytest.raises(Stopped) as stopped:
            signals.check()
    assert stopped.value.signum == number


def test_held_work_stops_by_itself_and_inner_watches_change_nothing(number):
    with signals.watch():
        handler = signal.getsignal(number)
        with signals.hold(), signals.hold(), signals.watch():
            assert signal.getsignal(number) is handler
            os.kill(os.getpid(), number)
            assert signals.noted() == number
            signals.check()  # the work that holds asks `noted`
        with pytest.raises(Stopped):
            signals.check()


def test_signals_close_together_are_one_and_a_later_one_is_the_second(number, monkeypatch):
    """`timeout` signals its child and then the child's group; a launcher's own handler gets the second."""
    caught = []
    before = signal.signal(number, lambda signum, frame: caught.append(signum))
    try:
        with signals.hold():
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
            assert caught == [] and signals.outer(number) is not signal.getsignal(number)
            monkeypatch.setattr(signals, "SAME_SECONDS", 0.0)
            os.kill(os.getpid(), number)
            assert caught == [number]
            signals.pass_on(number)
            signals.pass_on(-128)
        os.kill(os.getpid(), number)
        assert caught == [number] * 3
    finally:
        signal.signal(number, before)


IN_C = """
import ctypes, os, sys, threading, time
from saejax.parallel import signals
signals._SILENT_SECONDS = 0.3
def later(number):
    for wait in (0.2, signals.SAME_SECONDS + 0.5):
        time.sleep(wait)
        os.kill(os.getpid(), number)
with signals.watch(ends_process=True):
    threading.Thread(target=later, args=(int(sys.argv[1]),), daemon=True).start()
    # A mutex that this thread holds: it stays in C for ever, and no handler of Python runs, as in a long compilation.
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""


def test_a_second_ctrl_c_interrupts_a_program_of_others_as_ever(monkeypatch):
    """Say a notebook in which `saejax.runs.run.train` runs: it must outlive it."""
    monkeypatch.setattr(signals, "SAME_SECONDS", 0.0)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt) as stopped, signals.hold():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(20)
        assert not isinstance(stopped.value, Stopped)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(sys.platform != "linux", reason="a mutex of zeros is glibc's")
def test_a_second_signal_ends_a_process_that_runs_no_python(number):
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", IN_C, str(int(number))], capture_output=True, text=True, timeout=60)
    assert done.returncode == 128 + number, done.stderr
    noted, ended = done.stderr.split("\n\n")
    assert f"{number.name} noted" in noted and f"second signal ({number.name})" in ended
    assert time.monotonic() - started < 30


def test_a_second_signal_ends_held_work_at_once():
    code = IN_C.split("with signals")[0] + "with signals.watch(ends_process=True), signals.hold():\n"
    code += " threading.Thread(target=later, args=(15,)).start()\n for _ in range(600): time.sleep(0.1)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert done.returncode == 128 + signal.SIGTERM and "second signal (SIGTERM)" in done.stderr


@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_forked_child_is_a_process_of_its_own():
    """A pool that ends its children by SIGTERM must not end the parent, whose pipe they have inherited."""
    with signals.watch():
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGTERM)  # the handler of before: it dies
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGTERM
        time.sleep(0.1)
        assert signals.noted() is None


def test_a_thread_leaves_signals_to_the_main_one():
    seen = []

    def work() -> None:
        before = signal.getsignal(signal.SIGTERM)
        with signals.watch(), signals.hold():
            seen.append(signal.getsignal(signal.SIGTERM) is before)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [True]


def test_several_processes_stop_where_all_do_and_pass_the_signal_on():
    """What happens between joined processes is tried with real ones; here only that nothing is raised on the way."""
    passed_on, asked = [], []
    before = signal.signal(signal.SIGTERM, lambda *_: passed_on.append(True))  # in the place of JAX's
    signals.share(lambda: asked.append(True) or (signal.SIGUSR1 if passed_on else None))
    try:
        with signals.watch():
            signals.check()
            os.kill(os.getpid(), signal.SIGUSR1)
            assert passed_on == [True] and signals.noted() == signal.SIGUSR1
            with signals.hold():
                signals.check()
            assert len(asked) == 1
            with pytest.raises(Stopped):
                signals.check()
    finally:
        signals.share(None)
        signal.signal(signal.SIGTERM, before)
