"""What every method of finding a mask starts from, and how scores become the weights that are kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil, prod

import torch
from torch import nn

from sparse_gen.engine.functional import run_experiments
from sparse_gen.engine.layout import ParameterLayout
from sparse_gen.history import History
from sparse_gen.ops.philox import Stream, uniform

SCOPES = ("global", "layer")

Progress = Callable[[int, int, dict[str, float]], None]


@dataclass(frozen=True)
class Pruning:
    """One experiment's problem: a network at its initialisation, and how much of it is to be kept.

    Attributes:
        original: the network, in training mode.
        network: its `training_copy`, for `run_experiments`.
        layout: the prunable parameters, N entries.
        weight: (N,) their initial values.
        whole: name → (1, *shape), the parameters that are always kept.
        z: (1, C, H, W).
        y: (1, C, H, W); (n, C, H, W) where one network is fitted to n images.
        count: how many of the N entries to keep.
        scope: "global" or "layer".
        floor: at least so many entries (an int) or this share (a float) of each layer.
        seed: (1,) int64.
    """

    original: nn.Module
    network: nn.Module
    layout: ParameterLayout
    weight: torch.Tensor
    whole: dict[str, torch.Tensor]
    z: torch.Tensor
    y: torch.Tensor
    count: int
    scope: str
    floor: int | float | None
    seed: torch.Tensor
    progress: Progress | None = None

    def output(self, weight: torch.Tensor) -> torch.Tensor:
        """The network's output with (N,) weights."""
        return run_experiments(self.network, self.layout.views(weight[None]) | self.whole, self.z)

    def loss(self, weight: torch.Tensor) -> torch.Tensor:
        """Mean squared error of the output to y, summed over its images."""
        return (self.output(weight) - self.y).square().mean(dim=(1, 2, 3)).sum()

    def gradient(self, create_graph: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """A leaf of the initial weights, and the loss's gradient there."""
        leaf = self.weight.clone().requires_grad_()
        return leaf, torch.autograd.grad(self.loss(leaf), leaf, create_graph=create_graph)[0]

    def choose(self, scores: torch.Tensor, count: int, within: torch.Tensor | None = None) -> torch.Tensor:
        """Keep the `count` largest scores, as scope and floor have it; ties by the seed.

        Args:
            scores: (N,).
            count: how many.
            within: (N,) bool, the entries that may be kept; all by default.

        Returns:
            (N,) bool.

        Raises:
            FloatingPointError: a score is not finite.
        """
        if not scores.isfinite().all():
            raise FloatingPointError("expected finite scores, got NaN or infinity: the network's output or loss is not")
        candidates = torch.ones_like(scores, dtype=torch.bool) if within is None else within
        return choose(scores, candidates, count, self.layout, self.scope, self.floor, self.seed)


@dataclass
class Found:
    """What a method gives: (N,) bool, the scores it chose by, and, where it trained, what it stored on the way."""

    keep: torch.Tensor
    scores: torch.Tensor
    weight: torch.Tensor | None = None
    whole: dict[str, torch.Tensor] | None = None
    history: History = field(default_factory=History)
    settings: dict = field(default_factory=dict)


def choose(
    scores: torch.Tensor,
    candidates: torch.Tensor,
    count: int,
    layout: ParameterLayout,
    scope: str,
    floor: int | float | None,
    seed: torch.Tensor,
) -> torch.Tensor:
    """(N,) bool: the `count` candidates with the largest scores, over all layers or in proportion to each."""
    sizes = [prod(shape) for shape in layout.shapes.values()]
    available = [int(piece.sum()) for piece in candidates.split(sizes)]
    least = floors(sizes, floor)
    if scope == "layer":
        quotas = shares(sizes, count, least)
    else:
        quotas = least
        if sum(quotas) > count:
            raise ValueError(
                f"expected a floor that {count:,} kept weights allow, got {floor!r}, which takes {sum(quotas):,} of "
                f"{len(sizes)} layers, lower it or raise the density"
            )
    order = _order(scores, candidates, seed)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device)
    keep = torch.zeros_like(candidates)
    for piece, ranks, quota, most in zip(keep.split(sizes), rank.split(sizes), quotas, available, strict=True):
        piece[ranks.argsort()[: min(quota, most)]] = True
    left = count - int(keep.sum())
    if left:
        # The best of what no quota has taken: all of it with one ranking, little or nothing with one a layer.
        rest = order[~keep[order] & candidates[order]]
        keep[rest[:left]] = True
    return keep


def floors(sizes: list[int], floor: int | float | None) -> list[int]:
    """How many entries of each layer are kept at least: an int counts them, a float is a share."""
    if floor is None:
        return [0] * len(sizes)
    if isinstance(floor, bool) or not isinstance(floor, (int, float)) or not floor > 0:
        raise ValueError(f"expected floor as a count of weights or a share of a layer in (0, 1), got {floor!r}")
    if isinstance(floor, float):
        if floor >= 1:
            raise ValueError(f"expected floor as a share of a layer in (0, 1), or an integer, got {floor!r}")
        return [ceil(floor * size) for size in sizes]
    return [min(floor, size) for size in sizes]


def shares(sizes: list[int], count: int, least: list[int]) -> list[int]:
    """`count` entries divided in proportion to the layers' sizes, none below its least, remainders to the largest."""
    if sum(least) > count:
        raise ValueError(
            f"expected a floor that {count:,} kept weights allow, got one that takes {sum(least):,}, lower it"
        )
    fixed: set[int] = set()
    while True:
        free = [i for i in range(len(sizes)) if i not in fixed]
        left = count - sum(least[i] for i in fixed)
        total = sum(sizes[i] for i in free)
        below = {i for i in free if left * sizes[i] < least[i] * total}
        if not below:
            break
        fixed |= below
    result = [least[i] if i in fixed else left * sizes[i] // total for i in range(len(sizes))]
    by_remainder = sorted(free, key=lambda i: -(left * sizes[i] % total))
    for i in by_remainder[: count - sum(result)]:
        result[i] += 1
    return result


def _order(scores: torch.Tensor, candidates: torch.Tensor, seed: torch.Tensor) -> torch.Tensor:
    """All entries, best first, those that are no candidates last; the same order among ties as `top_k`."""
    by_chance = uniform(seed, 0, Stream.TIES, len(scores))[0].argsort(stable=True)
    by_score = scores[by_chance].argsort(descending=True, stable=True)
    order = by_chance[by_score]
    return torch.cat([order[candidates[order]], order[~candidates[order]]])
