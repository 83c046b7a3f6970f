"""The gradient of kept values from those of the parameters that were read from them, added up in a fixed order."""

from __future__ import annotations

from math import prod

import torch

Piece = int | tuple[int, int]


class Collector:
    """Gives the gradient of the kept values, (E, kept).

    Args:
        experiments: E.
        kept: length of an experiment's values.
        places: of each parameter, flat: which of all E · kept values its entries are, E · kept for a zero.
        shapes: of the parameters, without E.
        order: the parameters, by number, and the spans between them, where these make up the values one after the
            other; otherwise empty.
        device: of the values.
    """

    def __init__(
        self,
        experiments: int,
        kept: int,
        places: list[torch.Tensor],
        shapes: list[tuple[int, ...]],
        order: list[Piece],
        device: torch.device,
    ):
        self._experiments, self._kept, self._shapes, self._order = experiments, kept, shapes, order
        self._zeros = Zeros()
        if not order:
            source, more = sources(torch.cat(places), experiments * kept)
            self._source = source.to(device)
            self._more = [(values.to(device), readers.to(device)) for values, readers in more]

    def __call__(self, gradients: list[torch.Tensor | None], like: torch.Tensor) -> torch.Tensor:
        """From the gradients of the parameters, (E, *shape) each, None for zero; `like` are the values."""
        if self._order:
            # Spans alone, as of a mask that keeps everything: one pass over the values.
            return torch.cat([self._piece(piece, gradients, like) for piece in self._order], dim=1)
        rows = [self._row(gradient, prod(s), like) for gradient, s in zip(gradients, self._shapes, strict=True)]
        joined = torch.cat([*(row.reshape(-1) for row in rows), self._zeros(1, like)])
        total = joined.index_select(0, self._source)
        for values, readers in self._more:
            # Each value once: on a GPU, where additions to one come in any order, its sum would have other bits.
            total.index_add_(0, values, joined.index_select(0, readers))
        return total.view(self._experiments, self._kept)

    def _piece(self, piece: Piece, gradients: list[torch.Tensor | None], like: torch.Tensor) -> torch.Tensor:
        if isinstance(piece, tuple):
            return self._row(None, piece[1] - piece[0], like)
        return self._row(gradients[piece], prod(self._shapes[piece]), like)

    def _row(self, gradient: torch.Tensor | None, length: int, like: torch.Tensor) -> torch.Tensor:
        """(E, length)."""
        flat = self._zeros(self._experiments * length, like) if gradient is None else gradient
        return flat.reshape(self._experiments, length)


class Zeros:
    """Zeros, which are kept: on a GPU each time is a launch."""

    def __init__(self):
        self._known: torch.Tensor | None = None

    def __call__(self, count: int, like: torch.Tensor) -> torch.Tensor:
        """(count,), not to be written to."""
        known = self._known
        if known is None or len(known) < count or (known.dtype, known.device) != (like.dtype, like.device):
            self._known = known = like.new_zeros(count)
        return known[:count]


def sources(used: torch.Tensor, values: int) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Where each value's gradient stands among those of the parameters and a zero behind them.

    Args:
        used: the values that the parameters read, one after the other; `values` stands for a zero.
        values: how many there are.

    Returns:
        For each value a place: its last reader's. And, where values are read in several places, pairs of values, none
        of them twice, and other readers of these, whose gradients are added: the first of each, the second, and so on.
    """
    real = (used < values).nonzero()[:, 0]
    last = torch.full((values,), -1).scatter_reduce(0, used[real], real, "amax")
    source = torch.where(last < 0, len(used), last)
    others = real[source[used[real]] != real]
    order = used[others].argsort(stable=True)
    others = others[order]
    read = used[others]
    rank = torch.arange(len(read)) - torch.searchsorted(read, read)
    pairs = [(read[rank == r], others[rank == r]) for r in range(int(rank.max()) + 1 if len(rank) else 0)]
    return source, pairs
