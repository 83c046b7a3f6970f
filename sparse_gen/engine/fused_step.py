"""A convolution with its weight whole in one kernel of ours, which reads padding, resampling and loads by index."""

from __future__ import annotations

from sparse_gen.engine.graph import Conv
from sparse_gen.engine.steps import (
    BehindNorm,
    Loaded,
    NormHeadStep,
    NormLoadStep,
    Step,
    bias_gradient,
    ops,
    weight_and_bias,
)
from sparse_gen.ops.convolution import PADDING_MODES
from sparse_gen.ops.masked_conv2d_layouts import UPSAMPLE


class FusedConvStep(Step):
    """`masked_conv2d` as the GPU's kernel has it: nothing that an index can express is written to memory."""

    reads_loads = True

    def __init__(self, conv: Conv):
        mode, scale = PADDING_MODES.index(conv.padding_mode), UPSAMPLE.index(conv.upsample)
        self.arguments = (conv.stride, conv.padding, mode, scale, conv.pool)

    def forward(self, inputs, parameters, trains):
        given, weight, bias = self.operands(inputs[0], parameters)
        return ops.masked_conv2d_loaded(given.x, weight, bias, *self.arguments, given.load), given

    def backward(self, gradient, kept, parameters, needs):
        weight, *bias = parameters
        gradient = gradient.contiguous()
        grad_bias = bias_gradient(gradient, bias)
        if needs[0] and kept.norm is not None:
            arguments = (gradient, kept.x, weight, *self.arguments, kept.load, *kept.norm)
            grad_x, *grads, grad_weight = ops.norm_conv_backward(*arguments)
            return [BehindNorm(grad_x, grads)], [grad_weight, *grad_bias]
        arguments = (gradient, kept.x, weight, *self.arguments, kept.load, needs[0], True)
        grad_x, grad_weight = ops.masked_conv2d_loaded_backward(*arguments)
        return [grad_x if needs[0] else None], [grad_weight, *grad_bias]

    @staticmethod
    def operands(given, parameters):
        """The input as `Loaded`, the weight and the bias or None, as the operators take them."""
        loaded = given if isinstance(given, Loaded) else Loaded(given.contiguous(), None)
        return loaded, *weight_and_bias(parameters)


class ConvNormStep(Step):
    """`conv_norm`: such a convolution, and the normalisations behind it that its readers apply.

    Args:
        conv, norm: the steps that this one joins.
        own: how many parameters the convolution has; the norms' stand behind them.
    """

    reads_loads = True

    def __init__(self, conv: FusedConvStep, norm: NormLoadStep, own: int):
        self._conv, self._norm, self._own = conv, norm, own

    def forward(self, inputs, parameters, trains):
        given, weight, bias = self._conv.operands(inputs[0], parameters[: self._own])
        gamma, beta, gamma2, beta2 = self._norm.rows(parameters[self._own :])
        eps, slope, eps2 = self._norm.numbers
        norms = (gamma, beta, eps, slope, gamma2, beta2, eps2)
        y, load, moments = ops.conv_norm(given.x, weight, bias, *self._conv.arguments, given.load, *norms)
        norm = (gamma, beta, slope, gamma2, beta2, moments) if self.alone else None
        return Loaded(y, load, norm), (given, (y, moments))

    def backward(self, gradient, kept, parameters, needs):
        given, normalised = kept
        norms = parameters[self._own :]
        if isinstance(gradient, BehindNorm):
            grad_y, grads = gradient.gradient, gradient.parameters[: len(norms)]
        else:
            (grad_y,), grads = self._norm.backward(gradient, normalised, norms, [True])
        inputs, own = self._conv.backward(grad_y, given, parameters[: self._own], needs)
        return inputs, [*own, *grads]


class ConvHeadStep(Step):
    """Such a convolution and the `norm_head` behind it, which needs no pass of its own for the moments.

    Args:
        conv, head: the steps that this one joins.
        own: how many parameters the convolution has; the head's stand behind them.
        sigmoid: whether that is applied as well.
    """

    reads_loads = True

    def __init__(self, conv: FusedConvStep, head: NormHeadStep, own: int, sigmoid: bool = False):
        self._conv, self._head, self._own, self._sigmoid = conv, head, own, sigmoid

    def with_sigmoid(self) -> ConvHeadStep:
        return ConvHeadStep(self._conv, self._head, self._own, True)

    def forward(self, inputs, parameters, trains):
        given, weight, bias = self._conv.operands(inputs[0], parameters[: self._own])
        gamma, beta, mixed, *own_bias = parameters[self._own :]
        norms = (gamma, beta, *self._head.numbers, None, None, 0.0)
        x, load, moments = ops.conv_norm(given.x, weight, bias, *self._conv.arguments, given.load, *norms)
        y = ops.loaded_head(x, load, mixed.flatten(2), own_bias[0] if own_bias else None, self._sigmoid)
        return y, (given, x, moments, y if self._sigmoid else None)

    def backward(self, gradient, kept, parameters, needs):
        given, x, moments, y = kept
        gamma, beta, mixed, *own_bias = parameters[self._own :]
        arguments = (gradient.contiguous(), y, x, gamma, beta, mixed.flatten(2), moments, self._head.numbers[1])
        grads = ops.loaded_head_backward_(*arguments)  # nobody else reads x, which becomes its gradient
        inputs, own = self._conv.backward(x, given, parameters[: self._own], needs)
        return inputs, [*own, *grads[: 3 + len(own_bias)]]
