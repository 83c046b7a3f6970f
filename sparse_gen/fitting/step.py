"""A whole step of a fit: forward, loss, backward, Adam, and what the stopping rule and the history need."""

from __future__ import annotations

import torch
from torch import nn

from sparse_gen.engine.checks import check_output
from sparse_gen.engine.compile import CompiledGenerator
from sparse_gen.fitting.optimiser import Optimiser
from sparse_gen.ops.philox import Stream, normal
from sparse_gen.ops.squared_errors import squared_errors


class FitStep:
    """Takes one step a call, and reads nothing back from the device: all that goes on from step to step is in place.

    Args:
        module, z, y, optimiser, seeds: of the fit.
        start: number of the first step.
        rule: a stopping rule with `advance`, or None.
        average, input_jitter, tv_weight, pixel_weight: as for `fit`.
        mean_output: the running average so far.
        keep_last: also keep the parameters as they were when the rule ended the fit, because the host will hear of it
            some steps later; `go_back` puts them in place.

    Attributes:
        step: () int64, the number of the next step.
        output, loss, variation: of the last step, (E, C, H, W), (E,) and (E,) or None.
        mean_output: the running average of the outputs; None without.
        first_bad: () int64, the first step whose loss was not finite, -1 while there is none.
    """

    def __init__(
        self,
        module: nn.Module,
        z: torch.Tensor,
        y: torch.Tensor,
        optimiser: Optimiser,
        seeds: torch.Tensor,
        *,
        start: int,
        rule=None,
        average: float | None = None,
        input_jitter: float = 0.0,
        tv_weight: float = 0.0,
        pixel_weight: torch.Tensor | None = None,
        mean_output: torch.Tensor | None = None,
        keep_last: bool = False,
    ):
        self._module, self._z, self._y, self._optimiser, self._seeds = module, z, y, optimiser, seeds
        self._rule, self._average, self._jitter, self._tv_weight = rule, average, input_jitter, tv_weight
        self._pixel_weight = pixel_weight
        self._other_z = {"changes": True} if isinstance(module, CompiledGenerator) else {}
        self.step = torch.tensor(start, device=z.device)
        self.first_bad = torch.tensor(-1, device=z.device)
        self.mean_output = mean_output
        self.output = self.loss = self.variation = None
        self._last = [p.detach().clone() for p in module.parameters()] if keep_last else None

    def __call__(self) -> None:
        output = self._module(self._jittered(), **self._other_z) if self._jitter else self._module(self._z)
        if self.output is None:
            check_output(output, self._y)
        if self._pixel_weight is None:
            loss = squared_errors(output, self._y)
        else:
            loss = weighted_errors(output, self._y, self._pixel_weight)
        variation = total_variation(output) if self._tv_weight else None
        total = loss if variation is None else loss + self._tv_weight * variation
        self._optimiser.step(total.sum(), self.step)
        with torch.no_grad():
            self._note(output.detach(), loss.detach(), None if variation is None else variation.detach())

    def _note(self, output: torch.Tensor, loss: torch.Tensor, variation: torch.Tensor | None) -> None:
        if self._average is not None:
            if self.mean_output is None:
                self.mean_output = output.clone()
            else:
                torch.lerp(output, self.mean_output, self._average, out=self.mean_output)
        bad = (self.first_bad < 0) & ~loss.isfinite().all()
        if self._last is not None:
            over = self._rule.ended(self.step.device)
            bad &= ~over
            for kept, parameter in zip(self._last, self._module.parameters(), strict=True):
                torch.where(over, kept, parameter.detach(), out=kept)
        self.first_bad.copy_(torch.where(bad, self.step, self.first_bad))
        if self._rule is not None:
            self._rule.advance(self.step, output)
        self.output, self.loss, self.variation = output, loss, variation
        self.step += 1

    @torch.no_grad()
    def go_back(self) -> None:
        """Give the module the parameters of the step at which the rule ended the fit."""
        for kept, parameter in zip(self._last, self._module.parameters(), strict=True):
            parameter.copy_(kept)

    def _jittered(self) -> torch.Tensor:
        z = self._z
        numbers = normal(self._seeds, self.step, Stream.JITTER, z[0].numel()).view(-1, *z.shape[1:])
        return z + self._jitter * numbers.to(z.dtype)


def weighted_errors(output: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(1/N) Σ w·(x − y)² of each image, (E,), from (E, C, H, W) and a weight that broadcasts to it."""
    return (weight * (output - y).square()).mean(dim=(1, 2, 3))


def total_variation(image: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of vertical plus that of horizontal neighbours: (E, C, H, W) to (E,)."""
    rows = (image[..., 1:, :] - image[..., :-1, :]).abs().mean(dim=(1, 2, 3))
    return rows + (image[..., 1:] - image[..., :-1]).abs().mean(dim=(1, 2, 3))
