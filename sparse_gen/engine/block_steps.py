"""Convolutions of masks that keep whole blocks of channels."""

from __future__ import annotations

import torch

from sparse_gen.engine.graph import Conv
from sparse_gen.engine.steps import KeptConvStep, ops, weight_and_bias
from sparse_gen.ops.block_sparse_conv2d import BlockPattern

# Output × input channels, largest first: a mask made of larger blocks is one of smaller ones too.
BLOCKS = ((16, 16), (8, 8), (16, 1), (8, 1), (4, 1))


def block_of(mask: torch.Tensor) -> tuple[int, int] | None:
    """The largest block on which a mask (out, in, kh, kw) is constant everywhere, if there is one."""
    for block in BLOCKS:
        rows, columns = mask[:: block[0]], mask[:, :: block[1]]
        spread = rows.repeat_interleave(block[0], 0)[: len(mask)]
        if torch.equal(spread, mask) and torch.equal(columns.repeat_interleave(block[1], 1)[:, : mask.shape[1]], mask):
            return block
    return None


class BlockConvStep(KeptConvStep):
    """`block_sparse_conv2d`."""

    def __init__(self, conv: Conv, mask: torch.Tensor):
        super().__init__(conv)
        pattern = BlockPattern.of(mask, block_of(mask), self.stride)
        out_channels, _, kernel_h, kernel_w = mask.shape
        self._pattern = (pattern.index, pattern.order, pattern.columns, pattern.starts, pattern.block[0])
        self._pattern += (out_channels, kernel_h, kernel_w, self.stride, *self.padding)

    def source(self, given):
        x, load = super().source(given)
        return x if load is None else ops.apply_load(x, load), None

    def forward(self, inputs, parameters, trains):
        values, bias = weight_and_bias(parameters)
        y = ops.block_sparse_conv2d(self.source(inputs[0])[0], values, bias, *self._pattern)
        return y, inputs[0]

    def gradients(self, gradient, x, values, load, *needs):
        return ops.block_sparse_conv2d_backward(gradient, x, values, *self._pattern, *needs)
