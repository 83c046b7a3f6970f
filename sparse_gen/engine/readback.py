"""Values of device tensors on their way to the host, without waiting for the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

Values = Mapping[str, torch.Tensor]


class Readback:
    """Hands values to the host: at once, or (`late`) when the next ones come.

    A read waits until the device has done all that was asked of it, and then the device waits for the host. Late values
    were copied behind the work that gave them, and by the time of the next ones they have arrived; the host is then at
    most that far ahead.
    """

    def __init__(self, late: bool):
        self._late = late
        self._waiting: tuple[Values, torch.cuda.Event | None, Callable[[Values], None]] | None = None

    def push(self, values: Values, then: Callable[[Values], None]) -> None:
        """Call `then` with the values as they are now; late ones are on the CPU."""
        if not self._late:
            then(values)
            return
        before, self._waiting = self._waiting, (*_on_their_way(values), then)
        _hand_over(before)

    def flush(self) -> None:
        """Hand over what is waiting."""
        before, self._waiting = self._waiting, None
        _hand_over(before)


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


def _on_their_way(values: Values) -> tuple[Values, torch.cuda.Event | None]:
    cuda = any(value.is_cuda for value in values.values())
    there = {
        name: torch.empty(value.shape, dtype=value.dtype, pin_memory=cuda).copy_(value.detach(), non_blocking=True)
        for name, value in values.items()
    }
    if not cuda:
        return there, None
    event = torch.cuda.Event()
    event.record()
    return there, event


def _hand_over(waiting) -> None:
    if waiting is None:
        return
    values, event, then = waiting
    if event is not None:
        event.synchronize()
    then(values)
