"""Weights that are kept or pruned together, so that hardware can skip what is pruned."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

from sparse_gen.engine.layout import ParameterLayout
from sparse_gen.masks.selection import column
from sparse_gen.ops.philox import Stream, uniform

NAMED = ("weight", "kernel", "filter")
Group = str | Sequence[int]


def group_name(group: Group | None) -> str:
    """The group in one word: "weight", "kernel", "filter", or "8x1" for blocks of output × input channels.

    Raises:
        ValueError: it is none of these.
    """
    if group is None or group in NAMED:
        return group or "weight"
    if isinstance(group, str) and (match := re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", group)):
        block = tuple(map(int, match.groups()))
    elif isinstance(group, (tuple, list)) and len(group) == 2 and all(type(n) is int and n > 0 for n in group):
        block = tuple(group)
    else:
        raise ValueError(
            "expected group as 'weight', 'kernel', 'filter', or a block of output × input channels such as '8x1' or "
            f"(8, 1), got {group!r}"
        )
    return "weight" if block == (1, 1) else f"{block[0]}x{block[1]}"


@dataclass(frozen=True)
class _Tiles:
    """A part of a parameter that groups of one size tile without a rest.

    Attributes:
        name: the parameter's.
        region: its part, a slice of the output and one of the input channels; empty for the whole.
        tile: (output, input) channels of a group; empty where every entry is a group.
        taps: whether a group spans the kernel.
        grid: how many groups there are, in each direction.
    """

    name: str
    region: tuple[slice, ...] = ()
    tile: tuple[int, ...] = ()
    taps: bool = False
    grid: tuple[int, ...] = ()

    def view(self, parameter: torch.Tensor) -> torch.Tensor:
        """(…, output group, output, input group, input, kh, kw) of a parameter (…, out, in, kh, kw), sharing memory."""
        if not self.tile:
            return parameter
        part = parameter[(..., *self.region, slice(None), slice(None))]
        return part.unflatten(-4, (-1, self.tile[0])).unflatten(-3, (-1, self.tile[1]))

    def size(self, shape: torch.Size) -> int:
        """The weights of a group."""
        return prod(self.tile) * (prod(shape[2:]) if self.taps else 1)

    @property
    def within(self) -> tuple[int, ...]:
        """The dimensions of `view` that a group spans."""
        return () if not self.tile else (-5, -3, *((-2, -1) if self.taps else ()))

    @property
    def spread(self) -> tuple[int, ...]:
        """The shape in which values of the groups go with `view`."""
        if not self.tile:
            return self.grid
        return (self.grid[0], 1, self.grid[1], 1, *((1, 1) if self.taps else self.grid[2:]))


class Groups:
    """The groups of a layout, G of them, in one order.

    Args:
        layout: the prunable parameters, N entries.
        group: "weight"; "kernel", the plane of one output and one input channel; "filter", all of one output channel;
            or (bo, bi), also written "8x1", so many output × input channels at one tap. Blocks at the end of a weight
            that they do not divide are cut. Parameters without kernel dimensions have a group for every entry.

    Attributes:
        layout: as given.
        name: the group in one word.
        sizes: (G,) int64, the weights of each.

    Raises:
        ValueError: there is no such group.
    """

    def __init__(self, layout: ParameterLayout, group: Group):
        self.name = group_name(group)
        self.layout = layout
        self._tiles = [tiles for name, shape in layout.shapes.items() for tiles in _tiled(name, shape, self.name)]
        self._counts = [prod(tiles.grid) for tiles in self._tiles]
        self.sizes = torch.cat(
            [
                torch.full((count,), tiles.size(layout.shapes[tiles.name]))
                for tiles, count in zip(self._tiles, self._counts, strict=True)
            ]
        )

    def __len__(self) -> int:
        return len(self.sizes)

    def expand(self, values: torch.Tensor) -> torch.Tensor:
        """(E, G) to (E, N): every weight gets its group's value."""
        out = values.new_empty(len(values), self.layout.numel)
        for tiles, view, own in self._pairs(out, values):
            view.copy_(own.expand_as(view) if tiles.tile else own)
        return out

    def multiply(self, weight: torch.Tensor, values: torch.Tensor, out: torch.Tensor) -> None:
        """Write weight · value of its group to `out` (E, N), for weights (E, N) or (N,); no (E, N) in between."""
        weights = self.layout.views(weight)
        for tiles, view, own in self._pairs(out, values):
            torch.mul(tiles.view(weights[tiles.name]), own, out=view)

    def mean_product(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """(E, G): the mean of first · second over each group, for (E, N) and (E, N) or (N,)."""
        seconds = self.layout.views(second)
        means = []
        firsts = self.layout.views(first)
        for tiles in self._tiles:
            product = tiles.view(firsts[tiles.name]) * tiles.view(seconds[tiles.name])
            means.append((product.mean(dim=tiles.within) if tiles.within else product).reshape(len(first), -1))
        return torch.cat(means, dim=1)

    def keep(self, scores: torch.Tensor, count: int | torch.Tensor, seed: torch.Tensor) -> torch.Tensor:
        """(E, G) bool: the best groups, as many as have at most `count` weights in all; ties by the seed.

        The first group of the ranking that would exceed `count` and all behind it are pruned. A count an experiment is
        (E,) int64.
        """
        by_chance = uniform(seed, 0, Stream.TIES, scores.shape[1]).argsort(dim=1, stable=True)
        order = by_chance.gather(1, scores.gather(1, by_chance).argsort(dim=1, descending=True, stable=True))
        kept = self.sizes.to(scores.device)[order].cumsum(dim=1) <= column(count)
        return torch.zeros_like(kept).scatter(1, order, kept)

    def _pairs(self, flat: torch.Tensor, values: torch.Tensor):
        """For every part its view of a (E, N) vector and its values, shaped to go with it."""
        views = self.layout.views(flat)
        for tiles, own in zip(self._tiles, values.split(self._counts, dim=1), strict=True):
            yield tiles, tiles.view(views[tiles.name]), own.view(len(values), *tiles.spread)


def _tiled(name: str, shape: torch.Size, group: str) -> list[_Tiles]:
    if len(shape) != 4 or group == "weight":
        return [_Tiles(name, grid=tuple(shape))]
    out_channels, in_channels, *kernel = shape
    taps = group in NAMED
    blocks = {"kernel": (1, 1), "filter": (1, in_channels)}
    block = blocks[group] if taps else tuple(map(int, group.split("x")))
    parts = []
    for rows, height in _cut(out_channels, block[0]):
        for columns, width in _cut(in_channels, block[1]):
            grid = ((rows.stop - rows.start) // height, (columns.stop - columns.start) // width)
            parts.append(_Tiles(name, (rows, columns), (height, width), taps, grid + (() if taps else tuple(kernel))))
    return parts


def _cut(length: int, size: int) -> list[tuple[slice, int]]:
    """Where the whole blocks lie and where the one that is cut, with their sizes."""
    whole = length // size * size
    parts = [(slice(0, whole), size), (slice(whole, length), length - whole)]
    return [(part, own) for part, own in parts if part.stop > part.start]
