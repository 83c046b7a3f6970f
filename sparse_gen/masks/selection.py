"""Which parameters may be pruned, and which weights of those are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import floor, isfinite
from typing import Any

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


def densities_of(density: float | Sequence[float], experiments: int) -> list[float]:
    """One density an experiment; where there is one experiment, several densities make as many.

    Raises:
        ValueError: there are not as many densities as experiments.
    """
    given = list(density) if isinstance(density, (list, tuple)) else [density]
    if len(given) == 1:
        return given * experiments
    if not given or experiments not in (1, len(given)):
        raise ValueError(
            f"expected one density or one an experiment, got {len(given)} densities for {experiments} experiments, "
            f"give one{f' or {experiments}' if experiments > 1 else ''}"
        )
    return given


def one_or_all(numbers: list) -> Any:
    """The number that all experiments have, or the list where they differ."""
    return numbers if len(set(numbers)) > 1 else numbers[0]


def top_k(scores: torch.Tensor, count: int | torch.Tensor, seed: torch.Tensor) -> torch.Tensor:
    """Keep the `count` largest scores of each experiment, ties broken at random by its seed.

    Args:
        scores: (E, N).
        count: how many of the N, or one an experiment, (E,) int64.
        seed: (E,) int64.

    Returns:
        (E, N) bool.
    """
    by_chance = uniform(seed, 0, Stream.TIES, scores.shape[1]).argsort(dim=1, stable=True)
    by_score = scores.gather(1, by_chance).argsort(dim=1, descending=True, stable=True)
    order = by_chance.gather(1, by_score)
    kept = torch.arange(scores.shape[1], device=scores.device) < column(count)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, order, kept.expand_as(order))


def column(count: int | torch.Tensor) -> int | torch.Tensor:
    """A count of all experiments, or (E,) of each, as it is compared with (E, N)."""
    return count[:, None] if isinstance(count, torch.Tensor) else count
