"""What a mask leaves of a network: live channels, weights that reach the output, multiplications."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import nn

from sparse_gen.engine.checks import check_input
from sparse_gen.engine.compact import compact
from sparse_gen.engine.functional import training_copy
from sparse_gen.engine.graph import Conv
from sparse_gen.engine.layout import ParameterLayout
from sparse_gen.engine.lower import lower


@dataclass(frozen=True)
class StageAnalysis:
    """One convolution under a mask.

    Attributes:
        name: its weight's, without ".weight".
        live_inputs, inputs: channels that are read (one at least, for its size), and all of them.
        live_outputs, outputs: channels that are computed, and all of them.
        reaching, kept, weights: kept weights that can change the output, all kept ones, all of them.
        dense_flops: of the convolution as it was written, forward.
        compact_flops: of the live channels, with pool and up-sampling folded in.
        sparse_flops: of the weights that reach the output alone, folded likewise.
    """

    name: str
    live_inputs: int
    inputs: int
    live_outputs: int
    outputs: int
    reaching: int
    kept: int
    weights: int
    dense_flops: int
    compact_flops: int
    sparse_flops: int


def analyse(network: nn.Module, mask, z: torch.Tensor) -> list[StageAnalysis]:
    """Say for every convolution of a masked network what of it has to be computed.

    Args:
        network: any module, in training mode; it is left untouched.
        mask: an `sg.Mask` of one experiment.
        z: (1, C, H, W), the size to count for.

    Returns:
        One entry for each convolution that could be matched, in the order of running.

    Raises:
        ValueError: the mask belongs to another network or to several experiments, a normalisation layer is in
            evaluation mode, or the network cannot be lowered.
    """
    check_input(z, "z")
    mask.check_fits(network)
    if mask.experiments is not None and mask.experiments != 1:
        raise ValueError(f"expected a mask of one experiment, got {mask.experiments}, analyse them one at a time")
    layout = ParameterLayout.of(network)
    keep = layout.views(layout.flatten(mask.dense(network), 1)[0].cpu())
    graph = lower(training_copy(network), z[:1])
    left = compact(graph, keep)
    stages = []
    for value, node in enumerate(graph.nodes, start=1):
        if not isinstance(node.op, Conv):
            continue
        pixels = prod(node.shape[1:])
        nothing = torch.zeros(node.op.shape, dtype=torch.bool)
        live = left.live(value), left.live(node.inputs[0])
        reaching = int(left.weights.get(value, nothing).sum())
        # Every tap on the small image for an up-sampling; once a pooled pixel for a pool.
        folded = pixels if node.op.upsample is None else pixels // 4
        stages.append(
            StageAnalysis(
                node.name, live[1] if live[0] else 0, node.op.shape[1], live[0], node.op.shape[0],
                reaching, int(keep[node.op.weight].sum()), prod(node.op.shape),
                2 * prod(node.op.shape) * pixels * (4 if node.op.pool else 1),
                2 * prod(live) * prod(node.op.shape[2:]) * folded, 2 * reaching * folded,
            )
        )  # fmt: skip
    return stages
