"""Signals are noted between two steps, and only the first one waits."""

import os
import signal

import pytest

from saejax.training import interrupt


@pytest.mark.parametrize("number", interrupt.SIGNALS)
def test_the_first_signal_is_noted_and_the_second_acts_at_once(number):
    caught = []
    before = signal.signal(number, lambda *_: caught.append("outer"))
    try:
        with interrupt.watch() as stop:
            assert not stop
            os.kill(os.getpid(), number)
            assert stop and stop.signum == number and caught == []
            os.kill(os.getpid(), number)
            assert caught == ["outer"]
        os.kill(os.getpid(), number)
        assert caught == ["outer"] * 2
    finally:
        signal.signal(number, before)
