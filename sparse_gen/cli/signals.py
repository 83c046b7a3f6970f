"""What Ctrl-C and SIGTERM do to a long run: the first asks it to store where it is, the second ends it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A run was ended by a signal; `code` is the exit code that says which."""

    def __init__(self, code: int, message: str = "interrupted"):
        super().__init__(message)
        self.code = code


class Received:
    """The first signal that came, None before."""

    signal: int | None = None

    @property
    def code(self) -> int:
        """The exit code by which shells tell this signal."""
        return 128 + (self.signal or signal.SIGINT)


@contextmanager
def stop_on_signal(request_stop: Callable[[], None]) -> Iterator[Received]:
    """Call `request_stop` at the first SIGINT or SIGTERM inside the block; a second raises `Interrupted`.

    Handlers are put back at the end. In a thread other than the main one nothing is changed: Python handles signals
    in the main thread only.
    """
    received = Received()
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if received.signal is not None:
            raise Interrupted(128 + number)
        received.signal = number
        request_stop()

    before = {number: signal.signal(number, handle) for number in _SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            # None: whoever set it was not Python, and cannot be asked to again.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
