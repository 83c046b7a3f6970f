"""Fitting a generator to one image (or to one an experiment)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from sparse_gen.engine.checks import check_count, check_image, check_input, check_output, check_positive
from sparse_gen.engine.compile import CompiledGenerator
from sparse_gen.fitting.metrics import psnr
from sparse_gen.history import History
from sparse_gen.ops.philox import Stream, normal, seed_tensor

Progress = Callable[[int, int, dict[str, float]], None]


class Stop(Protocol):
    """A stopping rule that needs no clean image."""

    def update(self, step: int, image: torch.Tensor) -> bool:
        """Take the output of a step, (E, C, H, W), and say whether to stop."""

    @property
    def image(self) -> torch.Tensor:
        """The output that the rule selects."""


@dataclass
class FitResult:
    """What a fit gave.

    Attributes:
        image: the output after the last step, or the one that the stopping rule selected; (E, C, H, W).
        history: columns "loss", and "psnr" where a clean image was given.
        stopped_at: the number of steps after which the rule stopped the fit, None if it ran to its end.
        module: the module that was trained.
    """

    image: torch.Tensor
    history: History
    stopped_at: int | None
    module: nn.Module


def fit(
    module: nn.Module,
    z: torch.Tensor,
    y: torch.Tensor,
    *,
    steps: int = 1500,
    lr: float = 1e-2,
    clean: torch.Tensor | None = None,
    stop: Stop | None = None,
    input_jitter: float = 0.0,
    seed: int = 0,
    every: int = 10,
    progress: Progress | None = None,
) -> FitResult:
    """Train a generator's parameters with Adam until its output fits y.

    Args:
        module: what `sg.compile` returned, or any module; it is trained in place.
        z: its input, (E, C, H, W); a plain module takes one experiment.
        y: the measurement, (E, C, H, W) in [0, 1].
        steps: how many at most.
        lr: Adam's learning rate; the papers take 1e-2 for masked networks and 1e-3 for whole ones.
        clean: the clean image, for the PSNR in the history only.
        stop: a stopping rule, asked after every step.
        input_jitter: standard deviation of fresh Gaussian noise added to z at every step, 0 for none.
        seed: of the jitter.
        every: record the history (and report progress) every so many steps.
        progress: called with (step, steps, latest values).

    Returns:
        `FitResult`. The loss at step t is that of the output before the t-th update.

    Raises:
        ValueError: an argument is out of range, or shapes do not fit.
        FloatingPointError: the loss is not finite; the message names the step.

    Ulyanov et al., "Deep image prior" (CVPR 2018), eq. 2; Ghosh et al., ICML 2024, section 3.2.
    """
    check_input(z)
    check_image(y, z)
    if clean is not None:
        check_image(clean, z, "clean")
    check_count(steps, "steps")
    check_count(every, "every")
    check_positive(lr, "lr")
    if not isinstance(module, CompiledGenerator) and max(len(z), len(y)) > 1:
        raise ValueError(
            "expected one experiment for a plain module, whose normalisation would mix them, got "
            f"{max(len(z), len(y))}, use sg.compile(module, example_input=z)"
        )
    z = z.contiguous(memory_format=torch.channels_last)  # oneDNN and cuDNN then convolve without reordering
    seeds = seed_tensor(seed, z.device)
    optimiser = torch.optim.Adam(module.parameters(), lr=lr, fused=True)
    history, stopped_at = History(), None

    for step in range(steps):
        output = module(_jittered(z, input_jitter, seeds, step) if input_jitter else z)
        if step == 0:
            check_output(output, y)
        loss = (output - y).square().mean(dim=(1, 2, 3))
        optimiser.zero_grad(set_to_none=True)
        loss.sum().backward()
        optimiser.step()
        if step % every == 0 or step == steps - 1:
            _record(history, step, output, loss, clean)
            if not loss.isfinite().all():
                raise FloatingPointError(f"the fit's loss is {loss.tolist()} at step {step}, lower lr ({lr})")
            if progress is not None:
                progress(step + 1, steps, history.last())
        if stop is not None and stop.update(step, output.detach()):
            stopped_at = step + 1
            break

    with torch.no_grad():
        image = module(z) if stop is None else stop.image
    return FitResult(image, history, stopped_at, module)


def _jittered(z: torch.Tensor, deviation: float, seeds: torch.Tensor, step: int) -> torch.Tensor:
    numbers = normal(seeds, step, Stream.JITTER, z[0].numel()).view(-1, *z.shape[1:])
    return z + deviation * numbers.to(z.dtype)


def _record(history: History, step: int, output, loss, clean) -> None:
    values = {"loss": loss}
    if clean is not None:
        values["psnr"] = psnr(output.detach(), clean)
    history.record(step, **values)
