"""How a stage's parameters are read from the vector of kept values, and how their gradients get back into it."""

from __future__ import annotations

import torch

from sparse_gen.engine.collect import Collector, Piece, Zeros
from sparse_gen.engine.rows import Rows


class Slots:
    """Parameters of stages as pieces of the vector of an experiment's kept values.

    Args:
        kept: length of the vector, of the longest where experiments keep different numbers.

    Attributes:
        write: gives the gradient of the kept values, (1, kept), from those of the parameters.
    """

    write: Collector

    def __init__(self, kept: int):
        self._kept = kept
        self._index: list[torch.Tensor] = []
        self._shapes: list[tuple[int, ...]] = []
        self._ranges: list[tuple[int, int] | None] = []
        self._gathered: torch.Tensor | None = None
        self._sizes: list[int] = []
        self._rows: dict[int, Rows] = {}
        self._zeros = Zeros()

    def add(self, index: torch.Tensor) -> int:
        """Add a parameter whose entries stand at `index` (-1: a zero) and return its number.

        The index is (1, *shape), or (E, *shape) where every experiment has its own.
        """
        flat = index.flatten(1)
        length = flat.shape[1]
        start = int(flat[0, 0]) if length else 0
        consecutive = bool((flat == torch.arange(start, start + length)).all()) and start >= 0
        self._ranges.append((start, start + length) if consecutive else None)
        self._index.append(torch.where(flat < 0, self._kept, flat))
        self._shapes.append(tuple(index.shape[1:]))
        return len(self._index) - 1

    @property
    def count(self) -> int:
        return len(self._ranges)

    def finish(self, device: torch.device) -> None:
        """Call once after the last `add`."""
        self._device, self._order = device, []
        if any(len(index) > 1 for index in self._index):
            return  # every experiment has its own places: there is no run of one alone
        scattered = [index[0] for index, span in zip(self._index, self._ranges, strict=True) if span is None]
        self._gathered = torch.cat(scattered).to(device) if scattered else None
        self._sizes = [len(index) for index in scattered]
        used = [index[0] for index in self._index]
        if not scattered and not (torch.cat(used).bincount() > 1).any():
            self._order = self._pieces()
        self.write = Collector(1, self._kept, used, self._shapes, self._order, device)

    def of(self, experiments: int) -> Slots | Rows:
        """What reads from the values of so many experiments, (E, kept), and gives their gradient."""
        if experiments == 1:
            return self
        if experiments not in self._rows:
            self._rows[experiments] = Rows(
                experiments, self._kept, self._index, self._shapes, self._order, self._device
            )
        return self._rows[experiments]

    def _pieces(self) -> list[Piece]:
        """The spans by their place in the vector, as numbers of parameters, and the gaps between them."""
        pieces: list[Piece] = []
        position = 0
        for start, number in sorted((span[0], number) for number, span in enumerate(self._ranges) if span[0] < span[1]):
            if start > position:
                pieces.append((position, start))
            pieces.append(number)
            position = self._ranges[number][1]
        return [*pieces, (position, self._kept)] if position < self._kept else pieces

    def read(self, values: torch.Tensor) -> list[torch.Tensor]:
        """The parameters, in the order in which they were added, from the kept values (1, kept)."""
        values = values[0]
        pieces = iter(())
        if self._gathered is not None:
            extended = torch.cat([values, self._zeros(1, values)])
            pieces = iter(extended.index_select(0, self._gathered).split(self._sizes))
        return [
            (next(pieces) if span is None else values[span[0] : span[1]]).view(1, *shape)
            for span, shape in zip(self._ranges, self._shapes, strict=True)
        ]
