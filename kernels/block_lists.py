"""What a program of `block_sparse_conv2d` visits, by blocks of input channels as well as of output channels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

# The rows of a tile of the weight's gradient: tensor cores of sm_90 take no fewer.
CHUNK = 64

_known = WeakTensorKeyDictionary()


@dataclass(frozen=True)
class BlockLists:
    """What the kernels need beside the operator's own lists by output block.

    Attributes:
        most: the most columns of an output block.
        chunks: (2, chunks) int32, output block and first column of every CHUNK columns of one block.
        block_in: channels of an input block.
        order: (kept,) int64, the values sorted by input block, item and input channel.
        items: (3, items) int32, output channel, row and column of the kernel of what an input block is read by.
        starts: (input blocks · stride² + 1,) int64, where the items of each input block and phase of the tap begin.
        most_items: the most items of an input block and phase.
    """

    most: int
    chunks: torch.Tensor
    block_in: int
    order: torch.Tensor
    items: torch.Tensor
    starts: torch.Tensor
    most_items: int


def block_lists(index, starts, shape: tuple[int, int, int, int], stride: int) -> BlockLists:
    """The lists of a pattern, built when it is first seen: under a CUDA graph, in its warm-up.

    Args:
        index: (kept,) int64, places of the values in the flat dense weight, ascending.
        starts: (output blocks + 1,) int64, where each output block's columns begin.
        shape: of the dense weight.
        stride: 1 or 2.
    """
    lists = _known.setdefault(index, {})
    key = shape, stride
    if key not in lists:
        lists[key] = _build(index, starts, shape, stride)
    return lists[key]


def _build(index, starts, shape, stride) -> BlockLists:
    out_channels, channels, kernel_h, kernel_w = shape
    block_in = input_block(index, shape)

    counts = starts.diff()
    chunks = [
        torch.stack([torch.full_like(first, block), first])
        for block, (start, count) in enumerate(zip(starts.tolist(), counts.tolist(), strict=False))
        for first in [torch.arange(start, start + count, CHUNK, device=index.device)]
    ]

    places = [index // (channels * kernel_h * kernel_w), index // (kernel_h * kernel_w) % channels]
    output, channel, ky, kx = *places, index // kernel_w % kernel_h, index % kernel_w
    group = (channel // block_in * stride + ky % stride) * stride + kx % stride
    item = ((group * kernel_h + ky) * kernel_w + kx) * out_channels + output
    order = (item * channels + channel).argsort()
    first = torch.ones_like(order, dtype=torch.bool)
    first[1:] = item[order].diff() != 0
    firsts = order[first]
    group_counts = torch.bincount(group[firsts], minlength=-(-channels // block_in) * stride**2)
    return BlockLists(
        int(counts.max()),
        torch.cat(chunks, 1).int().contiguous(),
        block_in,
        order,
        torch.stack([output[firsts], ky[firsts], kx[firsts]]).int(),
        F.pad(group_counts.cumsum(0), (1, 0)),
        int(group_counts.max()),
    )


def input_block(index: torch.Tensor, shape: tuple[int, int, int, int]) -> int:
    """The largest block of input channels, up to 64, on which the mask of these kept weights is constant."""
    mask = torch.zeros(shape, dtype=torch.bool, device=index.device)
    mask.view(-1)[index] = True
    channels = shape[1]
    for block in range(min(64, channels), 1, -1):
        if torch.equal(mask[:, ::block].repeat_interleave(block, 1)[:, :channels], mask):
            return block
    return 1
