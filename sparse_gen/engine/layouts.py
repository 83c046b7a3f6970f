"""The ways in which a convolution can run, and the rule that chooses among them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from sparse_gen.engine.block_steps import BlockConvStep, block_of
from sparse_gen.engine.dense_steps import CornersConvStep, MaskedConvStep
from sparse_gen.engine.fused_step import FusedConvStep
from sparse_gen.engine.graph import Conv
from sparse_gen.engine.steps import SparseConvStep, Step, TapConvStep, UpsampledSparseConvStep
from sparse_gen.ops.convolution import PADDING_MODES
from sparse_gen.ops.dispatch import has_gpu_kernel
from sparse_gen.ops.masked_conv2d_layouts import UPSAMPLE, fastest_layout, why_not

# These hold kept weights alone; the others the whole weight, with zeros.
KEPT_ALONE = ("sparse", "taps", "upsampled sparse", "blocks")
# Layouts with the whole weight, and what `masked_conv2d` calls them.
DENSE = {
    "dense": "direct", "dense tiles": "tiles", "dense taps": "taps", "dense gemm": "gemm", "dense split": "split",
    "dense split taps": "split taps",
}  # fmt: skip
# On a GPU: cuDNN on what is folded around it, and our own kernel, which reads padding and resampling by index.
DENSE_GPU = {"dense": "direct", "dense phases": "phase", "dense fused": "fused"}
_WHOLE = DENSE | DENSE_GPU
# What a layout needs a kernel of on a GPU; PyTorch's convolutions run everywhere.
_OPERATORS = {
    "sparse": "sparse_conv2d",
    "taps": "sparse_upsample_conv2d",
    "upsampled sparse": "sparse_conv2d",
    "blocks": "block_sparse_conv2d",
    "dense fused": "masked_conv2d_loaded",
}
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
        device: where it runs.
        experiments: that one launch serves; on the CPU, where kernels take one after the other, 1.
    """

    name: str
    conv: Conv
    mask: torch.Tensor
    size: tuple[int, int]
    needs_gradient: bool
    biased: bool
    device: torch.device = torch.device("cpu")
    experiments: int = 1


def candidates(stage: ConvStage) -> list[str]:
    """The layouts that can run a convolution, the rule's choice first."""
    conv, density = stage.conv, float(stage.mask.double().mean()) if stage.mask.numel() else 0.0
    if conv.upsample is None:
        kept = ["sparse"]
        if 0 < density < 1 and block_of(stage.mask) is not None:
            kept.insert(0, "blocks")
    else:
        kept = ["taps", "upsampled sparse"]
    dense = _dense_candidates(stage)
    # Nothing has been measured on a GPU yet; there tensor cores multiply the zeros along.
    return dense + kept if density > DENSEST or on_gpu(stage.device) else kept + dense


def on_gpu(device: torch.device) -> bool:
    return device.type != "cpu"


def has_kernel(layout: str, dtype: torch.dtype) -> bool:
    """Whether a layout runs on a GPU in something better than a reference."""
    return layout not in _OPERATORS or (dtype == torch.float32 and has_gpu_kernel(_OPERATORS[layout]))


def _dense_candidates(stage: ConvStage) -> list[str]:
    conv = stage.conv
    if conv.upsample == "bilinear_corners":
        return ["dense"]
    arguments = (conv.stride, conv.padding, PADDING_MODES.index(conv.padding_mode), UPSAMPLE.index(conv.upsample))
    shape = (1, *conv.shape)
    if on_gpu(stage.device):
        return [name for name, layout in DENSE_GPU.items() if why_not(layout, shape, *arguments, conv.pool) is None]
    able = [name for name, layout in DENSE.items() if why_not(layout, shape, *arguments, conv.pool) is None]
    first = fastest_layout(stage.size, (1, *stage.mask.shape), *arguments, conv.pool)
    return sorted(able, key=lambda name: DENSE[name] != first)


def make_step(layout: str, conv: Conv, mask: torch.Tensor, device: torch.device) -> tuple[Step, bool]:
    """The step of a layout for a device, and whether its weight is given as kept values alone.

    Raises:
        ValueError: there is no such layout.
    """
    if layout in _WHOLE:
        if conv.upsample == "bilinear_corners":
            return CornersConvStep(conv), False
        return FusedConvStep(conv) if layout == "dense fused" else MaskedConvStep(conv, _WHOLE[layout]), False
    steps = {
        "sparse": SparseConvStep,
        "taps": TapConvStep,
        "upsampled sparse": UpsampledSparseConvStep,
        "blocks": BlockConvStep,
    }
    if layout not in steps:
        raise ValueError(f"expected a layout out of {', '.join([*_WHOLE, *steps])}, got {layout!r}")
    return steps[layout](conv, mask.to(device)), True


def multiplications(layout: str, conv: Conv, mask: torch.Tensor, positions: int) -> int:
    """Of a forward pass.

    Args:
        layout, conv, mask: as for `make_step`.
        positions: pixels of the output, a folded pool behind them.
    """
    weights = mask.numel() if layout in _WHOLE else int(mask.sum())
    if layout == "dense phases":  # four convolutions with 2×2 summed taps in place of 3×3
        weights = weights * 4 // 9
    return weights * positions // (4 if "taps" in layout else 1)  # taps run on the image before its up-sampling
