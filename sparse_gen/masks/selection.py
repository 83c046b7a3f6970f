"""Which parameters may be pruned, and which weights of those are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import floor, isfinite

import torch
from torch import nn

from sparse_gen.engine.layout import ParameterLayout
from sparse_gen.ops.philox import Stream, uniform

PRUNABLE = ("conv_weights", "all")


def prunable_layout(
    network: nn.Module, prunable: str | Iterable[str] | Callable[[str, nn.Parameter], bool]
) -> ParameterLayout:
    """The parameters that may be pruned.

    Args:
        network: any module.
        prunable: "conv_weights" (every weight with kernel dimensions), "all", names, or a function of name and
            parameter that says yes.

    Raises:
        ValueError: the word or a name is unknown, or nothing is left to prune.
    """
    parameters = dict(network.named_parameters())
    if callable(prunable):
        names = [name for name, parameter in parameters.items() if prunable(name, parameter)]
    elif isinstance(prunable, str):
        if prunable not in PRUNABLE:
            raise ValueError(
                f"expected prunable as 'conv_weights', 'all', parameter names or a function, got {prunable!r}"
            )
        names = [name for name, parameter in parameters.items() if prunable == "all" or parameter.ndim == 4]
    else:
        names = list(prunable)
        unknown = [name for name in names if name not in parameters]
        if unknown:
            raise ValueError(f"expected parameter names of the network, got {unknown[0]!r}")
    if not names:
        raise ValueError("expected at least one prunable parameter, got none")
    return ParameterLayout.of(network, names)


def kept_count(density: float, total: int, always_kept: int) -> int:
    """How many prunable weights make ⌊density · total⌋ kept in all.

    Raises:
        ValueError: density is not in (0, 1], or too small to keep what must be kept.
    """
    if not isinstance(density, (int, float)) or not isfinite(density) or not 0 < density <= 1:
        raise ValueError(f"expected a density above 0 and at most 1, got {density!r}")
    count = floor(density * total) - always_kept
    if count < 1:
        raise ValueError(
            f"expected a density above {(always_kept + 1) / total:.4f}, since {always_kept:,} of {total:,} parameters "
            f"are always kept, got {density}, raise it or use prunable='all'"
        )
    return count


def top_k(scores: torch.Tensor, count: int, seed: torch.Tensor) -> torch.Tensor:
    """Keep the `count` largest scores of each experiment, ties broken at random by its seed.

    Args:
        scores: (E, N).
        count: how many of the N.
        seed: (E,) int64.

    Returns:
        (E, N) bool.
    """
    by_chance = uniform(seed, 0, Stream.TIES, scores.shape[1]).argsort(dim=1, stable=True)
    by_score = scores.gather(1, by_chance).argsort(dim=1, descending=True, stable=True)
    kept = by_chance.gather(1, by_score[:, :count])
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, kept, True)
