"""Signals that end a process: a run first comes to a state that it can go on from."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

_ENDING = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
"""Ctrl-C, the request of an operating system or a scheduler, and a terminal that is closed."""

_Handler = Callable[[int, FrameType | None], None]


class Terminated(KeyboardInterrupt):
    """A signal other than Ctrl-C asked the process to end; whatever handles Ctrl-C handles it.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextlib.contextmanager
def raising() -> Iterator[None]:
    """Inside the block, a signal that would end the process raises :class:`Terminated`.

    Nothing changes in another thread than the main one, and for signals that are ignored
    (``nohup``) or have a handler already, as Ctrl-C does.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        raise Terminated(number)

    with _handling(handle, _is_default):
        yield


class StopRequest:
    """Inside the block, the first signal to end is only noted; a second one ends at once."""

    def __init__(self) -> None:
        self._number: int | None = None
        self._received = False
        self._block = contextlib.ExitStack()

    @property
    def requested(self) -> bool:
        """Whether the process is to end."""
        return self._number is not None

    def agree(self, greatest: Callable[[int], int]) -> bool:
        """Whether this process or another one of the same run is to end: the same to all of them.

        Args:
            greatest: gives the greatest of a number among all of them.
        """
        number = greatest(self._number or 0)
        self._number = number or self._number  # one that came meanwhile counts the next time
        return number > 0

    def __enter__(self) -> StopRequest:
        self._block.enter_context(_handling(self._handle, _is_obeyed))
        return self

    def __exit__(self, *error: object) -> None:
        self._block.close()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again, self._number, self._received = self._received, number, True
        if again:
            self.obey()

    def obey(self) -> None:
        """Do what the signal would have done outside of the block.

        Raises:
            KeyboardInterrupt: where it did not end the process.
        """
        assert self._number is not None
        self._block.close()
        signal.raise_signal(self._number)
        raise KeyboardInterrupt  # a handler of the program's own went on


@contextlib.contextmanager
def _handling(handle: _Handler, wanted: Callable[[Any], bool]) -> Iterator[None]:
    """Handle those ending signals whose present handler is ``wanted``; only the main thread can."""
    previous: dict[int, Any] = {}
    try:
        if threading.current_thread() is threading.main_thread():
            for number in _ENDING:
                found = signal.getsignal(number)
                if found is not None and wanted(found):
                    previous[number] = found
                    signal.signal(number, handle)
        yield
    finally:
        for number, found in previous.items():
            signal.signal(number, found)


def _is_default(handler: Any) -> bool:
    return handler is signal.SIG_DFL


def _is_obeyed(handler: Any) -> bool:
    return handler is not signal.SIG_IGN
