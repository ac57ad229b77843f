"""Signals that end a process: noted, raised, obeyed or left alone."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from qatc.machine.signals import StopRequest, Terminated, raising
from tests.conftest import run_until_killed


@pytest.fixture
def handled() -> Iterator[list[int]]:
    """The handlers are put back after the test; a program's own handler of SIGTERM notes here."""
    seen: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield seen
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_raising(number: int) -> None:
    with pytest.raises(Terminated) as raised, raising():
        signal.raise_signal(number)
    assert raised.value.number == number and str(raised.value) == signal.Signals(number).name
    assert isinstance(raised.value, KeyboardInterrupt)
    assert signal.getsignal(number) is signal.SIG_DFL


def test_raising_leaves_ctrl_c_and_other_handlers_alone(handled: list[int]) -> None:
    signal.signal(signal.SIGTERM, lambda number, frame: handled.append(number))
    with raising():
        signal.raise_signal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt) as raised, raising():
        signal.raise_signal(signal.SIGINT)
    assert handled == [signal.SIGTERM] and not isinstance(raised.value, Terminated)


def test_what_is_ignored_stays_ignored(handled: list[int]) -> None:
    """As ``nohup`` does with SIGHUP, and a shell with Ctrl-C of what runs in the background."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
        with raising(), StopRequest() as stop:
            signal.raise_signal(number)
        assert not stop.requested and signal.getsignal(number) is signal.SIG_IGN


def test_the_first_one_is_noted_and_obeyed_later(handled: list[int]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        with raising(), pytest.raises(KeyboardInterrupt) as raised, StopRequest() as stop:
            signal.raise_signal(number)
            assert stop.requested
            stop.obey()
        assert isinstance(raised.value, Terminated) == (number == signal.SIGTERM)


def test_a_second_one_ends_at_once(handled: list[int]) -> None:
    with raising(), pytest.raises(Terminated), StopRequest():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        pytest.fail("it went on")


def test_without_a_handler_the_process_ends_by_the_signal() -> None:
    def end() -> None:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            stop.obey()

    run_until_killed(end, by=signal.SIGTERM)


def test_a_handler_that_goes_on_does_not_lose_the_request(handled: list[int]) -> None:
    signal.signal(signal.SIGTERM, lambda number, frame: handled.append(number))
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert not handled
        stop.obey()
    assert handled == [signal.SIGTERM]


def test_another_thread_touches_no_handler() -> None:
    found: list[Any] = []

    def look() -> None:
        with raising(), StopRequest() as stop:
            found.append((signal.getsignal(signal.SIGTERM), stop.requested))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [(signal.SIG_DFL, False)]
