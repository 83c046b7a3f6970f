"""Seeded initialisation: the same weights on every device and PyTorch version."""

from __future__ import annotations

import torch
from torch import nn

from sparse_gen.ops.philox import Stream, seed_tensor, uniform


@torch.no_grad()
def initialise(module: nn.Module, seed: int) -> None:
    """Draw every convolution's weight and bias from U(-b, b), b = 1/√fan_in, PyTorch's own default distribution.

    A weight's random number is that of its place in the flat vector of all parameters, so a network's
    initialisation is a pure function of its architecture and `seed`. Normalisation layers keep γ = 1, β = 0.

    Raises:
        ValueError: the seed is no integer.
    """
    if all(parameter.is_meta for parameter in module.parameters()):
        return  # shapes without values, to count them
    total = sum(parameter.numel() for parameter in module.parameters())
    numbers = uniform(seed_tensor(seed), 0, Stream.INIT, total)[0]
    bound = {}
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            fan_in = layer.weight[0].numel()
            bound.update({id(parameter): fan_in**-0.5 for parameter in layer.parameters()})
    position = 0
    for parameter in module.parameters():
        count = parameter.numel()
        if id(parameter) in bound:
            draw = numbers[position : position + count].view_as(parameter)
            parameter.copy_((2 * draw - 1) * bound[id(parameter)])
        position += count
