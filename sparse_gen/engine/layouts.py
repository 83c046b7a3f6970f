"""The ways in which a convolution can run, and the rule that chooses among them."""

from __future__ import annotations

import torch

from sparse_gen.engine.graph import Conv
from sparse_gen.engine.steps import DenseConvStep, SparseConvStep, Step, TapConvStep, UpsampledSparseConvStep

# Above this a layer's dense convolution is the faster one.
DENSEST = 0.5


def candidates(conv: Conv, mask: torch.Tensor) -> list[str]:
    """The layouts that can run a convolution, the rule's choice first.

    Args:
        conv: what is computed.
        mask: its kept weights inside the live channels, (out, in, kh, kw).
    """
    if conv.upsample is None:
        sparse = ["sparse"]
    elif conv.upsample == "nearest":
        sparse = ["taps", "upsampled sparse"]
    else:
        sparse = ["upsampled sparse"]
    dense = ["dense"]
    return dense + sparse if mask.double().mean() > DENSEST else sparse + dense


def make_step(layout: str, conv: Conv, mask: torch.Tensor) -> tuple[Step, bool]:
    """The step of a layout, and whether its weight is given as kept values alone.

    Raises:
        ValueError: there is no such layout.
    """
    if layout == "dense":
        return DenseConvStep(conv), False
    steps = {"sparse": SparseConvStep, "taps": TapConvStep, "upsampled sparse": UpsampledSparseConvStep}
    if layout not in steps:
        raise ValueError(f"expected a layout out of dense, {', '.join(steps)}, got {layout!r}")
    return steps[layout](conv, mask), True
