"""A convolution with its weight whole in one kernel of ours, which reads padding, resampling and loads by index."""

from __future__ import annotations

from sparse_gen.engine.graph import Conv
from sparse_gen.engine.steps import Loaded, Step, bias_gradient, ops, weight_and_bias
from sparse_gen.ops.convolution import PADDING_MODES
from sparse_gen.ops.masked_conv2d_layouts import UPSAMPLE


class FusedConvStep(Step):
    """`masked_conv2d` as the GPU's kernel has it: nothing that an index can express is written to memory."""

    reads_loads = splits = True

    def __init__(self, conv: Conv):
        mode, scale = PADDING_MODES.index(conv.padding_mode), UPSAMPLE.index(conv.upsample)
        self._arguments = (conv.stride, conv.padding, mode, scale, conv.pool)

    def forward(self, inputs, parameters, trains):
        given = inputs[0] if isinstance(inputs[0], Loaded) else Loaded(inputs[0].contiguous(), None)
        weight, bias = weight_and_bias(parameters)
        y = ops.masked_conv2d_loaded(given.x, weight, bias, *self._arguments, given.load)
        return y, given

    def backward(self, gradient, kept, parameters, needs):
        weight, *bias = parameters
        gradient = gradient.contiguous()
        arguments = (gradient, kept.x, weight, *self._arguments, kept.load, needs[0], True)
        grad_x, grad_weight = ops.masked_conv2d_loaded_backward(*arguments)
        return [grad_x if needs[0] else None], [grad_weight, *bias_gradient(gradient, bias)]

    def input_gradient(self, gradient, kept, parameters):
        arguments = (gradient, kept.x, parameters[0], *self._arguments, None, True, False)
        return ops.masked_conv2d_loaded_backward(*arguments)[0]
