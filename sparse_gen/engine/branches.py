"""Work of a step that runs beside what follows it: on a GPU, on a second stream, forked off and joined by events.

The gradient of a convolution's weight is read by nobody before the step's end, while all that follows waits for that of
its input; in a captured graph the two are branches that run at the same time. What a branch reads is held until the
main stream has waited for it: memory that is given back sooner may be taken for something else while it is read.
`SPARSE_GEN_BRANCHES=0` in the environment leaves everything on one stream, for measurements.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, TypeVar

import torch

# Pieces of work that are not waited for: each holds the memory that it reads.
AHEAD = 3

Result = TypeVar("Result")


class Streams(Protocol):
    """A main stream, the current one, and one beside it."""

    def record(self) -> Any:
        """An event behind the work of the current stream so far."""

    def wait(self, event: Any) -> None:
        """What follows on the current stream begins behind the event."""

    def beside(self) -> AbstractContextManager:
        """Within it the side stream is the current one."""


class CudaStreams:
    def __init__(self, device: torch.device):
        self._device, self._side = device, torch.cuda.Stream(device)

    def record(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def wait(self, event: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self._device).wait_event(event)

    def beside(self) -> AbstractContextManager:
        return torch.cuda.stream(self._side)


class Branch:
    """Pieces of work on the side stream, one after the other."""

    def __init__(self, streams: Streams):
        self._streams = streams
        self._running: deque[tuple[Any, Any]] = deque()

    def run(self, work: Callable[[], Result], reads: Any) -> Result:
        """Do the work beside what follows; nobody may read the result before `join`.

        Args:
            reads: what it reads, which must stay as it is until `join`.
        """
        start = self._streams.record()
        with self._streams.beside():
            self._streams.wait(start)
            result = work()
            self._running.append((self._streams.record(), reads))
        if len(self._running) > AHEAD:
            self._await_first()
        return result

    def join(self) -> None:
        """What follows begins behind all of the work."""
        while self._running:
            self._await_first()

    def _await_first(self) -> None:
        self._streams.wait(self._running[0][0])
        self._running.popleft()  # only now: what it read goes


_active = threading.local()


@contextmanager
def parallel_branches(streams: Streams | None) -> Iterator[None]:
    """Within it `branching` gives these streams, in this thread."""
    before, _active.streams = branching(), streams
    try:
        yield
    finally:
        _active.streams = before


def branching() -> Streams | None:
    """The streams that a step which begins now may use; None for the current one alone."""
    return getattr(_active, "streams", None)


def side_streams(device: torch.device) -> Streams | None:
    """For `parallel_branches`, unless they are turned off."""
    return None if os.environ.get("SPARSE_GEN_BRANCHES") == "0" else CudaStreams(device)
