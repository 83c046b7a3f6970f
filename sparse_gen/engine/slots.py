"""How a stage's parameters are read from the vector of kept values, and how their gradients get back into it."""

from __future__ import annotations

from math import prod

import torch


class Slots:
    """Parameters of one experiment's stages as pieces of one vector of kept values.

    Args:
        kept: length of the vector.
    """

    def __init__(self, kept: int):
        self._kept = kept
        self._index: list[torch.Tensor] = []
        self._shapes: list[tuple[int, ...]] = []
        self._ranges: list[tuple[int, int] | None] = []
        self._gathered: torch.Tensor | None = None
        self._sizes: list[int] = []
        self._zeros: torch.Tensor | None = None

    def add(self, index: torch.Tensor, shape: tuple[int, ...] | None = None) -> int:
        """Add a parameter whose entries stand at `index` (-1: a zero) and return its number."""
        flat = index.flatten()
        start = int(flat[0]) if len(flat) else 0
        consecutive = bool((flat == torch.arange(start, start + len(flat))).all()) and start >= 0
        self._ranges.append((start, start + len(flat)) if consecutive else None)
        self._index.append(torch.where(flat < 0, self._kept, flat))
        self._shapes.append(tuple(index.shape) if shape is None else shape)
        return len(self._index) - 1

    @property
    def count(self) -> int:
        return len(self._ranges)

    def finish(self, device: torch.device) -> None:
        """Call once after the last `add`."""
        scattered = [index for index, span in zip(self._index, self._ranges, strict=True) if span is None]
        self._gathered = torch.cat(scattered).to(device) if scattered else None
        self._sizes = [len(index) for index in scattered]
        used = torch.cat([*self._index, torch.tensor([self._kept])])
        # Where each kept value's gradient stands among those of the parameters and a zero behind them. The last writer
        # of a value counts; a parameter that serves in two places has the others' gradients added.
        real = (used < self._kept).nonzero()[:, 0]
        source = torch.full((self._kept,), len(used) - 1)
        source[used[real]] = real
        more = real[source[used[real]] != real]
        self._source, self._more = source.to(device), (used[more].to(device), more.to(device)) if len(more) else None
        self._order = [] if scattered or self._more else self._pieces()
        self._index = []

    def _pieces(self) -> list[int | tuple[int, int]]:
        """The spans by their place in the vector, as numbers of parameters, and the gaps between them."""
        pieces: list[int | tuple[int, int]] = []
        position = 0
        for start, number in sorted((span[0], number) for number, span in enumerate(self._ranges) if span[0] < span[1]):
            if start > position:
                pieces.append((position, start))
            pieces.append(number)
            position = self._ranges[number][1]
        return [*pieces, (position, self._kept)] if position < self._kept else pieces

    def read(self, values: torch.Tensor) -> list[torch.Tensor]:
        """The parameters, in the order in which they were added, from the kept values (kept,)."""
        pieces = iter(())
        if self._gathered is not None:
            extended = torch.cat([values, self._nothing(1, values)])
            pieces = iter(extended.index_select(0, self._gathered).split(self._sizes))
        return [
            (next(pieces) if span is None else values[span[0] : span[1]]).view(shape)
            for span, shape in zip(self._ranges, self._shapes, strict=True)
        ]

    def write(self, gradients: list[torch.Tensor | None], like: torch.Tensor) -> torch.Tensor:
        """The gradient of the kept values from those of the parameters; None is zero."""
        if self._order:
            # Spans alone, as of a mask that keeps everything: one pass over the vector.
            return torch.cat([self._piece(piece, gradients, like) for piece in self._order])
        flat = torch.cat(
            [
                *(
                    self._nothing(prod(shape), like) if gradient is None else gradient.reshape(-1)
                    for gradient, shape in zip(gradients, self._shapes, strict=True)
                ),
                self._nothing(1, like),
            ]
        )
        total = flat.index_select(0, self._source)
        return total if self._more is None else total.index_add_(0, self._more[0], flat[self._more[1]])

    def _piece(self, piece: int | tuple[int, int], gradients, like: torch.Tensor) -> torch.Tensor:
        if isinstance(piece, tuple):
            return self._nothing(piece[1] - piece[0], like)
        gradient, (start, end) = gradients[piece], self._ranges[piece]
        return self._nothing(end - start, like) if gradient is None else gradient.reshape(-1)

    def _nothing(self, count: int, like: torch.Tensor) -> torch.Tensor:
        """Zeros, which are kept: on a GPU each time is a launch."""
        known = self._zeros
        if known is None or len(known) < count or (known.dtype, known.device) != (like.dtype, like.device):
            self._zeros = known = like.new_zeros(count)
        return known[:count]
