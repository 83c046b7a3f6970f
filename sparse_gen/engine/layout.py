"""Named parameters as one flat vector an experiment, and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import nn


@dataclass(frozen=True)
class ParameterLayout:
    """Some of a module's parameters, in its own order, each row-major, one after the other."""

    shapes: dict[str, torch.Size]

    @classmethod
    def of(cls, module: nn.Module, names: Iterable[str] | None = None) -> ParameterLayout:
        """The layout of all of a module's parameters, or of those named."""
        wanted = None if names is None else set(names)
        parameters = module.named_parameters()
        return cls({name: p.shape for name, p in parameters if wanted is None or name in wanted})

    @property
    def numel(self) -> int:
        return sum(prod(shape) for shape in self.shapes.values())

    def flatten(self, tensors: Mapping[str, torch.Tensor], experiments: int | None = None) -> torch.Tensor:
        """(N,) from tensors of the parameters' shapes; (E, N) from tensors with a leading E."""
        leading = () if experiments is None else (experiments,)
        rows = [tensors[name].detach().reshape(*leading, -1) for name in self.shapes]
        return torch.cat(rows, dim=-1) if rows else torch.zeros(*leading, 0)

    def views(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """The parameters of a flat (…, N) vector, each of shape (…, *shape), sharing its memory.

        One split, not one slice a parameter: the gradient is then put together once instead of being summed
        from vectors of N zeros each.
        """
        pieces = flat.split([prod(shape) for shape in self.shapes.values()], dim=-1)
        leading = flat.shape[:-1]
        return {
            name: piece.reshape(*leading, *shape)
            for (name, shape), piece in zip(self.shapes.items(), pieces, strict=True)
        }
