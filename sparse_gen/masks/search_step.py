"""A whole step of a mask search: the sampled network forward and backward, and the fused pass over the logits."""

from __future__ import annotations

import torch

from sparse_gen.masks.logits import Logits
from sparse_gen.masks.sampled import SampledNetwork


class SearchStep:
    """Takes one step a call, and reads nothing back from the device: all that goes on from step to step is in place.

    Args:
        sampled, logits, y: of the search.
        start: number of the first step.

    Attributes:
        step: () int64, the number of the next step.
        loss: of the last step, (E,).
        first_bad: () int64, the first step whose loss was not finite, -1 while there is none.
    """

    def __init__(self, sampled: SampledNetwork, logits: Logits, y: torch.Tensor, start: int):
        self._sampled, self._logits, self._y = sampled, logits, y
        self.step = torch.tensor(start, device=y.device)
        self.first_bad = torch.tensor(-1, device=y.device)
        self.loss: torch.Tensor | None = None

    def __call__(self) -> None:
        loss, gradient = self._sampled.loss(self._y)
        bad = (self.first_bad < 0) & ~loss.isfinite().all()
        self.first_bad.copy_(torch.where(bad, self.step, self.first_bad))
        self._logits.update(self._sampled.masked_weight, gradient, self.step)
        self.loss = loss
        self.step += 1
