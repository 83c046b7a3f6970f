"""A mask that keeps weights at random: what a search has to beat."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn

from sparse_gen.masks.mask import Mask
from sparse_gen.masks.pruning import Found, Pruning
from sparse_gen.masks.selection import kept_count, prunable_layout, top_k
from sparse_gen.ops.philox import Stream, seed_tensor, uniform


def random_mask(
    network: nn.Module,
    density: float,
    *,
    prunable: str | Iterable[str] | Callable[[str, nn.Parameter], bool] = "conv_weights",
    seed: int = 0,
) -> Mask:
    """Keep a given number of weights, drawn without replacement, all of the prunable ones equally likely.

    Args:
        network: any module.
        density: kept fraction of all parameters, those that are not prunable included.
        prunable: as for `search_mask`.
        seed: of the draw; it does not depend on the density, so a sparser mask is part of a denser one.

    Raises:
        ValueError: the density is out of range or too small to keep what is always kept.
    """
    layout = prunable_layout(network, prunable)
    parameters = dict(network.named_parameters())
    total = sum(parameter.numel() for parameter in parameters.values())
    count = kept_count(density, total, total - layout.numel)
    seeds = seed_tensor(seed)
    keep = top_k(uniform(seeds, 0, Stream.MASK, layout.numel), count, seeds)
    whole = {name: tuple(p.shape) for name, p in parameters.items() if name not in layout.shapes}
    return Mask(layout.views(keep[0]), whole=whole, recipe={"random": {"density": density, "seed": seed}})


def random_scores(problem: Pruning) -> Found:
    """Score every weight by a number drawn from U(0, 1): the mask of `random_mask`."""
    scores = uniform(problem.seed, 0, Stream.MASK, problem.layout.numel)[0].to(problem.weight.device)
    return Found(problem.choose(scores, problem.count), scores)
