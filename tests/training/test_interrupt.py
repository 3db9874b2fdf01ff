"""Signals are noted between two steps, and only the first one waits."""

import os
import signal

import pytest

from saejax.parallel import signals
from saejax.training import interrupt


@pytest.mark.parametrize("number", signals.SIGNALS)
def test_the_first_signal_is_noted_and_the_second_acts_at_once(number, monkeypatch):
    monkeypatch.setattr(signals, "SAME_SECONDS", 0.0)
    caught = []
    before = signal.signal(number, lambda *_: caught.append("outer"))
    try:
        with interrupt.watch() as stop:
            assert not stop and not stop.due()
            os.kill(os.getpid(), number)
            assert stop and stop.due() and stop.signum == stop.agreed() == number and caught == []
            os.kill(os.getpid(), number)
            assert caught == ["outer"]
        os.kill(os.getpid(), number)
        assert caught == ["outer"] * 2
    finally:
        signal.signal(number, before)


def test_a_signal_from_before_the_loop_is_due_before_its_first_step():
    with signals.hold():
        os.kill(os.getpid(), signal.SIGUSR1)
        with interrupt.watch() as stop:
            assert stop.due() and stop.signum == signal.SIGUSR1
