"""The logits that a mask search learns, one a weight or one a group of weights."""

from __future__ import annotations

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
        temperature, prior, kl_weight, lr, betas, eps: as for `search_mask`.

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
        prior: float,
        kl_weight: float,
        lr: float,
        betas: tuple[float, float],
        eps: float,
    ):
        self.groups = None if group_name(group) == "weight" else Groups(layout, group)
        self._weight, self._seeds, self._temperature, self._prior = weight, seeds, temperature, prior
        self._constants = {"kl_weight": kl_weight, "lr": lr, "betas": betas, "eps": eps, "prior": prior}
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
        concrete_mask_update(
            self.values, self.exp_avg, self.exp_avg_sq, target, weight, gradient, self._seeds, step,
            temperature=self._temperature, **self._constants,
        )  # fmt: skip
        if self.groups is not None:
            self.groups.multiply(self._weight, target, masked_weight)

    def kl(self) -> torch.Tensor:
        """(E,), in nats, the sum over weights."""
        return kl_divergence(self.values, self._prior, self.sizes)

    def keep(self, values: torch.Tensor, count: int) -> torch.Tensor:
        """(E, N) bool: what is kept for logits `values`; whole groups, at most `count` weights.

        Raises:
            ValueError: not one group is as small as that.
        """
        if self.groups is None:
            return top_k(values, count, self._seeds)
        keep = self.groups.keep(values, count, self._seeds)
        if not keep.any(dim=1).all():
            raise ValueError(
                f"expected a density that keeps a group {self.groups.name}, got one that allows {count:,} weights, "
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
