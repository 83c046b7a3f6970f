"""The logits that a mask search learns, one a weight or one a group of weights."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch

from sparse_gen.engine.layout import ParameterLayout
from sparse_gen.masks.groups import Group, Groups, group_name
from sparse_gen.masks.selection import top_k
from sparse_gen.ops.concrete_mask import concrete_mask, concrete_mask_update, kl_divergence


class Logits:
    """Logits, Adam's averages of their gradients, and the samples that are drawn of them.

    Args:
        layout: the prunable parameters, N entries.
        group: as for `Groups`; None and "weight" give every weight a logit of its own.
        weight: (N,) or (E, N), what is masked.
        seeds: (E,) int64.
        initial: where all logits start.
        prior: p0, or one an experiment.
        temperature, kl_weight, lr, betas, eps: as for `search_mask`.

    Attributes:
        values: (E, N) or, with groups, (E, G).
        groups: None where every weight has a logit of its own.

    Weights of a group share one soft mask s, so the gradient of a logit is the sum over its weights of
    ∂loss/∂(θ·s) · θ · s(1 - s)/τ, and the KL, which sums over weights, counts a group of n as n times. Adam gets both
    divided by n: it does not see the factor but for `eps`, which then means what it means for a single weight, and
    learning rate, λ and prior carry over from one group to another.
    """

    def __init__(
        self,
        layout: ParameterLayout,
        group: Group | None,
        weight: torch.Tensor,
        seeds: torch.Tensor,
        *,
        initial: float,
        temperature: float,
        prior: float | Sequence[float],
        kl_weight: float,
        lr: float,
        betas: tuple[float, float],
        eps: float,
    ):
        self.groups = None if group_name(group) == "weight" else Groups(layout, group)
        self._weight, self._seeds, self._temperature = weight, seeds, temperature
        self._constants = {"kl_weight": kl_weight, "lr": lr, "betas": betas, "eps": eps}
        self._priors = _runs([prior] * len(seeds) if isinstance(prior, (int, float)) else list(prior))
        count = layout.numel if self.groups is None else len(self.groups)
        self.values = torch.full((len(seeds), count), float(initial), dtype=weight.dtype, device=weight.device)
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(self.values), torch.zeros_like(self.values)
        if self.groups is not None:
            self._one = torch.ones_like(self.values[0])
            self._sizes = self.groups.sizes.to(weight.device)
            self._soft_mask = torch.empty_like(self.values)

    @property
    def sizes(self) -> torch.Tensor | None:
        """(G,) the weights of each group; None where every weight has a logit of its own."""
        return None if self.groups is None else self._sizes

    def sample(self, masked_weight: torch.Tensor) -> None:
        """Write the masked weights of step 0 to `masked_weight` (E, N)."""
        weight = self._weight if self.groups is None else self._one
        sampled = concrete_mask(self.values, weight, self._seeds, 0, temperature=self._temperature)[1]
        if self.groups is None:
            masked_weight.copy_(sampled)
        else:
            self.groups.multiply(self._weight, sampled, masked_weight)

    def update(self, masked_weight: torch.Tensor, gradient: torch.Tensor, step: torch.Tensor) -> None:
        """Learn from the gradient by the masked weights of `step`, (E, N), and write those of the next; () int64."""
        if self.groups is None:
            weight, target = self._weight, masked_weight
        else:
            gradient = self.groups.mean_product(gradient, self._weight)
            weight, target = self._one, self._soft_mask
        learned = (self.values, self.exp_avg, self.exp_avg_sq, target)
        for rows, prior in self._priors:  # the operator takes one prior
            concrete_mask_update(
                *(tensor[rows] for tensor in learned), weight if weight.ndim == 1 else weight[rows], gradient[rows],
                self._seeds[rows], step, temperature=self._temperature, prior=prior, **self._constants,
            )  # fmt: skip
        if self.groups is not None:
            self.groups.multiply(self._weight, target, masked_weight)

    def kl(self) -> torch.Tensor:
        """(E,), in nats, the sum over weights."""
        return torch.cat([kl_divergence(self.values[rows], prior, self.sizes) for rows, prior in self._priors])

    def keep(self, values: torch.Tensor, count: int | torch.Tensor) -> torch.Tensor:
        """(E, N) bool: what is kept for logits `values`; whole groups, at most `count` weights, or (E,) of each.

        Raises:
            ValueError: not one group is as small as that.
        """
        if self.groups is None:
            return top_k(values, count, self._seeds)
        keep = self.groups.keep(values, count, self._seeds)
        empty = ~keep.any(dim=1)
        if empty.any():
            allowed = int(count[empty].min()) if isinstance(count, torch.Tensor) else count
            raise ValueError(
                f"expected a density that keeps a group {self.groups.name}, got one that allows {allowed:,} weights, "
                f"where groups have up to {int(self.groups.sizes.max()):,}, raise it or take smaller groups"
            )
        return self.groups.expand(keep)

    def of_weights(self, values: torch.Tensor) -> torch.Tensor:
        """(E, N): the logit of each weight."""
        return values if self.groups is None else self.groups.expand(values)

    def state(self) -> dict[str, torch.Tensor]:
        return {"logits": self.values, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Take what `state` gave out of a checkpoint's tensors."""
        self.values, self.exp_avg, self.exp_avg_sq = (state.pop(name).to(self.values.device) for name in self.state())


def _runs(priors: list[float]) -> list[tuple[slice, float]]:
    """The experiments that follow each other with one prior."""
    runs = []
    for prior, group in groupby(enumerate(priors), key=lambda pair: pair[1]):
        places = [place for place, _ in group]
        runs.append((slice(places[0], places[-1] + 1), prior))
    return runs
