"""The stages as what runs them: each computes a value, keeps what its backward needs, and gives the gradients back.

A step sees tensors without autograd. What it keeps is the input of a convolution or a normalisation, never what can be
found again from it.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from sparse_gen.engine.graph import Call, Conv, Norm, Parameter, Value
from sparse_gen.ops.convolution import PADDING_MODES, TORCH_MODES, UPSAMPLE, upsampled
from sparse_gen.ops.sparse_conv2d import SparsePattern, phases
from sparse_gen.ops.sparse_upsample_conv2d import TapPattern

ops = torch.ops.sparse_gen

Tensors = list[torch.Tensor]
Gradients = list[torch.Tensor | None]


class Loaded(NamedTuple):
    """A value that its readers see through a load, see `norm_load`: x (E, C, H, W) and load (E, C, 5).

    With `norm`, what `norm_conv_backward` takes of the normalisation, its one reader may go back through that as well,
    and gives `BehindNorm`.
    """

    x: torch.Tensor
    load: torch.Tensor | None
    norm: tuple | None = None


class BehindNorm(NamedTuple):
    """The gradient of what was normalised, and those of the norms' four parameters."""

    gradient: torch.Tensor
    parameters: Tensors


class Step:
    """One stage of all experiments that run in one pass; every tensor has their axis in front.

    `forward(inputs, parameters, trains)` gives the value and what is kept for the backward, if there will be one;
    `backward(gradient, kept, parameters, needs)` the gradients of the inputs (None where `needs` says so) and of the
    parameters.

    Attributes:
        reads_loads: whether an input may be `Loaded`; its gradient is then that of what a reader sees.
        constant_input: whether the input is the same at every step, so that what is made of it can be kept.
        owns_input: whether nobody else reads the input, so that the backward may write over it.
        splits: whether the gradient of its one input can be had by itself, from `input_gradient`, at no more cost.
        alone: whether nobody else reads the value.
    """

    splits = False
    reads_loads = False
    constant_input = False
    owns_input = False
    alone = False

    def forward(self, inputs: Tensors, parameters: Tensors, trains: bool) -> tuple[torch.Tensor, Any]:
        raise NotImplementedError

    def backward(
        self, gradient: torch.Tensor, kept: Any, parameters: Tensors, needs: list[bool]
    ) -> tuple[Gradients, Gradients]:
        raise NotImplementedError

    def input_gradient(self, gradient: torch.Tensor, kept: Any, parameters: Tensors) -> torch.Tensor:
        """The first of what `backward` gives, for a contiguous gradient."""
        raise NotImplementedError


def weight_and_bias(parameters: Tensors) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A convolution's parameters, (E, …) and (E, out) or None."""
    weight, *bias = parameters
    return weight, bias[0] if bias else None


def bias_gradient(gradient: torch.Tensor, bias: Tensors) -> Tensors:
    """That of a convolution's bias, (E, out), where it has one."""
    return [gradient.sum(dim=(2, 3))] if bias else []


class AutogradStep(Step):
    """A step that is written as plain PyTorch, experiment by experiment, and leaves its backward to autograd."""

    def compute(self, inputs: Tensors, parameters: Tensors) -> torch.Tensor:
        """The value (1, …) from inputs (1, …) and parameters without E."""
        raise NotImplementedError

    def _compute_all(self, inputs: Tensors, parameters: Tensors) -> torch.Tensor:
        experiments = max(map(len, (*inputs, *parameters)))
        rows = [
            self.compute([x[e : e + 1] for x in inputs], [parameter[e] for parameter in parameters])
            for e in range(experiments)
        ]
        return rows[0] if experiments == 1 else torch.cat(rows)

    def forward(self, inputs, parameters, trains):
        if not trains:
            return self._compute_all(inputs, parameters), None
        with torch.enable_grad():
            leaves = [tensor.detach().requires_grad_() for tensor in (*inputs, *parameters)]
            output = self._compute_all(leaves[: len(inputs)], leaves[len(inputs) :])
        return output.detach(), (output, leaves)

    def backward(self, gradient, kept, parameters, needs):
        output, leaves = kept
        asked = [leaf for leaf, need in zip(leaves, [*needs, *[True] * len(parameters)], strict=True) if need]
        if not output.requires_grad:  # detached, or nothing on the way can be differentiated
            return [None] * len(needs), [None] * len(parameters)
        found = iter(torch.autograd.grad(output, asked, gradient, allow_unused=True) if asked else ())
        inputs = [next(found) if need else None for need in needs]
        return inputs, list(found)


class CallStep(AutogradStep):
    """An ATen call as it was captured."""

    def __init__(self, call: Call, inputs: tuple[int, ...]):
        self._call, self._places = call, {value: place for place, value in enumerate(inputs)}

    def compute(self, inputs, parameters):
        given = iter(parameters)

        def fill(item):
            if isinstance(item, Value):
                return inputs[self._places[item.index]]
            if isinstance(item, Parameter):
                return next(given)
            if isinstance(item, (list, tuple)):
                return type(item)(fill(part) for part in item)
            return item

        arguments = fill(self._call.arguments)
        return self._call.target(*arguments, **{key: fill(value) for key, value in self._call.keywords.items()})


class SigmoidStep(Step):
    """What ends a generator; only its value is kept."""

    def forward(self, inputs, parameters, trains):
        y = torch.sigmoid(inputs[0])
        return y, y

    def backward(self, gradient, kept, parameters, needs):
        return [torch.ops.aten.sigmoid_backward(gradient, kept)], []


class ConcatStep(Step):
    def forward(self, inputs, parameters, trains):
        return torch.cat(inputs, dim=1), [tensor.shape[1] for tensor in inputs]

    def backward(self, gradient, kept, parameters, needs):
        return list(gradient.split(kept, dim=1)), []


class NormStep(Step):
    """`norm_act`: only its input is kept."""

    def __init__(self, norm: Norm):
        self._eps, self._slope = norm.eps, norm.slope

    def forward(self, inputs, parameters, trains):
        x = inputs[0].contiguous()
        y, mean, rstd = ops.norm_act(x, *parameters, self._eps, self._slope)
        return y, (x, mean, rstd)

    def backward(self, gradient, kept, parameters, needs):
        x, mean, rstd = kept
        grad_x, *grads = ops.norm_act_backward(gradient.contiguous(), x, *parameters, mean, rstd, self._slope)
        return [grad_x], grads


class NormLoadStep(Step):
    """`norm_load`: a normalisation, or two in a row, that the readers apply."""

    def __init__(self, norm: Norm, second: Norm | None = None):
        self.numbers = norm.eps, norm.slope, 0.0 if second is None else second.eps

    def forward(self, inputs, parameters, trains):
        x = inputs[0].contiguous()
        gamma, beta, gamma2, beta2 = self.rows(parameters)
        eps, slope, eps2 = self.numbers
        load, moments = ops.norm_load(x, gamma, beta, eps, slope, gamma2, beta2, eps2)
        return Loaded(x, load), (x, moments)

    def backward(self, gradient, kept, parameters, needs):
        x, moments = kept
        gamma, beta, gamma2, beta2 = self.rows(parameters)
        arguments = (gradient.contiguous(), x, gamma, beta, self.numbers[1], gamma2, beta2, moments)
        grad_x, *grads = ops.norm_load_backward(*arguments)
        return [grad_x], grads[: len(parameters)]

    @staticmethod
    def rows(parameters):
        """Both norms' gamma and beta as the operators take them, None where there is no second."""
        return [*parameters, None, None][:4]


class NormHeadStep(Step):
    """`norm_head`: a normalisation and the 1×1 convolution to a few channels that alone reads it."""

    def __init__(self, norm: Norm):
        self.numbers = norm.eps, norm.slope

    def forward(self, inputs, parameters, trains):
        x = inputs[0].contiguous()
        gamma, beta, weight, *bias = parameters
        given = (gamma, beta, weight.flatten(2), bias[0] if bias else None)
        y, mean, rstd = ops.norm_head(x, *given, *self.numbers)
        return y, (x, mean, rstd)

    def backward(self, gradient, kept, parameters, needs):
        x, mean, rstd = kept
        gamma, beta, weight, *bias = parameters
        arguments = (gradient.contiguous(), x, gamma, beta, weight.flatten(2), mean, rstd, self.numbers[1])
        if self.owns_input:
            grad_x, grads = x, ops.norm_head_backward_(*arguments)
        else:
            grad_x, *grads = ops.norm_head_backward(*arguments)
        return [grad_x], [*grads, *bias_gradient(gradient, bias)]


class KeptConvStep(Step):
    """A convolution of kept values alone; a 2×2 pool behind it becomes stride 2 on the 2×2 means of the padded input.

    `gradients(gradient, x, values, load, needs_x, needs_values)` is the operator's backward.
    """

    reads_loads = splits = True

    def __init__(self, conv: Conv):
        self._pool, self._padding = conv.pool, (conv.padding, PADDING_MODES.index(conv.padding_mode))
        self.stride, self.padding = (2, (0, 0)) if conv.pool else (conv.stride, self._padding)

    def gradients(
        self, gradient: torch.Tensor, x: torch.Tensor, values: torch.Tensor, load: torch.Tensor | None, *needs: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError

    def source(self, given: torch.Tensor | Loaded) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What is convolved, and the load that it is read through."""
        x, load = given[:2] if isinstance(given, Loaded) else (given.contiguous(), None)
        return (ops.pooled_means(x, load, *self._padding), None) if self._pool else (x, load)

    def backward(self, gradient, kept, parameters, needs):
        values, *bias = parameters
        gradient = gradient.contiguous()
        # The source is made again rather than kept: it is as large as what it is made from.
        x, load = self.source(kept)
        grad_x, grad_values = self.gradients(gradient, x, values, load, needs[0], True)
        return [self._unpooled(grad_x) if needs[0] else None], [grad_values, *bias_gradient(gradient, bias)]

    def input_gradient(self, gradient, kept, parameters):
        # That of what is read through a load depends on no number of the input, nor on the load.
        x = kept.x if isinstance(kept, Loaded) else kept.contiguous()
        if self._pool:
            x = x.new_empty(*x.shape[:2], *(length + 2 * self._padding[0] - 1 for length in x.shape[2:]))
        return self._unpooled(self.gradients(gradient, x, parameters[0], None, True, False)[0])

    def _unpooled(self, grad: torch.Tensor) -> torch.Tensor:
        return ops.pooled_means_backward(grad, *self._padding) if self._pool else grad


class SparseConvStep(KeptConvStep):
    """`sparse_conv2d`."""

    def __init__(self, conv: Conv, mask: torch.Tensor):
        super().__init__(conv)
        self._pattern = SparsePattern.of(mask, self.stride)
        self._arguments = _arguments(self._pattern, *self.padding)
        self._known: tuple[weakref.ref, _OverPhases] | None = None

    def _prepared(self, given: torch.Tensor | Loaded) -> _OverPhases | None:
        """A constant input as the kernel reads it without a copy."""
        if not self.constant_input or isinstance(given, Loaded):
            return None
        if self._known is None or self._known[0]() is not given:
            padding, mode = self._padding
            padded = self.source(given)[0] if self._pool else F.pad(given, [padding] * 4, mode=TORCH_MODES[mode])
            self._known = weakref.ref(given), _OverPhases(padded, self._pattern)
        return self._known[1]

    def forward(self, inputs, parameters, trains):
        values, bias = weight_and_bias(parameters)
        prepared = self._prepared(inputs[0])
        if prepared is not None:
            y = ops.sparse_conv2d(prepared.x, values[:, prepared.order], bias, *prepared.arguments, None)
        else:
            x, load = self.source(inputs[0])
            y = ops.sparse_conv2d(x, values, bias, *self._arguments, load)
        return y, inputs[0]

    def backward(self, gradient, kept, parameters, needs):
        prepared = None if needs[0] else self._prepared(kept)
        if prepared is None:
            return super().backward(gradient, kept, parameters, needs)
        values, *bias = parameters
        gradient = gradient.contiguous()
        arguments = (gradient, prepared.x, values[:, prepared.order], *prepared.arguments, None, False, True)
        _, grad_ordered = ops.sparse_conv2d_backward(*arguments)
        grad_values = torch.empty_like(values).index_copy_(1, prepared.order, grad_ordered)
        return [None], [grad_values, *bias_gradient(gradient, bias)]

    def gradients(self, gradient, x, values, load, *needs):
        return ops.sparse_conv2d_backward(gradient, x, values, *self._arguments, load, *needs)


class _OverPhases:
    """A convolution of an image that stays the same: on its phases, which are kept in its place."""

    def __init__(self, padded: torch.Tensor, pattern: SparsePattern):
        self.x = phases(padded, pattern)
        over, self.order = pattern.over_phases()
        self.arguments = _arguments(over, 0, 0)


def _arguments(pattern: SparsePattern, padding: int, mode: int) -> tuple:
    out_channels, _, kernel_h, kernel_w = pattern.shape
    places = (pattern.taps, pattern.by_output, pattern.by_input, pattern.input_order)
    return (*places, out_channels, kernel_h, kernel_w, pattern.stride, padding, mode)


class TapConvStep(Step):
    """`sparse_upsample_conv2d`: every tap on the small image."""

    reads_loads = True

    def __init__(self, conv: Conv, mask: torch.Tensor):
        taps = TapPattern.of(mask)
        pattern = taps.pattern
        out_channels, _, kernel_h, kernel_w = mask.shape
        self._pattern = (pattern.taps, taps.by_tap, taps.tap_order, pattern.by_input, pattern.input_order)
        mode, kind = PADDING_MODES.index(conv.padding_mode), UPSAMPLE.index(conv.upsample)
        self._pattern += (out_channels, kernel_h, kernel_w, conv.padding, mode, kind)

    def forward(self, inputs, parameters, trains):
        given = inputs[0] if isinstance(inputs[0], Loaded) else Loaded(inputs[0].contiguous(), None)
        values, bias = weight_and_bias(parameters)
        arguments = (given.x, values, bias, *self._pattern, given.load)
        return ops.sparse_upsample_conv2d(*arguments), given

    def backward(self, gradient, kept, parameters, needs):
        values, *bias = parameters
        gradient = gradient.contiguous()
        arguments = (gradient, kept.x, values, *self._pattern, kept.load, needs[0], True)
        grad_x, grad_values = ops.sparse_upsample_conv2d_backward(*arguments)
        return [grad_x if needs[0] else None], [grad_values, *bias_gradient(gradient, bias)]


class UpsampledSparseConvStep(Step):
    """`sparse_conv2d` on the image that was up-sampled in front of it."""

    def __init__(self, conv: Conv, mask: torch.Tensor):
        self._kind, self._inner = conv.upsample, SparseConvStep(conv, mask)

    def forward(self, inputs, parameters, trains):
        y, _ = self._inner.forward([upsampled(inputs[0], self._kind)], parameters, trains)
        return y, inputs[0]

    def backward(self, gradient, kept, parameters, needs):
        with torch.enable_grad():
            small = kept.detach().requires_grad_(needs[0])
            large = upsampled(small, self._kind)
        grads, own = self._inner.backward(gradient, large.detach(), parameters, needs)
        return [torch.autograd.grad(large, small, grads[0])[0] if needs[0] else None], own
