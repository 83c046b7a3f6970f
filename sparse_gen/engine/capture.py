"""A loop's step, run again and again: as one CUDA graph on a GPU, call by call elsewhere.

A step launches hundreds of small kernels, and on a GPU their launches take longer than their work. So the body of a
step is a function of tensors that stay where they are, its number among them, and reads nothing back: it can be
captured once and replayed. `SPARSE_GEN_CAPTURE=0` in the environment turns that off, for debugging.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Protocol

import torch

from sparse_gen.engine.branches import parallel_branches, side_streams

Body = Callable[[], None]

# Steps that run call by call before one is captured: libraries choose their kernels, Triton compiles, and buffers that
# a body makes at its first call come into being. They count like all others.
WARM_UP = 3


class Capturer(Protocol):
    """What turns a body into something to replay."""

    def warm_up(self, body: Body) -> None:
        """Run the body, call by call, where it will be captured."""

    def capture(self, body: Body) -> Body:
        """What does the body's work on the same tensors, without its Python; nothing is computed yet."""


class CudaGraphs:
    """Captures into a CUDA graph, on a stream of its own."""

    def __init__(self, device: torch.device):
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._branches = side_streams(device)

    def warm_up(self, body: Body) -> None:
        # On the stream of the capture, since autograd remembers where a parameter's gradient was first added up.
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream), parallel_branches(self._branches):
            body()
        current.wait_stream(self._stream)

    def capture(self, body: Body) -> Body:
        current = torch.cuda.current_stream(self._device)
        graph = torch.cuda.CUDAGraph()
        try:
            # A sweep's worker has a second thread; what that one does is no concern of the capture.
            capturing = torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local")
            with capturing, parallel_branches(self._branches):
                body()
        except BaseException:
            # Where ending the capture fails as well, torch leaves its stream the current one.
            torch.cuda.set_stream(current)
            raise
        return graph.replay


def capturer(device: torch.device) -> Capturer | None:
    """What captures steps on a device; None where they run call by call."""
    if device.type != "cuda" or os.environ.get("SPARSE_GEN_CAPTURE") == "0":
        return None
    return CudaGraphs(device)


class StepRunner:
    """Runs a body once a call.

    Args:
        body: changes tensors in place, reads none of them back, and does the same whenever it is called. What it gives
            it leaves in attributes, whose tensors the next call may overwrite.
        capturer: from `capturer`; None runs it call by call.

    Warns:
        RuntimeWarning: the body cannot be captured; it then runs call by call, with the same results.
    """

    def __init__(self, body: Body, capturer: Capturer | None):
        self._body, self._capturer = body, capturer
        self._replay: Body | None = None
        self._warmed_up = 0

    def __call__(self) -> None:
        if self._replay is not None:
            self._replay()
        elif self._capturer is None:
            self._body()
        elif self._warmed_up < WARM_UP:
            self._capturer.warm_up(self._body)
            self._warmed_up += 1
        else:
            self._capture()

    def _capture(self) -> None:
        try:
            replay = self._capturer.capture(self._body)
        except Exception as error:
            reason = " ".join(str(error).split("\n")[0].split()).rstrip(".")
            self._capturer = None
            warnings.warn(
                f"steps run call by call, as this one cannot be captured into a CUDA graph ({type(error).__name__}: "
                f"{reason})",
                RuntimeWarning,
                stacklevel=4,
            )
            self._body()
            return
        self._replay = replay
        replay()
