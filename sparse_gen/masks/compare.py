"""How alike two masks are, and how alike they would be by chance."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import torch

from sparse_gen.masks.mask import Mask


@dataclass(frozen=True)
class Overlap:
    """Two masks on one parameter, or on all.

    Attributes:
        name: the parameter's, or "total".
        total: its entries, those of several experiments together.
        first, second: how many of them each mask keeps.
        both: how many both keep.
        chance: how many both would keep on average if each kept as many as it does of each parameter, anywhere in it.
        deviation: the standard deviation of that number.
    """

    name: str
    total: int
    first: int
    second: int
    both: int
    chance: float
    deviation: float

    @property
    def overlap(self) -> float:
        """The part of the smaller kept set that is in the other; NaN where one is empty."""
        return _ratio(self.both, min(self.first, self.second))

    @property
    def jaccard(self) -> float:
        """Kept by both over kept by either; NaN where neither keeps anything."""
        return _ratio(self.both, self.first + self.second - self.both)

    @property
    def chance_jaccard(self) -> float:
        """The same for as many kept by both as chance gives."""
        return _ratio(self.chance, self.first + self.second - self.chance)

    @property
    def sigmas(self) -> float:
        """How many standard deviations the overlap is above chance; NaN where chance leaves no choice."""
        return _ratio(self.both - self.chance, self.deviation)


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes:
        layers: one `Overlap` for each parameter that one of the masks may prune.
        whole: names of the parameters that both keep whole; they are in no count.
        total: over all `layers`; its chance has the masks' layer densities as they are.
        anywhere: how many both would keep on average if only the numbers of all kept weights were given.
    """

    layers: list[Overlap]
    whole: list[str]
    total: Overlap
    anywhere: float


def compare(first: Mask, second: Mask) -> Comparison:
    """Count what two masks of one network both keep.

    Args:
        first, second: with as many experiments each, or one of them with one.

    Returns:
        `Comparison`. Chance is the hypergeometric distribution: n·(a/n)·(b/n) of n entries are kept by both.

    Raises:
        ValueError: they belong to networks of different shapes, which the message lists, or to different numbers of
            experiments.
    """
    shapes = [{layer.name: layer.shape for layer in mask.layers()} for mask in (first, second)]
    if shapes[0] != shapes[1]:
        name = next(n for n in [*shapes[0], *shapes[1]] if shapes[0].get(n) != shapes[1].get(n))
        got = [str(s.get(name, "no such parameter")) for s in shapes]
        raise ValueError(f"expected masks of one network, got {name} of {got[0]} in one and {got[1]} in the other")
    experiments = max(first.experiments, second.experiments)
    for mask in (first, second):
        if mask.experiments not in (1, experiments):
            raise ValueError(
                f"expected as many experiments in both masks (or 1), got {first.experiments} and {second.experiments}"
            )
    names = [name for name in shapes[0] if name in first.tensors or name in second.tensors]
    layers, anywhere, kept = [], 0.0, [torch.zeros(experiments).double() for _ in range(2)]
    for name in names:
        a, b = (_rows(mask, name, shapes[0][name], experiments) for mask in (first, second))
        layers.append(_overlap(name, a, b))
        kept = [k + rows.sum(dim=1) for k, rows in zip(kept, (a, b), strict=True)]
    size = sum(layer.total for layer in layers) // experiments
    anywhere = (kept[0] * kept[1] / size).sum().item()
    sums = [sum(getattr(layer, field) for layer in layers) for field in ("total", "first", "second", "both", "chance")]
    total = Overlap("total", *sums, deviation=sqrt(sum(layer.deviation**2 for layer in layers)))
    return Comparison(layers, [name for name in shapes[0] if name not in names], total, anywhere)


def _rows(mask: Mask, name: str, shape: tuple[int, ...], experiments: int) -> torch.Tensor:
    keep = mask.tensors.get(name)
    keep = torch.ones(1, *shape, dtype=torch.bool) if keep is None else keep.reshape(mask.experiments, *shape)
    return keep.expand(experiments, *shape).flatten(1)


def _overlap(name: str, a: torch.Tensor, b: torch.Tensor) -> Overlap:
    n = a.shape[1]
    first, second = a.sum(dim=1).double(), b.sum(dim=1).double()
    chance = first * second / n
    variance = chance * (n - first) * (n - second) / (n * max(n - 1, 1))
    counts = [int(value) for value in (a.numel(), first.sum(), second.sum(), (a & b).sum())]
    return Overlap(name, *counts, chance=chance.sum().item(), deviation=sqrt(variance.sum().item()))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")
