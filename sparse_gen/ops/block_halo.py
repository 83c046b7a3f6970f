"""What runs `block_sparse_conv2d` on CUDA where its compiled kernels are there, and the lists that these read.

The kernels stage a tile of some input channels, with its halo, in shared memory, and let every kept weight of these
channels read it there. So a list runs over chunks of channels; within one, over groups of 8, 16 or 32 output channels;
and within a group over columns, one input channel at one tap, in steps that tensor cores multiply at once. The image's
gradient is the same operation on the output's gradient, with lists of its own. Where a group is larger than the mask's
blocks, its columns are all that any of its channels keeps, and the others' weights there are zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from sparse_gen.ops.block_sparse_conv2d import block_sparse_conv2d_fake, block_sparse_conv2d_reference
from sparse_gen.ops.convolution import backward_fake, needed_gradients
from sparse_gen.ops.dispatch import register_operator, serve_on_cuda

# Columns of a step and of a piece: the depth of one product of tensor cores, and the rows of one.
STEP, PIECE = 8, 16
_WARPS = 8
# Words of shared memory for a block of threads. Two convolutions fit on a multiprocessor of every GPU from sm_80 on; of
# the weights' gradient two fit on an H100's or H200's, one on those of sm_86.
_FORWARD_WORDS, _GRADIENT_WORDS = 48 << 8, 96 << 8
_FORWARD_CHANNELS, _GRADIENT_CHANNELS = 32, 64
# Of an image of few tiles the sum over channels is split among blocks, by chunks, which are smaller for that.
_FEW_PIXELS, _FEW_CHANNELS = 32 * 32, 8
_FORWARD_PIXELS, _GRADIENT_PIXELS, _GRADIENT_ROW = 256, 64, 68
_SLAB = 128  # output channels whose gradient is staged at once

_known = WeakTensorKeyDictionary()


@dataclass(frozen=True)
class HaloLists:
    """The columns of every phase, chunk of channels and group, one after the other.

    Attributes:
        codes: (steps · 8,) int32, channel of the chunk · 2¹⁶ + row · 2⁸ + column of the window; what fills up a run
            repeats its first column.
        slots: (steps · 8, width) int32, which value is the weight of each of a group's channels, -1 for a zero.
        starts: (phases · chunks · groups + 1,) int32, the first step of each.
        chunk: channels of a chunk.
        block: channels that groups of `width` are cut from.
    """

    codes: torch.Tensor
    slots: torch.Tensor
    starts: torch.Tensor
    chunk: int
    block: int


@dataclass(frozen=True)
class HaloRounds:
    """The columns for the weights' gradient, in pieces of 16; the pieces of a round are one block's work.

    Attributes:
        codes, slots: as of `HaloLists`, 16 columns a piece.
        pieces: (pieces,) int32, each one's group within its slab.
        rounds: (4, rounds) int32, slab, chunk, first piece and number of pieces.
        chunk: channels of a chunk.
        slab: groups whose gradient is staged at once.
        most: the most pieces of a round.
        block: as of `HaloLists`.
    """

    codes: torch.Tensor
    slots: torch.Tensor
    pieces: torch.Tensor
    rounds: torch.Tensor
    chunk: int
    slab: int
    most: int
    block: int


class _Groups:
    """Channels that share a list; blocks smaller than a product's eight channels go together."""

    def __init__(self, block: int, channels: int, tf32: bool):
        self.block = max(block, 8 // block * block)
        widths = (8, 16, 32) if tf32 else (8, 16)
        self.width = next(width for width in widths if width >= min(self.block, widths[-1]))
        self._of_block = -(-self.block // self.width)
        self.count = -(-channels // self.block) * self._of_block

    def of(self, channel: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Each channel's group and its place there."""
        within = channel % self.block
        return channel // self.block * self._of_block + within // self.width, within % self.width


def _columns(key, member, runs: int, width: int, multiple: int):
    """Distinct columns, run by run, each run filled up to a multiple of columns.

    Args:
        key: of each value its run and its column's channel, row and column of the window; int64, (kept,) each.
        member: (kept,), each value's place in its group.

    Returns:
        codes, slots and starts, the latter in columns.
    """
    run, (channel, row, tap) = key
    # Tap by tap: neighbouring channels at one tap lie in different banks of shared memory.
    distinct, column = (((run << 8 | row) << 8 | tap) << 16 | channel).unique(return_inverse=True)
    run, code = distinct >> 32, (distinct & 0xFFFF) << 16 | distinct >> 16 & 0xFFFF
    counts = torch.bincount(run, minlength=runs)
    starts = F.pad((-(-counts // multiple) * multiple).cumsum(0), (1, 0))
    place = torch.arange(len(distinct), device=run.device) - (counts.cumsum(0) - counts)[run] + starts[run]
    total = int(starts[-1])
    slots = place.new_full((total, width), -1)
    slots[place[column], member] = torch.arange(len(column), device=run.device)
    # What fills a run up repeats its first column: nothing else is read that a mask prunes.
    owner = torch.arange(runs, device=run.device).repeat_interleave(starts.diff())
    first = (counts.cumsum(0) - counts).clamp(max=max(len(code) - 1, 0))
    codes = code[first[owner]]
    codes[place] = code
    return codes.int(), slots.int(), starts


def _tile_words(pixels: int, step: int, window: tuple[int, int]) -> int:
    """Words of one channel's tile with its halo at most, however wide the tile is and whatever keeps banks apart."""
    shapes = [(pixels // columns, columns) for columns in (8, 16, 32)]
    return 32 + max(
        ((rows - 1) * step + window[0]) * (-(-((columns - 1) * step + window[1]) // step) * step)
        for rows, columns in shapes
    )


def _chunk(channels: int, most: int, words: int, room: int) -> int:
    """The channels of a chunk: a power of two that has room, or 0."""
    chunk = 1 << (min(most, channels) - 1).bit_length()
    while chunk and chunk * words > room:
        chunk //= 2
    return chunk


def _few(most: int, height: int, width: int) -> int:
    return _FEW_CHANNELS if height * width <= _FEW_PIXELS else most


def forward_lists(index, shape, block: int, stride: int, size: tuple[int, int], tf32: bool) -> HaloLists | None:
    """Those of the output's channels; None where a tile has no room in shared memory."""
    out_channels, channels, kernel_h, kernel_w = shape
    words = _tile_words(_FORWARD_PIXELS, stride, (kernel_h, kernel_w))
    chunk = _chunk(channels, _few(_FORWARD_CHANNELS, *size), words, _FORWARD_WORDS)
    if chunk == 0 or max(kernel_h, kernel_w) > 256:
        return None
    (output, channel, row, column), groups = torch.unravel_index(index, shape), _Groups(block, out_channels, tf32)
    group, member = groups.of(output)
    run = channel // chunk * groups.count + group
    code = channel % chunk, row, column
    runs = -(-channels // chunk) * groups.count
    codes, slots, starts = _columns((run, code), member, runs, groups.width, STEP)
    return HaloLists(codes, slots, (starts // STEP).int(), chunk, groups.block)


def input_gradient_lists(index, shape, block: int, stride: int, size, tf32: bool) -> HaloLists | None:
    """Those of the input's channels, phase by phase of the stride; None where a tile has no room in shared memory."""
    out_channels, channels, kernel_h, kernel_w = shape
    window = (kernel_h - 1) // stride + 1, (kernel_w - 1) // stride + 1
    chunk = _chunk(
        out_channels, _few(_FORWARD_CHANNELS, *size), _tile_words(_FORWARD_PIXELS, 1, window), _FORWARD_WORDS
    )  # fmt: skip
    if chunk == 0 or max(window) > 256:
        return None
    (output, channel, row, column), groups = torch.unravel_index(index, shape), _Groups(block, channels, tf32)
    group, member = groups.of(channel)
    chunks, phase = -(-out_channels // chunk), row % stride * stride + column % stride
    run = (phase * chunks + output // chunk) * groups.count + group
    # A tap further down reads the output's gradient further up.
    code = output % chunk, window[0] - 1 - row // stride, window[1] - 1 - column // stride
    runs = stride**2 * chunks * groups.count
    codes, slots, starts = _columns((run, code), member, runs, groups.width, STEP)
    return HaloLists(codes, slots, (starts // STEP).int(), chunk, groups.block)


def _pieces_at_once(width: int) -> int:
    """`kPieces` of csrc/cuda/block_sparse_conv2d_gradient_body.h."""
    return 8 if width == 8 else 8 - width // 8


def weight_gradient_rounds(index, shape, block: int, stride: int, size, tf32: bool) -> HaloRounds | None:
    """Those of the kept weights; None where a tile has no room in shared memory."""
    out_channels, channels, kernel_h, kernel_w = shape
    groups = _Groups(block, out_channels, tf32)
    slab = min(groups.count, _SLAB // groups.width)
    room = _GRADIENT_WORDS - slab * groups.width * (_GRADIENT_ROW + 1)
    words = _tile_words(_GRADIENT_PIXELS, stride, (kernel_h, kernel_w))
    chunk = _chunk(channels, _GRADIENT_CHANNELS, words, room)
    if chunk == 0 or max(kernel_h, kernel_w) > 256:
        return None
    output, channel, row, column = torch.unravel_index(index, shape)
    group, member = groups.of(output)
    slabs, chunks = -(-groups.count // slab), -(-channels // chunk)
    run = ((group // slab) * chunks + channel // chunk) * slab + group % slab
    code = channel % chunk, row, column
    codes, slots, starts = _columns((run, code), member, slabs * chunks * slab, groups.width, PIECE)

    counts = (starts // PIECE).diff()
    pieces = torch.arange(slab, device=index.device).repeat(slabs * chunks).repeat_interleave(counts)
    capacity, rounds, first = _WARPS * _pieces_at_once(groups.width), [], 0
    for number, count in enumerate(counts.view(-1, slab).sum(1).tolist()):
        for begin in range(0, count, capacity):
            rounds.append((number // chunks, number % chunks, first + begin, min(capacity, count - begin)))
        first += count
    most = max((count for *_, count in rounds), default=0)
    table = torch.tensor(rounds, dtype=torch.int32, device=index.device).view(-1, 4).T.contiguous()
    return HaloRounds(codes, slots, pieces.int(), table, chunk, slab, most, groups.block)


def _remembered(build: Callable, index: torch.Tensor, *key: Any):
    """Lists are built when a pattern is first seen: under a CUDA graph, in its warm-up."""
    lists = _known.setdefault(index, {})
    if (build, key) not in lists:
        lists[build, key] = build(index, *key)
    return lists[build, key]


def _forward(x, values, bias, index, order, columns, starts, block, out_channels, kernel_h, kernel_w, stride, *padding):
    shape, tf32 = (out_channels, x.shape[1], kernel_h, kernel_w), torch.backends.cudnn.allow_tf32
    lists = _remembered(forward_lists, index, shape, block, stride, tuple(x.shape[2:]), tf32)
    if lists is None or x.dtype != torch.float32:
        return NotImplemented
    return torch.ops.sparse_gen.block_sparse_conv2d_halo(
        x, values, bias, index, lists.codes, lists.slots, lists.starts, lists.chunk, lists.block,
        out_channels, kernel_h, kernel_w, stride, *padding, tf32,
    )  # fmt: skip


def _backward(
    grad_out, x, values, index, order, columns, starts, block, out_channels, kernel_h, kernel_w, stride, padding, mode,
    *needs,
):  # fmt: skip
    shape, tf32 = (out_channels, x.shape[1], kernel_h, kernel_w), torch.backends.cudnn.allow_tf32
    given = stride, tuple(x.shape[2:]), tf32
    lists = _remembered(input_gradient_lists, index, shape, _remembered(_input_block, index, shape), *given)
    rounds = _remembered(weight_gradient_rounds, index, shape, block, *given)
    if lists is None or rounds is None or x.dtype != torch.float32:
        return NotImplemented
    return torch.ops.sparse_gen.block_sparse_conv2d_halo_backward(
        grad_out, x, values, index, lists.codes, lists.slots, lists.starts, lists.chunk, lists.block,
        rounds.codes, rounds.slots, rounds.pieces, rounds.rounds, rounds.chunk, rounds.slab, rounds.most, rounds.block,
        out_channels, kernel_h, kernel_w, stride, padding, mode, tf32, *needs,
    )  # fmt: skip


def _input_block(index: torch.Tensor, shape: tuple[int, int, int, int]) -> int:
    from sparse_gen.kernels.block_lists import input_block

    return input_block(index, shape)


def _halo_reference(x, values, bias, index, codes, slots, starts, chunk, block, *geometry_and_precision):
    *geometry, _ = geometry_and_precision
    return block_sparse_conv2d_reference(x, values, bias, index, None, None, None, block, *geometry)


def _halo_fake(x, values, bias, index, codes, slots, starts, chunk, block, *geometry_and_precision):
    *geometry, _ = geometry_and_precision
    return block_sparse_conv2d_fake(x, values, bias, index, None, None, None, block, *geometry)


def _halo_backward_reference(grad_out, x, values, index, *rest):
    *geometry, _, needs_grad_x, needs_grad_values = rest[-9:]

    def convolve(x, values):
        return block_sparse_conv2d_reference(x, values, None, index, None, None, None, None, *geometry)

    return needed_gradients(convolve, grad_out, x, values, needs_grad_x, needs_grad_values)


_LISTS = "Tensor index, Tensor codes, Tensor slots, Tensor starts, int chunk, int block"
_ROUNDS = (
    "Tensor piece_codes, Tensor piece_slots, Tensor pieces, Tensor rounds,"
    " int piece_chunk, int slab, int most, int piece_block"
)
_GEOMETRY = "int out_channels, int kernel_h, int kernel_w, int stride, int padding, int mode, bool tf32"
register_operator(
    f"block_sparse_conv2d_halo(Tensor x, Tensor values, Tensor? bias, {_LISTS}, {_GEOMETRY}) -> Tensor",
    reference=_halo_reference,
    fake=_halo_fake,
)
register_operator(
    f"block_sparse_conv2d_halo_backward(Tensor grad_out, Tensor x, Tensor values, {_LISTS}, {_ROUNDS}, {_GEOMETRY},"
    " bool needs_grad_x, bool needs_grad_values) -> (Tensor, Tensor)",
    reference=_halo_backward_reference,
    fake=backward_fake,
)
serve_on_cuda("block_sparse_conv2d", "block_sparse_conv2d_halo", _forward)
serve_on_cuda("block_sparse_conv2d_backward", "block_sparse_conv2d_halo_backward", _backward)
