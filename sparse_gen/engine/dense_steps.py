"""Convolutions with their weight whole: what a mask search, a dense deep image prior and dense layers run on."""

from __future__ import annotations

import weakref

import torch
from torch.nn import functional as F

from sparse_gen.engine.graph import Conv
from sparse_gen.engine.steps import AutogradStep, Loaded, Step, bias_gradient, ops, weight_and_bias
from sparse_gen.ops.convolution import PADDING_MODES, TORCH_MODES, upsampled
from sparse_gen.ops.masked_conv2d import masked_conv2d_backward, masked_conv2d_forward
from sparse_gen.ops.masked_conv2d_layouts import LAYOUTS, UPSAMPLE

# Elements of a constant input, of each of which 12 bytes of parts are kept: those of 1024².
_MOST_KEPT = 34_000_000


class MaskedConvStep(Step):
    """`masked_conv2d` in one of its layouts.

    What a load makes of the input is kept for the backward: it is read twice there. The 2×2 means that a folded pool
    makes of a constant input are kept for good, and convolved with stride 2; in layout "split", so are their parts.
    """

    reads_loads = True

    def __init__(self, conv: Conv, layout: str):
        self._conv, self._layout = conv, LAYOUTS.index(layout)
        mode, scale = PADDING_MODES.index(conv.padding_mode), UPSAMPLE.index(conv.upsample)
        self._arguments = (conv.stride, conv.padding, mode, scale, conv.pool, self._layout)
        # What the others make of the gradient would be made on both sides.
        self.splits = layout == "direct"
        self._known: tuple[weakref.ref, torch.Tensor, torch.Tensor | None] | None = None

    def _source(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple]:
        if not (self.constant_input and self._conv.pool):
            return x.contiguous(), self._arguments
        if self._known is None or self._known[0]() is not x:
            means = ops.pooled_means(x.contiguous(), None, self._conv.padding, self._arguments[2])
            self._known = weakref.ref(x), means, self._parts(means)
        return self._known[1], (2, 0, 0, 0, False, self._layout)

    def _parts(self, means: torch.Tensor) -> torch.Tensor | None:
        if LAYOUTS[self._layout] != "split" or means.dtype != torch.float32 or means.numel() > _MOST_KEPT:
            return None
        return ops.masked_conv2d_split_parts(means, *self._conv.shape[2:], 2, 0, 0, False)

    def _kept_parts(self, source: torch.Tensor) -> torch.Tensor | None:
        return self._known[2] if self._known is not None and self._known[1] is source else None

    def forward(self, inputs, parameters, trains):
        weight, bias = weight_and_bias(parameters)
        x = ops.apply_load(*inputs[0][:2]) if isinstance(inputs[0], Loaded) else inputs[0]
        source, arguments = self._source(x)
        parts = self._kept_parts(source)
        if parts is not None:
            return ops.masked_conv2d_split_kept(source, weight, bias, parts, 2, 0, 0, False), x
        return masked_conv2d_forward(source, weight, bias, *arguments), x

    def backward(self, gradient, kept, parameters, needs):
        weight, *bias = parameters
        # The gradient of a constant input goes through the padding and the pool again.
        source, arguments = (kept.contiguous(), self._arguments) if needs[0] else self._source(kept)
        gradient = gradient.contiguous()
        parts = self._kept_parts(source)
        if parts is not None:
            given = (gradient, source, weight, parts, 2, 0, 0, False, False, True)
            grad_x, grad_weight = ops.masked_conv2d_split_kept_backward(*given)
        else:
            grad_x, grad_weight = masked_conv2d_backward(gradient, source, weight, *arguments, needs[0], True)
        return [grad_x if needs[0] else None], [grad_weight, *bias_gradient(gradient, bias)]

    def input_gradient(self, gradient, kept, parameters):
        arguments = (gradient, kept.contiguous(), parameters[0], *self._arguments, True, False)
        return masked_conv2d_backward(*arguments)[0]


class CornersConvStep(AutogradStep):
    """A convolution behind bilinear up-sampling with aligned corners, on PyTorch's kernels."""

    def __init__(self, conv: Conv):
        self._conv = conv

    def compute(self, inputs, parameters):
        x, weight, *bias = upsampled(inputs[0], self._conv.upsample), *parameters
        mode = TORCH_MODES[PADDING_MODES.index(self._conv.padding_mode)]
        padded = F.pad(x, [self._conv.padding] * 4, mode=mode) if self._conv.padding else x
        return F.conv2d(padded, weight, bias[0] if bias else None)
