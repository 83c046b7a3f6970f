"""Convolutions with their weight whole: what a mask search, a dense deep image prior and dense layers run on."""

from __future__ import annotations

import weakref

import torch
from torch.nn import functional as F

from sparse_gen.engine.graph import Conv
from sparse_gen.engine.steps import AutogradStep, Loaded, Step, ops
from sparse_gen.ops.convolution import PADDING_MODES, TORCH_MODES, upsampled
from sparse_gen.ops.masked_conv2d import masked_conv2d_backward, masked_conv2d_forward
from sparse_gen.ops.masked_conv2d_layouts import LAYOUTS, UPSAMPLE


class MaskedConvStep(Step):
    """`masked_conv2d` in one of its layouts.

    What a load makes of the input is kept for the backward: it is read twice there. The 2×2 means that a folded pool
    makes of a constant input are kept for good, and convolved with stride 2.
    """

    reads_loads = True

    def __init__(self, conv: Conv, layout: str):
        self._conv, self._layout = conv, LAYOUTS.index(layout)
        mode, scale = PADDING_MODES.index(conv.padding_mode), UPSAMPLE.index(conv.upsample)
        self._arguments = (conv.stride, conv.padding, mode, scale, conv.pool, self._layout)
        self._known: tuple[weakref.ref, torch.Tensor] | None = None

    def _source(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple]:
        if not (self.constant_input and self._conv.pool):
            return x.contiguous(), self._arguments
        if self._known is None or self._known[0]() is not x:
            means = ops.pooled_means(x.contiguous(), None, self._conv.padding, self._arguments[2])
            self._known = weakref.ref(x), means
        return self._known[1], (2, 0, 0, 0, False, self._layout)

    def forward(self, inputs, parameters, trains):
        weight, *bias = (parameter[None] for parameter in parameters)
        x = ops.apply_load(*inputs[0][:2]) if isinstance(inputs[0], Loaded) else inputs[0]
        source, arguments = self._source(x)
        return masked_conv2d_forward(source, weight, bias[0] if bias else None, *arguments), x

    def backward(self, gradient, kept, parameters, needs):
        weight, *bias = (parameter[None] for parameter in parameters)
        # The gradient of a constant input goes through the padding and the pool again.
        source, arguments = (kept.contiguous(), self._arguments) if needs[0] else self._source(kept)
        gradient = gradient.contiguous()
        grad_x, grad_weight = masked_conv2d_backward(gradient, source, weight, *arguments, needs[0], True)
        grad_bias = [gradient.sum(dim=(0, 2, 3))] if bias else []
        return [grad_x if needs[0] else None], [grad_weight[0], *grad_bias]


class CornersConvStep(AutogradStep):
    """A convolution behind bilinear up-sampling with aligned corners, on PyTorch's kernels."""

    def __init__(self, conv: Conv):
        self._conv = conv

    def compute(self, inputs, parameters):
        x, weight, *bias = upsampled(inputs[0], self._conv.upsample), *parameters
        mode = TORCH_MODES[PADDING_MODES.index(self._conv.padding_mode)]
        padded = F.pad(x, [self._conv.padding] * 4, mode=mode) if self._conv.padding else x
        return F.conv2d(padded, weight, bias[0] if bias else None)
