"""Triton twin of `sparse_gen.ops.block_sparse_conv2d`: products of matrices that visit kept blocks only.

A column is one input channel at one tap. A program takes the pixels of one tile for one block of output channels and
runs over that block's columns, as many to a step as tensor cores want, whatever the size of the input blocks. The
image's gradient runs in the same way over what reads a block of input channels.

A step gathers its pixels anew from L1 or L2: Triton cannot keep an image's tile in shared memory for all output blocks.
csrc/cuda/block_sparse_conv2d.cu does, and runs in place of this where it was compiled (sparse_gen/ops/block_halo.py).
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparse_gen.kernels.block_lists import CHUNK, block_lists
from sparse_gen.kernels.fold import fold, plane_of
from sparse_gen.kernels.gather import Geometry, load_image, multiply
from sparse_gen.kernels.splits import add_splits, precision_of_torch, split, tile


@triton.jit
def _load_weights(
    p_values,  # pointer to one experiment's values, shape (kept,)
    p_order,  # pointer to places of the values, sorted by block, item and member of the block
    o_item,
    m_item,
    first,  # the block's first item
    o_member,
    members,  # of this block; the last one may have fewer
    block,  # members of the others
):
    """Weights of items × members, and 0 beyond."""
    m_weight = m_item[:, None] & (o_member < members)[None, :]
    o_place = first * block + (o_item - first)[:, None] * members + o_member[None, :]
    return tl.load(p_values + tl.load(p_order + o_place, mask=m_weight, other=0), mask=m_weight, other=0.0)


@triton.jit
def _forward_kernel(
    p_x,  # pointer to x, shape (E, channels, height, width)
    p_values,  # pointer to the kept values, shape (E, kept)
    p_bias,  # pointer to biases, shape (E, out_channels); not read unless BIAS
    p_order,  # pointer to the values' order by output block, column and output channel, int64, shape (kept,)
    p_columns,  # pointer to input channel, row and column of the kernel, int32, shape (3, total)
    p_starts,  # pointer to where each output block's columns begin, int64, shape (output blocks + 1,)
    p_out,  # pointer to output, shape (splits, E, out_channels, out_h * out_w)
    experiments,
    channels,
    height,
    width,
    out_channels,
    out_h,
    out_w,
    kept,
    total,
    block,  # output channels of a block
    tiles,  # programs that share a block of output channels
    iterations,  # of the loop over columns that a split does
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    MODE: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,  # pixels
    BLOCK_N: tl.constexpr,  # output channels
    BLOCK_K: tl.constexpr,  # columns
):
    i_block = tl.program_id(1) // tiles
    i_experiment = (tl.program_id(2) % experiments).to(tl.int64)
    i_split = tl.program_id(2) // experiments
    pixels = out_h * out_w
    o_pixel = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    m_pixel = o_pixel < pixels
    o_y = (o_pixel // out_w) * STRIDE - PADDING
    o_x = (o_pixel % out_w) * STRIDE - PADDING
    o_member = tl.program_id(1) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    members = tl.minimum(out_channels - i_block * block, block)
    p_x += i_experiment * channels * height * width
    p_values += i_experiment * kept
    first = tl.load(p_starts + i_block).to(tl.int32)
    last = tl.load(p_starts + i_block + 1).to(tl.int32)
    start = first + i_split * iterations * BLOCK_K
    stop = tl.minimum(start + iterations * BLOCK_K, last)

    b_out = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    for i in range(start, stop, BLOCK_K):
        o_column = i + tl.arange(0, BLOCK_K)
        m_column = o_column < stop
        o_channel = tl.load(p_columns + o_column, mask=m_column, other=0)
        o_tap_y = tl.load(p_columns + total + o_column, mask=m_column, other=0)
        o_tap_x = tl.load(p_columns + 2 * total + o_column, mask=m_column, other=0)
        b_x = load_image(
            p_x + o_channel[None, :] * (height * width),
            m_pixel[:, None] & m_column[None, :],
            o_y[:, None] + o_tap_y[None, :],
            o_x[:, None] + o_tap_x[None, :],
            p_x,
            m_column,
            height,
            width,
            MODE,
            0,
            False,
            False,
        )
        b_weight = _load_weights(p_values, p_order, o_column, m_column, first, o_member, members, block)
        b_out = multiply(b_x, b_weight, b_out, PRECISION)

    o_out = i_block * block + o_member
    m_out = o_member < members
    if BIAS:
        b_out += tl.load(p_bias + i_experiment * out_channels + o_out, mask=m_out, other=0.0)[None, :]
    p_out += (i_split * experiments + i_experiment) * out_channels * pixels
    tl.store(p_out + o_out[None, :] * pixels + o_pixel[:, None], b_out, mask=m_pixel[:, None] & m_out[None, :])


@triton.jit
def _plane_gradient_kernel(
    p_grad_out,  # pointer to the output's gradient, shape (E, out_channels, out_h, out_w)
    p_values,  # pointer to the kept values, shape (E, kept)
    p_order,  # pointer to the values' order by input block, item and input channel, int64, shape (kept,)
    p_items,  # pointer to output channel, row and column of the kernel, int32, shape (3, total)
    p_starts,  # pointer to where the items of each input block and phase begin, int64
    p_plane,  # pointer to output, shape (splits, E, channels, plane_h, plane_w)
    experiments,
    channels,
    plane_h,
    plane_w,
    out_channels,
    out_h,
    out_w,
    kept,
    total,
    block,  # input channels of a block
    tiles,  # programs that share a block of input channels
    iterations,  # of the loop over items that a split does
    STRIDE: tl.constexpr,
    OFFSET: tl.constexpr,  # rows and columns of the padded plane before this one, which are not wanted
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,  # pixels
    BLOCK_N: tl.constexpr,  # input channels
    BLOCK_K: tl.constexpr,  # items
):
    PHASES: tl.constexpr = STRIDE * STRIDE
    i_phase = tl.program_id(1) % PHASES
    i_block = tl.program_id(1) // PHASES // tiles
    i_experiment = (tl.program_id(2) % experiments).to(tl.int64)
    i_split = tl.program_id(2) // experiments
    first_y = i_phase // STRIDE
    first_x = i_phase % STRIDE
    columns = (plane_w - first_x + STRIDE - 1) // STRIDE
    pixels = (plane_h - first_y + STRIDE - 1) // STRIDE * columns
    o_pixel = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    m_pixel = o_pixel < pixels
    o_row = o_pixel // tl.maximum(columns, 1)
    o_column = o_pixel % tl.maximum(columns, 1)
    o_y = o_row + (first_y + OFFSET) // STRIDE
    o_x = o_column + (first_x + OFFSET) // STRIDE
    o_member = tl.program_id(1) // PHASES % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    members = tl.minimum(channels - i_block * block, block)
    p_grad_out += i_experiment * out_channels * out_h * out_w
    p_values += i_experiment * kept
    # Pixels of one phase of the stride see the taps of one phase.
    i_group = i_block * PHASES + (first_y + OFFSET) % STRIDE * STRIDE + (first_x + OFFSET) % STRIDE
    first = tl.load(p_starts + i_block * PHASES).to(tl.int32)
    start = tl.load(p_starts + i_group).to(tl.int32) + i_split * iterations * BLOCK_K
    stop = tl.minimum(start + iterations * BLOCK_K, tl.load(p_starts + i_group + 1).to(tl.int32))

    b_plane = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    for i in range(start, stop, BLOCK_K):
        o_item = i + tl.arange(0, BLOCK_K)
        m_item = o_item < stop
        o_out = tl.load(p_items + o_item, mask=m_item, other=0)
        o_tap_y = tl.load(p_items + total + o_item, mask=m_item, other=0) // STRIDE
        o_tap_x = tl.load(p_items + 2 * total + o_item, mask=m_item, other=0) // STRIDE
        o_out_y = o_y[:, None] - o_tap_y[None, :]
        o_out_x = o_x[:, None] - o_tap_x[None, :]
        m_grad = (o_out_y >= 0) & (o_out_y < out_h) & (o_out_x >= 0) & (o_out_x < out_w)
        b_grad = tl.load(
            p_grad_out + o_out[None, :] * (out_h * out_w) + o_out_y * out_w + o_out_x,
            mask=m_grad & m_pixel[:, None] & m_item[None, :],
            other=0.0,
        )
        b_weight = _load_weights(p_values, p_order, o_item, m_item, first, o_member, members, block)
        b_plane = multiply(b_grad, b_weight, b_plane, PRECISION)

    o_channel = i_block * block + o_member
    o_place = (first_y + STRIDE * o_row) * plane_w + first_x + STRIDE * o_column
    p_plane += (i_split * experiments + i_experiment) * channels * plane_h * plane_w
    tl.store(
        p_plane + o_channel[None, :] * (plane_h * plane_w) + o_place[:, None],
        b_plane,
        mask=m_pixel[:, None] & (o_member < members)[None, :],
    )


@triton.jit
def _values_gradient_kernel(
    p_grad_out,  # pointer to the output's gradient, shape (E, out_channels, out_h * out_w)
    p_x,  # pointer to x, shape (E, channels, height, width)
    p_order,  # pointer to the values' order by output block, column and output channel, int64, shape (kept,)
    p_columns,  # pointer to input channel, row and column of the kernel, int32, shape (3, total)
    p_starts,  # pointer to where each output block's columns begin, int64, shape (output blocks + 1,)
    p_chunks,  # pointer to output block and first column, int32, shape (2, chunks)
    p_grad_values,  # pointer to output, shape (splits, E, kept)
    experiments,
    channels,
    height,
    width,
    out_channels,
    out_h,
    out_w,
    kept,
    total,
    block,  # output channels of a block
    iterations,  # of the loop over blocks of pixels that a split does
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    MODE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,  # columns: the rows of the product
    BLOCK_N: tl.constexpr,  # output channels
    BLOCK_K: tl.constexpr,  # pixels
):
    i_experiment = (tl.program_id(2) % experiments).to(tl.int64)
    i_split = tl.program_id(2) // experiments
    i_block = tl.load(p_chunks + tl.program_id(0))
    first = tl.load(p_starts + i_block).to(tl.int32)
    o_column = tl.load(p_chunks + tl.num_programs(0) + tl.program_id(0)) + tl.arange(0, BLOCK_P)
    m_column = o_column < tl.load(p_starts + i_block + 1)
    o_channel = tl.load(p_columns + o_column, mask=m_column, other=0)
    o_tap_y = tl.load(p_columns + total + o_column, mask=m_column, other=0)
    o_tap_x = tl.load(p_columns + 2 * total + o_column, mask=m_column, other=0)
    o_member = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    members = tl.minimum(out_channels - i_block * block, block)
    m_member = o_member < members
    pixels = out_h * out_w
    p_grad_out += (i_experiment * out_channels + i_block * block) * pixels
    p_x += i_experiment * channels * height * width
    last = tl.minimum((i_split + 1) * iterations, tl.cdiv(pixels, BLOCK_K))

    b_sum = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    for i in range(i_split * iterations, last):
        o_pixel = i * BLOCK_K + tl.arange(0, BLOCK_K)
        m_pixel = o_pixel < pixels
        b_x = load_image(
            p_x + o_channel[:, None] * (height * width),
            m_column[:, None] & m_pixel[None, :],
            (o_pixel // out_w * STRIDE - PADDING)[None, :] + o_tap_y[:, None],
            (o_pixel % out_w * STRIDE - PADDING)[None, :] + o_tap_x[:, None],
            p_x,
            m_column,
            height,
            width,
            MODE,
            0,
            False,
            False,
        )
        b_grad = tl.load(
            p_grad_out + o_member[None, :] * pixels + o_pixel[:, None],
            mask=m_pixel[:, None] & m_member[None, :],
            other=0.0,
        )
        b_sum = multiply(b_x, b_grad, b_sum, PRECISION)

    m_sum = m_column[:, None] & m_member[None, :]
    o_place = first * block + (o_column - first)[:, None] * members + o_member[None, :]
    p_grad_values += (i_split * experiments + i_experiment) * kept
    tl.store(p_grad_values + tl.load(p_order + o_place, mask=m_sum, other=0), b_sum, mask=m_sum)


def block_sparse_conv2d(
    x, values, bias, index, order, columns, starts, block, out_channels, kernel_h, kernel_w, stride, padding, mode
):
    geometry = Geometry.of((kernel_h, kernel_w), stride, padding, mode, 0, False)
    lists = block_lists(index, starts, (out_channels, x.shape[1], kernel_h, kernel_w), stride)
    experiments, (height, width) = len(x), geometry.output(x)
    precision = precision_of_torch()
    blocks = tile(height * width, min(block, out_channels), lists.most, precision)
    tiles = triton.cdiv(min(block, out_channels), blocks["BLOCK_N"])
    grid = triton.cdiv(height * width, blocks["BLOCK_P"]), (len(starts) - 1) * tiles
    splits, iterations = split(grid[0] * grid[1], triton.cdiv(lists.most, blocks["BLOCK_K"]))
    parts = x.new_empty(splits, experiments, out_channels, height * width)
    _forward_kernel[(*grid, experiments * splits)](
        x, values, x if bias is None else bias, order, columns, starts, parts, experiments, *x.shape[1:],
        out_channels, height, width, values.shape[1], columns.shape[1], block, tiles, iterations,
        STRIDE=stride, PADDING=padding, MODE=geometry.mode, BIAS=bias is not None and splits == 1,
        PRECISION=precision, **blocks,
    )  # fmt: skip
    out = parts[0] if splits == 1 else add_splits(parts, bias)
    return out.view(experiments, out_channels, height, width)


def block_sparse_conv2d_backward(
    grad_out, x, values, index, order, columns, starts, block, out_channels, kernel_h, kernel_w, stride, padding, mode,
    needs_grad_x, needs_grad_values,
):  # fmt: skip
    geometry = Geometry.of((kernel_h, kernel_w), stride, padding, mode, 0, False)
    lists = block_lists(index, starts, (out_channels, x.shape[1], kernel_h, kernel_w), stride)
    empty = x.new_empty(0)
    return (
        _input_gradient(grad_out, values, lists, geometry, x.shape) if needs_grad_x else empty,
        _values_gradient(grad_out, x, values, order, columns, starts, lists, block, geometry)
        if needs_grad_values
        else empty,
    )


def _input_gradient(grad_out, values, lists, geometry, shape):
    experiments, channels = shape[:2]
    stride, block, precision = geometry.stride, lists.block_in, precision_of_torch()
    plane_h, plane_w, offset = plane_of(geometry, shape)
    phase = triton.cdiv(plane_h, stride) * triton.cdiv(plane_w, stride)
    blocks = tile(phase, block, lists.most_items, precision)
    tiles = triton.cdiv(block, blocks["BLOCK_N"])
    grid = triton.cdiv(phase, blocks["BLOCK_P"]), triton.cdiv(channels, block) * tiles * stride**2
    splits, iterations = split(grid[0] * grid[1], triton.cdiv(lists.most_items, blocks["BLOCK_K"]))
    parts = grad_out.new_empty(splits, experiments, channels, plane_h * plane_w)
    _plane_gradient_kernel[(*grid, experiments * splits)](
        grad_out, values, lists.order, lists.items, lists.starts, parts, experiments, channels, plane_h, plane_w,
        *grad_out.shape[1:], values.shape[1], lists.items.shape[1], block, tiles, iterations,
        STRIDE=stride, OFFSET=offset, PRECISION=precision, **blocks,
    )  # fmt: skip
    return fold(parts, geometry, shape)


def _values_gradient(grad_out, x, values, order, columns, starts, lists, block, geometry):
    experiments, out_channels, height, width = grad_out.shape
    kept, chunks, precision = values.shape[1], lists.chunks.shape[1], precision_of_torch()
    if kept == 0:
        return x.new_empty(experiments, 0)
    blocks = tile(CHUNK, min(block, out_channels), height * width, precision)
    grid = chunks, triton.cdiv(min(block, out_channels), blocks["BLOCK_N"])
    splits, iterations = split(grid[0] * grid[1], triton.cdiv(height * width, blocks["BLOCK_K"]))
    parts = x.new_empty(splits, experiments, 1, kept)
    _values_gradient_kernel[(*grid, experiments * splits)](
        grad_out, x, order, columns, starts, lists.chunks, parts, experiments, *x.shape[1:],
        out_channels, height, width, kept, columns.shape[1], block, iterations,
        STRIDE=geometry.stride, PADDING=geometry.padding, MODE=geometry.mode, PRECISION=precision, **blocks,
    )  # fmt: skip
    return (parts[0] if splits == 1 else add_splits(parts)).view(experiments, kept)
