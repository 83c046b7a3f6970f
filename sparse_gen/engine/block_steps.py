"""Convolutions of masks that keep whole blocks of channels."""

from __future__ import annotations

import torch

from sparse_gen.engine.graph import Conv
from sparse_gen.engine.steps import Loaded, Step, bias_gradient, image, ops, pooled_shape, weight_and_bias
from sparse_gen.ops.block_sparse_conv2d import BlockPattern
from sparse_gen.ops.convolution import PADDING_MODES

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


class BlockConvStep(Step):
    """`block_sparse_conv2d`; a 2×2 pool behind it becomes stride 2 on the 2×2 means of the padded input."""

    reads_loads = splits = True

    def __init__(self, conv: Conv, mask: torch.Tensor):
        stride = 2 if conv.pool else conv.stride
        pattern = BlockPattern.of(mask, block_of(mask), stride)
        self._pool, self._padding = conv.pool, (conv.padding, PADDING_MODES.index(conv.padding_mode))
        padding, mode = (0, 0) if conv.pool else self._padding
        out_channels, _, kernel_h, kernel_w = mask.shape
        self._pattern = (pattern.index, pattern.order, pattern.columns, pattern.starts, pattern.block[0])
        self._pattern += (out_channels, kernel_h, kernel_w, stride, padding, mode)

    def _source(self, given: torch.Tensor | Loaded) -> torch.Tensor:
        x, load = given[:2] if isinstance(given, Loaded) else (given.contiguous(), None)
        if self._pool:
            return ops.pooled_means(x, load, *self._padding)
        return x if load is None else ops.apply_load(x, load)

    def forward(self, inputs, parameters, trains):
        values, bias = weight_and_bias(parameters)
        y = ops.block_sparse_conv2d(self._source(inputs[0]), values, bias, *self._pattern)
        return y, inputs[0]

    def backward(self, gradient, kept, parameters, needs):
        values, *bias = parameters
        gradient = gradient.contiguous()
        arguments = (gradient, self._source(kept), values, *self._pattern, needs[0], True)
        grad_x, grad_values = ops.block_sparse_conv2d_backward(*arguments)
        if needs[0] and self._pool:
            grad_x = ops.pooled_means_backward(grad_x, *self._padding)
        return [grad_x if needs[0] else None], [grad_values, *bias_gradient(gradient, bias)]

    def input_gradient(self, gradient, kept, parameters):
        x = pooled_shape(kept, self._padding[0]) if self._pool else image(kept)
        grad_x, _ = ops.block_sparse_conv2d_backward(gradient, x, parameters[0], *self._pattern, True, False)
        return ops.pooled_means_backward(grad_x, *self._padding) if self._pool else grad_x
