"""Parameters of several experiments in one pass: read from all their kept values, and their gradients put back.

A parameter of all experiments lies together, (E, *shape), as kernels take it; the values lie experiment by experiment.
"""

from __future__ import annotations

from math import prod

import torch

Piece = int | tuple[int, int]


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
        self._experiments, self._kept, self._shapes, self._order = experiments, kept, shapes, order
        self._sizes = [experiments * prod(shape) for shape in shapes]
        if order:
            lengths = [piece[1] - piece[0] if isinstance(piece, tuple) else prod(shapes[piece]) for piece in order]
            self._lengths = lengths
            return
        values = experiments * kept  # all of them flat, and a zero behind them
        rows = torch.arange(experiments)[:, None] * kept
        places = [torch.where(own < kept, own + rows, values).flatten() for own in index]
        used = torch.cat(places)
        self._gathered = used.to(device)
        self._source, self._more = sources(used, values, device)

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
        extended = torch.cat([values.reshape(-1), values.new_zeros(1)])
        pieces = extended.index_select(0, self._gathered).split(self._sizes)
        return [piece.view(self._experiments, *shape) for piece, shape in zip(pieces, self._shapes, strict=True)]

    def write(self, gradients: list[torch.Tensor | None], like: torch.Tensor) -> torch.Tensor:
        """The gradient of the kept values, (E, kept), from those of the parameters; None is zero."""
        if self._order:
            return torch.cat([self._piece(piece, gradients, like) for piece in self._order], dim=1)
        flat = [
            like.new_zeros(size) if gradient is None else gradient.reshape(-1)
            for gradient, size in zip(gradients, self._sizes, strict=True)
        ]
        joined = torch.cat([*flat, like.new_zeros(1)])
        total = joined.index_select(0, self._source)
        if self._more is not None:
            total.index_add_(0, self._more[0], joined[self._more[1]])
        return total.view(self._experiments, self._kept)

    def _piece(self, piece: Piece, gradients: list[torch.Tensor | None], like: torch.Tensor) -> torch.Tensor:
        gradient = None if isinstance(piece, tuple) else gradients[piece]
        if gradient is not None:
            return gradient.flatten(1)
        length = piece[1] - piece[0] if isinstance(piece, tuple) else prod(self._shapes[piece])
        return like.new_zeros(self._experiments, length)


def sources(
    used: torch.Tensor, values: int, device: torch.device
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
    """Where each value's gradient stands among those of the parameters and a zero behind them.

    Args:
        used: the values that the parameters read, one after the other; `values` stands for a zero.
        values: how many there are.

    Returns:
        For each value a place: its last reader's; and where a value is read in several places, these values and the
        other readers' places, whose gradients are added.
    """
    real = (used < values).nonzero()[:, 0]
    source = torch.full((values,), len(used))
    source[used[real]] = real
    more = real[source[used[real]] != real]
    return source.to(device), (used[more].to(device), more.to(device)) if len(more) else None


def _columns(values: torch.Tensor, lengths: list[int]) -> list[torch.Tensor]:
    """Columns one after the other, each in memory of its own."""
    if not values.is_cuda:
        return [piece.contiguous() for piece in values.split(lengths, dim=1)]
    pieces = [values.new_empty(len(values), length) for length in lengths]
    torch.split_with_sizes_copy(values, lengths, dim=1, out=pieces)  # one kernel
    return pieces
