"""Values of device tensors on their way to the host, without waiting for the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod

import torch

from sparse_gen.engine.branches import CudaStreams, Streams

Values = Mapping[str, torch.Tensor]


class Readback:
    """Hands values to the host: at once, or (`late`) when the next ones come.

    A read waits until the device has done all that was asked of it, and then the device waits for the host. Late values
    are put together behind the work that gave them and copied on a stream beside it, so that no step waits for the
    copy; by the time of the next values they have arrived, and the host is at most that far ahead.

    Args:
        late: whether to wait for the next ones.
        streams: of the device; made at the first values of a GPU by default.
    """

    def __init__(self, late: bool, streams: Streams | None = None):
        self._late, self._streams = late, streams
        self._waiting: Callable[[], None] | None = None

    def push(self, values: Values, then: Callable[[Values], None]) -> None:
        """Call `then` with the values as they are now; late ones are on the CPU."""
        if not self._late:
            then(values)
            return
        before, self._waiting = self._waiting, self._on_their_way(values, then)
        if before is not None:
            before()

    def flush(self) -> None:
        """Hand over what is waiting."""
        before, self._waiting = self._waiting, None
        if before is not None:
            before()

    def _on_their_way(self, values: Values, then: Callable[[Values], None]) -> Callable[[], None]:
        """What waits for the values and hands them over."""
        described = {name: (value.shape, value.dtype) for name, value in values.items()}
        packed = _packed(values)
        if self._streams is None and packed.is_cuda:
            self._streams = CudaStreams(packed.device)
        if self._streams is None:
            return lambda: then(_unpacked(packed, described))
        host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=packed.is_cuda)
        start = self._streams.record()
        with self._streams.beside():
            self._streams.wait(start)
            host.copy_(packed, non_blocking=True)
            arrived = self._streams.record()

        def hand_over(_held: torch.Tensor = packed) -> None:  # until it has been read
            arrived.synchronize()
            then(_unpacked(host, described))

        return hand_over


def reporter(
    step: int, steps: int, lr: float, progress: Callable[[int, int, dict[str, float]], None] | None, kept: str = ""
) -> Callable[[Values], None]:
    """What is done with the row of a step once the host has it; the first step that was not finite goes by "".

    Args:
        step, steps: the row's, from 0 on, and how many there are.
        lr: what the error advises to lower.
        progress: called with the steps done, `steps`, and the means of the values.
        kept: what the error says at its end.

    Raises (when called):
        FloatingPointError: a loss was not finite.
    """

    def report(values: Values) -> None:
        if values[""] >= 0:
            raise FloatingPointError(
                f"expected a finite loss, got none at step {int(values[''])}, lower lr ({lr}){kept}"
            )
        if progress is not None:
            progress(step + 1, steps, {name: value.mean().item() for name, value in values.items() if name})

    return report


def _packed(values: Values) -> torch.Tensor:
    """All bytes in memory of their own, the widest numbers first, by one kernel."""
    widest_first = sorted(values.values(), key=torch.Tensor.element_size, reverse=True)
    return torch.cat([value.detach().reshape(-1).view(torch.uint8) for value in widest_first])


def _unpacked(host: torch.Tensor, values: dict[str, tuple[torch.Size, torch.dtype]]) -> Values:
    sizes = {name: prod(shape) * dtype.itemsize for name, (shape, dtype) in values.items()}
    order = sorted(values, key=lambda name: values[name][1].itemsize, reverse=True)
    pieces = dict(zip(order, host.split([sizes[name] for name in order]), strict=True))
    return {name: pieces[name].view(dtype).view(shape) for name, (shape, dtype) in values.items()}
