"""Which channels a masked network has to compute, exactly.

A channel is *constant* if it is the same number at every pixel: its filter keeps no weight from a live input, or the γ
of its normalisation is masked. A training-mode normalisation removes constants, so what only feeds such a
normalisation need not be added up, and a channel that nothing live reads need not be computed. With zero padding a
constant that is not zero leaves a border in the next convolution and is therefore computed as it stands; so is one
that a convolution without a normalisation behind it reads.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from sparse_gen.engine.graph import Call, Concat, Conv, Graph, Node, Norm, Select


@dataclass(frozen=True)
class Compaction:
    """What is left of each value and parameter.

    Attributes:
        channels: for each value the channels that are computed, ascending; where none is needed but a size, one that
            no weight serves.
        weights: convolution's value → bool of the weight's shape, the kept weights that reach the output from there.
        biases: the same for the biases, the kept entries that can change the output.

    A value without any channel is not computed at all.
    """

    channels: list[torch.Tensor]
    weights: dict[int, torch.Tensor]
    biases: dict[int, torch.Tensor]

    def live(self, value: int) -> int:
        """How many channels of a value are computed."""
        return len(self.channels[value])


def compact(graph: Graph, keep: dict[str, torch.Tensor]) -> Compaction:
    """Find the live channels of one experiment.

    Args:
        graph: from `lower`.
        keep: parameter name → bool tensor of its shape.
    """
    constant, zero = _constants(graph, keep)
    shifts = _shifted_away(graph)
    needed, sizing = ([torch.zeros(_channels(graph, v), dtype=torch.bool) for v in range(len(zero))] for _ in range(2))
    needed[-1][:] = True
    weights, biases = {}, {}
    for number in reversed(range(len(graph.nodes))):
        node, wanted, sized = graph.nodes[number], needed[number + 1], sizing[number + 1]
        if not (wanted | sized).any():
            continue
        if isinstance(node.op, Conv):
            (x,) = node.inputs
            used = keep[node.op.weight] & wanted[:, None, None, None]
            # A constant input adds a constant to the output, which is removed there, or nothing at all.
            bordered = node.op.padding > 0 and node.op.padding_mode == "zeros"
            removable = zero[x] | constant[x] if shifts[number + 1] and not bordered else zero[x]
            used = used & ~removable[None, :, None, None]
            weights[number + 1] = used
            needed[x] |= used.any(dim=3).any(dim=2).any(dim=0)
            if not needed[x].any():
                sizing[x][0] = True  # something has to say the size, where no weight is left
            if node.op.bias is not None:
                biases[number + 1] = keep[node.op.bias] & wanted & (not shifts[number + 1])
        elif isinstance(node.op, Call) and node.op.channelwise is None:
            wanted[:] = True  # such a call gives all of its channels and takes all
            for x in node.inputs:
                needed[x][:] = True
        else:
            _need_through(node, wanted, needed)
            _need_through(node, sized, sizing)
    return Compaction([(n | s).nonzero()[:, 0] for n, s in zip(needed, sizing, strict=True)], weights, biases)


def united(compactions: list[Compaction]) -> Compaction:
    """What is left in any of several experiments on one graph."""
    if len(compactions) == 1:
        return compactions[0]
    channels = [torch.cat(own).unique() for own in zip(*(c.channels for c in compactions), strict=True)]
    return Compaction(channels, _any(c.weights for c in compactions), _any(c.biases for c in compactions))


def _any(kept: Iterable[dict[int, torch.Tensor]]) -> dict[int, torch.Tensor]:
    """Of the masks by value, which each may lack."""
    found: dict[int, torch.Tensor] = {}
    for own in kept:
        for value, mask in own.items():
            found[value] = found[value] | mask if value in found else mask
    return found


def _channels(graph: Graph, value: int) -> int:
    return graph.shape(value)[0]


def _need_through(node: Node, wanted: torch.Tensor, needed: list[torch.Tensor]) -> None:
    if isinstance(node.op, Select):
        needed[node.inputs[0]][torch.tensor(node.op.channels)[wanted]] = True
    elif isinstance(node.op, Concat):
        for x, part in zip(node.inputs, wanted.split([len(needed[x]) for x in node.inputs]), strict=True):
            needed[x] |= part
    else:
        for x in node.inputs:
            needed[x] |= wanted


def _constants(graph: Graph, keep: dict[str, torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """For each value which channels are constant over the image, and which are zero."""
    channels = _channels(graph, 0)
    constant, zero = [torch.zeros(channels, dtype=torch.bool)], [torch.zeros(channels, dtype=torch.bool)]
    for node in graph.nodes:
        op = node.op
        if isinstance(op, Conv):
            (x,) = node.inputs
            reads = keep[op.weight].any(dim=3).any(dim=2)
            bordered = op.padding > 0 and op.padding_mode == "zeros"
            varying = ~zero[x] if bordered else ~constant[x]
            live = (reads & varying).any(dim=1)
            silent = ~(reads & ~zero[x]).any(dim=1)
            if op.bias is not None:
                silent &= ~keep[op.bias]
            made = ~live, silent
        elif isinstance(op, Norm):
            flat = constant[node.inputs[0]] | ~keep[op.gamma]
            made = flat, flat & ~keep[op.beta]
        elif isinstance(op, Select):
            index = torch.tensor(op.channels, dtype=torch.long)
            made = constant[node.inputs[0]][index], zero[node.inputs[0]][index]
        elif isinstance(op, Concat):
            made = tuple(torch.cat([of[x] for x in node.inputs]) for of in (constant, zero))
        else:
            made = _constants_of_call(op, node, constant, zero)
        constant.append(made[0])
        zero.append(made[1])
    return constant, zero


def _constants_of_call(call: Call, node: Node, constant, zero):
    if call.channelwise is None or not node.inputs:
        nothing = torch.zeros(node.shape[0], dtype=torch.bool)
        return nothing, nothing
    all_constant = torch.stack([constant[x] for x in node.inputs]).all(dim=0)
    all_zero = torch.stack([zero[x] for x in node.inputs]).all(dim=0)
    if call.channelwise == "normalising":
        return all_constant, all_constant
    silent = all_zero if call.keeps_zero else torch.zeros_like(all_zero)
    return (silent if call.channelwise == "border" else all_constant), silent


def _shifted_away(graph: Graph) -> list[bool]:
    """For each value whether a constant added to a channel of it never reaches the output."""
    readers = graph.consumers()
    away = [False] * (len(graph.nodes) + 1)
    for value in reversed(range(len(graph.nodes))):  # the last value is the output
        nodes = readers[value]
        away[value] = all(
            _removes_shift(graph.nodes[n]) or (_passes_shift(graph.nodes[n]) and away[n + 1]) for n in nodes
        )
    return away


def _removes_shift(node: Node) -> bool:
    return isinstance(node.op, Norm) or (isinstance(node.op, Call) and node.op.channelwise == "normalising")


def _passes_shift(node: Node) -> bool:
    if isinstance(node.op, Call):
        return node.op.channelwise == "linear"
    return isinstance(node.op, (Concat, Select))
