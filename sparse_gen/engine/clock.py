"""Time on a device: on a GPU, work is only queued when a call returns, so that its own clock has to be read."""

from __future__ import annotations

import time

import torch

# About 2 ms at an H100's clock: what is then queued waits, and runs without the gaps of Python between two launches, as
# it does in a captured step.
_WAIT_CYCLES = 4_000_000


class Clock:
    """The host's clock, which is the CPU's."""

    def start(self) -> None:
        """Call before a measurement."""

    def mark(self) -> float | torch.cuda.Event:
        """A moment; cheap, and may be marked in the midst of what is measured."""
        return time.perf_counter()

    def seconds(self, first, last) -> float:
        """From one moment to another; waits until the second has come."""
        return last - first


class CudaClock(Clock):
    """Events in the current stream of the current device."""

    def start(self) -> None:
        torch.cuda.synchronize()
        torch.cuda._sleep(_WAIT_CYCLES)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, first, last) -> float:
        last.synchronize()
        return first.elapsed_time(last) / 1e3


def clock(device: torch.device) -> Clock:
    """That of a device."""
    return CudaClock() if device.type == "cuda" else Clock()
