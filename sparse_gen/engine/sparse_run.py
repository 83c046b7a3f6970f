"""A masked network run on the sparse operators, each experiment with its own kept weights and patterns."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import nn

from sparse_gen.engine.layout import ParameterLayout
from sparse_gen.engine.lower import Lowered, capture, convolutions, fuse_convolutions, fuse_norms
from sparse_gen.ops.sparse_conv2d import SparsePattern
from sparse_gen.ops.sparse_upsample_conv2d import TapPattern

# Above this a layer's dense convolution is the faster one; a rule and not a measurement, so that a run's bits do not
# depend on what else the machine did when the plan was made.
DENSEST = 0.5


class SparseRun:
    """Runs a network from its kept values.

    Attributes:
        kernels: weight's name → which operator computes its convolution.
        reasons: weight's name → why its convolution stays PyTorch's.

    Args:
        network: from `training_copy`.
        layout: of its parameters.
        keep: (E or 1, N) bool.
        example_input: (E or 1, C, H, W); its size is the only one that can run.

    Raises:
        Whatever torch.export raises for a network that it cannot capture.
    """

    def __init__(self, network: nn.Module, layout: ParameterLayout, keep: torch.Tensor, example_input: torch.Tensor):
        self._layout, self._size = layout, example_input.shape[1:]
        self._lowered: Lowered = capture(network, example_input[:1])
        fuse_norms(self._lowered)
        found = convolutions(self._lowered)
        masks = layout.views(keep)
        density = {name: masks[name].double().mean().item() for name in found}
        sparse = {name: conv for name, conv in found.items() if density[name] <= DENSEST}
        fuse_convolutions(self._lowered, found, sparse)
        self.kernels, self.reasons = {}, dict(self._lowered.reasons)
        for name, conv in found.items():
            if name not in sparse:
                self.reasons[name] = f"density {density[name]:.0%}"
            else:
                fold = ", pool folded" if conv.pool is not None else ""
                self.kernels[name] = "sparse_upsample_conv2d, taps" if conv.upsampled else f"sparse_conv2d{fold}"
        self._experiments = [
            _Experiment(layout, {name: mask[e] for name, mask in masks.items()}, sparse) for e in range(len(keep))
        ]

    def takes(self, z: torch.Tensor) -> bool:
        """Whether z has the size that was captured."""
        return z.shape[1:] == self._size

    def __call__(self, values: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """(E, kept) and (E or 1, C, H, W) to (E, …)."""
        outputs = []
        for e in range(len(values)):
            own = self._experiments[e if len(self._experiments) > 1 else 0]
            own_z = z[e : e + 1] if len(z) > 1 else z
            outputs.append(self._lowered(own.parameters(values[e]), own.patterns, own_z))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


class _Experiment:
    """How one experiment's kept values become its parameters."""

    def __init__(self, layout: ParameterLayout, masks: dict[str, torch.Tensor], sparse: dict[str, Any]):
        self._counts = [int(mask.sum()) for mask in masks.values()]
        self._shapes = layout.shapes
        self._places: dict[str, torch.Tensor | None] = {}  # None: kept whole
        self.patterns: dict[str, SparsePattern | TapPattern] = {}
        for name, mask in masks.items():
            if name in sparse:
                conv = sparse[name]
                pattern = TapPattern.of(mask) if conv.upsampled else SparsePattern.of(mask, conv.pattern_stride)
                self.patterns[name] = pattern
            elif mask.all():
                self._places[name] = None
            else:
                self._places[name] = mask.flatten().nonzero()[:, 0]

    def parameters(self, values: torch.Tensor) -> dict[str, torch.Tensor]:
        parameters = {}
        for (name, shape), kept in zip(self._shapes.items(), values.split(self._counts), strict=True):
            if name in self.patterns:
                parameters[name] = kept
            elif self._places[name] is None:
                parameters[name] = kept.view(shape)
            else:
                parameters[name] = kept.new_zeros(prod(shape)).scatter(0, self._places[name], kept).view(shape)
        return parameters
