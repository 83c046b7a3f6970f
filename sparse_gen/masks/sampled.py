"""A network whose prunable weights change at every step: what a mask search runs."""

from __future__ import annotations

from os import PathLike

import torch
from torch import nn

from sparse_gen.engine.checks import check_output
from sparse_gen.engine.compile import build_run
from sparse_gen.engine.functional import run_experiments
from sparse_gen.engine.layout import ParameterLayout
from sparse_gen.engine.plan import Plan
from sparse_gen.ops.squared_errors import squared_errors


class SampledNetwork:
    """A network as a function of its masked weights.

    Args:
        network: from `training_copy`.
        prunable, whole: its parameters, those that are masked and those that are not.
        kept_whole: (1 or E, …), the values of the latter.
        z: (1 or E, C, H, W).
        experiments: E.
        engine, plan: as for `compile`.

    Attributes:
        masked_weight: (E, N), to be written to between the steps.
        plan: what runs how.
    """

    def __init__(
        self,
        network: nn.Module,
        prunable: ParameterLayout,
        whole: ParameterLayout,
        kept_whole: torch.Tensor,
        z: torch.Tensor,
        experiments: int,
        engine: str,
        plan: Plan | str | PathLike[str] | None,
    ):
        # Prunable ones first: of one experiment they are then one piece of memory, and no step copies them.
        self._layout = ParameterLayout({**prunable.shapes, **whole.shapes})
        keep = torch.ones(1, self._layout.numel, dtype=torch.bool, device=z.device)
        self._run, self.plan = build_run(engine, network, self._layout, keep, z, plan, experiments)
        self._network = network
        # oneDNN and cuDNN convolve without reordering where the channels come last.
        plain = self._run is None
        self._z = z.contiguous(memory_format=torch.channels_last if plain else torch.contiguous_format)
        self._values = z.new_zeros(experiments, self._layout.numel)
        self._values[:, prunable.numel :] = kept_whole
        part = self._values[:, : prunable.numel]
        self.masked_weight = part if experiments == 1 else part.contiguous()
        self._checked = False

    def loss(self, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The mean squared error of each experiment, (E,), and its gradient by the masked weights, (E, N)."""
        pruned = self.masked_weight.shape[1]
        if len(self._values) > 1:
            self._values[:, :pruned] = self.masked_weight
        leaf = self._values.detach().requires_grad_()
        output = self._output(leaf)
        if not self._checked:
            check_output(output, y)
            self._checked = True
        loss = squared_errors(output, y)
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        return loss.detach(), gradient[:, :pruned].contiguous()

    def _output(self, values: torch.Tensor) -> torch.Tensor:
        if self._run is not None:
            return self._run(values, self._z)
        return run_experiments(self._network, self._layout.views(values), self._z)
