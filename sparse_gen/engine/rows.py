"""Parameters of several experiments in one pass: read from all their kept values, and their gradients put back.

A parameter of all experiments lies together, (E, *shape), as kernels take it; the values lie experiment by experiment.
"""

from __future__ import annotations

from math import prod

import torch

from sparse_gen.engine.collect import Collector, Piece, Zeros


class Rows:
    """What `Slots` is for one experiment.

    Args:
        experiments: E.
        kept: length of an experiment's values; those behind the last one of a shorter experiment are never read.
        index: of each parameter, (1 or E, length): places in the values, `kept` for a zero.
        shapes: of the parameters.
        order: the parameters, by number, and the spans between them, where these make up the values one after the
            other; otherwise empty.
        device: of the values.

    Attributes:
        write: gives the gradient of the kept values.
    """

    def __init__(
        self,
        experiments: int,
        kept: int,
        index: list[torch.Tensor],
        shapes: list[tuple[int, ...]],
        order: list[Piece],
        device: torch.device,
    ):
        self._experiments, self._shapes, self._order = experiments, shapes, order
        self._sizes = [experiments * prod(shape) for shape in shapes]
        rows = torch.arange(experiments)[:, None] * kept
        # Of all values flat, and a zero behind them.
        places = [torch.where(own < kept, own + rows, experiments * kept).flatten() for own in index]
        self.write = Collector(experiments, kept, places, shapes, order, device)
        if order:
            lengths = [piece[1] - piece[0] if isinstance(piece, tuple) else prod(shapes[piece]) for piece in order]
            self._lengths = lengths
        else:
            self._gathered, self._zeros = torch.cat(places).to(device), Zeros()

    def read(self, values: torch.Tensor) -> list[torch.Tensor]:
        """The parameters, (E, *shape) each, from the kept values (E, kept)."""
        if self._order:
            pieces = _columns(values, self._lengths)
            found = {
                number: piece.view(self._experiments, *self._shapes[number])
                for number, piece in zip(self._order, pieces, strict=True)
                if not isinstance(number, tuple)
            }
            return [
                found[number] if number in found else values.new_empty(self._experiments, *shape)
                for number, shape in enumerate(self._shapes)
            ]
        extended = torch.cat([values.reshape(-1), self._zeros(1, values)])
        pieces = extended.index_select(0, self._gathered).split(self._sizes)
        return [piece.view(self._experiments, *shape) for piece, shape in zip(pieces, self._shapes, strict=True)]


def _columns(values: torch.Tensor, lengths: list[int]) -> list[torch.Tensor]:
    """Columns one after the other, each in memory of its own."""
    if not values.is_cuda:
        return [piece.contiguous() for piece in values.split(lengths, dim=1)]
    pieces = [values.new_empty(len(values), length) for length in lengths]
    torch.split_with_sizes_copy(values, lengths, dim=1, out=pieces)  # one kernel
    return pieces
