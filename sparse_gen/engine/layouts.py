"""The ways in which a convolution can run, and the rule that chooses among them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from sparse_gen.engine.graph import Conv
from sparse_gen.engine.steps import DenseConvStep, SparseConvStep, Step, TapConvStep, UpsampledSparseConvStep

# These hold kept weights alone; the others the whole weight, with zeros.
KEPT_ALONE = ("sparse", "taps", "upsampled sparse")
# Above this a layer's dense convolution is the faster one.
DENSEST = 0.5


class ConvStage(NamedTuple):
    """A convolution as it is to run, which is what a choice of its layout goes by.

    Attributes:
        name: of its node.
        conv: what is computed.
        mask: its kept weights inside the live channels, (out, in, kh, kw).
        size: height and width of the input.
        needs_gradient: whether the input's gradient is asked for; z and what depends on it alone need none.
        biased: whether a bias is added.
    """

    name: str
    conv: Conv
    mask: torch.Tensor
    size: tuple[int, int]
    needs_gradient: bool
    biased: bool


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


def multiplications(layout: str, conv: Conv, mask: torch.Tensor, positions: int) -> int:
    """Of a forward pass.

    Args:
        layout, conv, mask: as for `make_step`.
        positions: pixels of the output, a folded pool behind them.
    """
    weights = mask.numel() if layout == "dense" else int(mask.sum())
    return weights * positions // (4 if layout == "taps" else 1)  # taps run on the image before its up-sampling
