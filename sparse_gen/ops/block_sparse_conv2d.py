"""Convolution with block-sparse weights: whole blocks of output × input channels are kept or pruned at each tap.

    out[o, y, x] = bias[o] + Σ_(i, ky, kx) weight[o, i, ky, kx] · pad(in)[i, stride · y + ky, stride · x + kx]

over the taps of the blocks that o belongs to. The output channels of a block share every load of the input, in the
gradients too, which is what an unstructured pattern cannot do. Values are given as those of `sparse_conv2d`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from sparse_gen.ops.convolution import (
    PADDING_MODES,
    TORCH_MODES,
    check_convolution,
    check_padding,
    register_sparse_convolution,
)


@dataclass(frozen=True)
class BlockPattern:
    """Which blocks of a convolution's weight are kept.

    A block is as many columns as it has input channels: one input channel at one tap, for all its output channels.

    Attributes:
        shape: of the dense weight, (out, in, kernel height, kernel width).
        stride: 1 or 2.
        block: (output, input) channels of a block; the last ones of the weight may have fewer.
        index: (kept,) int64, ascending, places in the flat dense weight: the order of the values.
        order: (kept,) int64, the values sorted by output block, column and output channel.
        columns: (3, columns) int32, input channel, row and column of the kernel, those of an output block together.
        starts: (output blocks + 1,) int64, where each output block's columns begin.
    """

    shape: tuple[int, int, int, int]
    stride: int
    block: tuple[int, int]
    index: torch.Tensor
    order: torch.Tensor
    columns: torch.Tensor
    starts: torch.Tensor

    @classmethod
    def of(cls, mask: torch.Tensor, block: tuple[int, int], stride: int = 1) -> BlockPattern:
        """The pattern of a bool mask.

        Args:
            mask: (out, in, kernel height, kernel width), True where kept, constant on every block.
            block: (output, input) channels of a block, from 1 on; blocks at the end of the weight are cut.
            stride: 1 or 2.

        Raises:
            ValueError: the mask is no such tensor or not constant on a block (the first one is named), or the
                block or the stride is out of its range.
        """
        if mask.ndim != 4 or mask.dtype != torch.bool or 0 in mask.shape:
            raise ValueError(
                f"expected a bool mask of shape (out, in, kh, kw), got {tuple(mask.shape)} of {mask.dtype}"
            )
        if stride not in (1, 2):
            raise ValueError(f"expected stride 1 or 2, got {stride}")
        block = tuple(block)
        if len(block) != 2 or min(block) < 1:
            raise ValueError(f"expected a block of (output, input) channels, each from 1 on, got {block}")
        _check_constant(mask, block)

        out_channels, in_channels, kernel_h, kernel_w = shape = tuple(mask.shape)
        output, channel, ky, kx = mask[:: block[0]].nonzero().T
        # Tap by tap, the taps of one phase of the stride together: so the input's gradient goes through them.
        phase = ky % stride * stride + kx % stride
        key = (((output * stride**2 + phase) * kernel_h + ky) * kernel_w + kx) * in_channels + channel
        output, channel, ky, kx = torch.stack([output, channel, ky, kx])[:, key.argsort()]

        member = output[:, None] * block[0] + torch.arange(block[0], device=mask.device)
        place = ((member * in_channels + channel[:, None]) * kernel_h + ky[:, None]) * kernel_w + kx[:, None]
        rank = mask.flatten().cumsum(0) - 1
        starts = F.pad(torch.bincount(output, minlength=-(-out_channels // block[0])).cumsum(0), (1, 0))
        return cls(
            shape,
            stride,
            block,
            mask.flatten().nonzero()[:, 0],
            rank[place[member < out_channels]],
            torch.stack([channel, ky, kx]).to(torch.int32),
            starts,
        )


def _check_constant(mask: torch.Tensor, block: tuple[int, int]) -> None:
    first = mask[:: block[0], :: block[1]]
    same = first.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[: len(mask), : mask.shape[1]]
    mixed = (mask != same).nonzero()
    if len(mixed):
        places = torch.cat([mixed[:, :2] // torch.tensor(block, device=mask.device), mixed[:, 2:]], 1)
        output, channel, ky, kx = min(places.tolist())
        output, channel = output * block[0], channel * block[1]
        raise ValueError(
            f"expected a mask that is constant on blocks of {block[0]}×{block[1]} channels, got a mixed one at output "
            f"channels {output} to {min(output + block[0], len(mask)) - 1}, input channels {channel} to "
            f"{min(channel + block[1], mask.shape[1]) - 1}, tap ({ky}, {kx})"
        )


def block_sparse_conv2d_reference(
    x, values, bias, index, order, columns, starts, block_out, out_channels, kernel_h, kernel_w, stride, padding, mode
):
    outputs = []
    for e in range(len(x)):
        weight = x.new_zeros(out_channels * x.shape[1] * kernel_h * kernel_w).scatter(0, index, values[e])
        padded = F.pad(x[e : e + 1], [padding] * 4, mode=TORCH_MODES[mode]) if padding else x[e : e + 1]
        weight = weight.view(out_channels, x.shape[1], kernel_h, kernel_w)
        outputs.append(F.conv2d(padded, weight, None if bias is None else bias[e], stride=stride))
    return torch.cat(outputs)


def block_sparse_conv2d_fake(
    x, values, bias, index, order, columns, starts, block_out, out_channels, kernel_h, kernel_w, stride, padding, mode
):
    height = (x.shape[2] + 2 * padding - kernel_h) // stride + 1
    return x.new_empty(len(x), out_channels, height, (x.shape[3] + 2 * padding - kernel_w) // stride + 1)


_run = register_sparse_convolution(
    "Tensor index, Tensor order, Tensor columns, Tensor starts,"
    " int block_out, int out_channels, int kernel_h, int kernel_w, int stride, int padding, int mode",
    reference=block_sparse_conv2d_reference,
    fake=block_sparse_conv2d_fake,
)


def block_sparse_conv2d(
    x: torch.Tensor,
    values: torch.Tensor,
    pattern: BlockPattern,
    bias: torch.Tensor | None = None,
    *,
    padding: int = 0,
    padding_mode: str = "zeros",
) -> torch.Tensor:
    """Convolve each experiment's image with its kept blocks.

    Args:
        x: (E, in, H, W), float32 or float64, contiguous.
        values: (E, kept), in the order of `pattern.index`.
        pattern: which blocks these are; shared by all experiments.
        bias: (E, out), or None.
        padding: pixels added on every side, 0 and up; reflection needs more pixels than that.
        padding_mode: "zeros", "reflect" or "replicate".

    Returns:
        (E, out, H', W'), H' = ⌊(H + 2 · padding − kernel height) / stride⌋ + 1; differentiable in x, values, bias.

    Raises:
        ValueError: shapes, dtypes, devices or the padding do not fit together.
    """
    check_convolution(x, values, bias, pattern.shape, len(pattern.index), padding_mode)
    check_padding(x, pattern.shape, padding, padding_mode)
    out_channels, _, kernel_h, kernel_w = pattern.shape
    return _run(
        x.contiguous(), values.contiguous(), None if bias is None else bias.contiguous(),
        pattern.index, pattern.order, pattern.columns, pattern.starts, pattern.block[0],
        out_channels, kernel_h, kernel_w, pattern.stride, padding, PADDING_MODES.index(padding_mode),
    )  # fmt: skip
