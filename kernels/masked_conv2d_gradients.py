"""Gradients of `masked_conv2d`, as gathers.

That of the image is a product of matrices onto the plane that the kernel slides over; where that plane is not the image
itself, `fold` carries it back.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparse_gen.kernels.fold import fold, plane_of
from sparse_gen.kernels.gather import Geometry, load_image, multiply
from sparse_gen.kernels.splits import add_splits, split, tile


@triton.jit
def _plane_tile(
    i_pixel,  # the tile's place: block of pixels, block of channels and phase, split and experiment
    i_block,
    i_part,
    p_grad_out,  # pointer to the output's gradient, shape (E, out_channels, out_h, out_w)
    p_weight,  # pointer to weights, shape (E, out_channels, channels, KERNEL_H, KERNEL_W)
    p_plane,  # pointer to output, shape (splits, E, channels, plane_h, plane_w)
    experiments,
    channels,
    plane_h,
    plane_w,
    out_channels,
    out_h,
    out_w,
    iterations,  # of the loop over blocks of output channels and taps that a split does
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE: tl.constexpr,
    OFFSET: tl.constexpr,  # rows and columns of the padded plane before this one, which are not wanted
    SUMMED: tl.constexpr,  # whether the plane is the small image's, see `Geometry.summed`
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,  # pixels
    BLOCK_N: tl.constexpr,  # channels
    BLOCK_K: tl.constexpr,  # output channels
    STAGES: tl.constexpr,
):
    # Pixels of one phase of the stride see the same taps, one in stride².
    i_phase = i_block % (STRIDE * STRIDE)
    i_experiment = (i_part % experiments).to(tl.int64)
    i_split = i_part // experiments
    first_y = i_phase // STRIDE
    first_x = i_phase % STRIDE
    columns = (plane_w - first_x + STRIDE - 1) // STRIDE
    pixels = (plane_h - first_y + STRIDE - 1) // STRIDE * columns
    o_pixel = i_pixel * BLOCK_P + tl.arange(0, BLOCK_P)
    m_pixel = o_pixel < pixels
    o_row = o_pixel // tl.maximum(columns, 1)
    o_column = o_pixel % tl.maximum(columns, 1)
    tap_y = (first_y + OFFSET) % STRIDE
    tap_x = (first_x + OFFSET) % STRIDE
    taps_x = (KERNEL_W - tap_x + STRIDE - 1) // STRIDE
    taps = (KERNEL_H - tap_y + STRIDE - 1) // STRIDE * taps_x
    if SUMMED:
        taps_x = 4
        taps = 16
    o_y = o_row + (first_y + OFFSET) // STRIDE
    o_x = o_column + (first_x + OFFSET) // STRIDE
    o_channel = i_block // (STRIDE * STRIDE) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_channel = o_channel < channels
    p_grad_out += i_experiment * out_channels * out_h * out_w
    p_weight += i_experiment * out_channels * channels * (KERNEL_H * KERNEL_W)
    last = tl.minimum((i_split + 1) * iterations, tl.cdiv(out_channels, BLOCK_K) * taps)

    b_plane = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    for i in tl.range(i_split * iterations, last, num_stages=STAGES):
        i_y = i % taps // taps_x
        i_x = i % taps % taps_x
        o_out = i // taps * BLOCK_K + tl.arange(0, BLOCK_K)
        m_out = o_out < out_channels
        if SUMMED:
            o_row_out = 2 * o_y - 1 + i_y
            o_column_out = 2 * o_x - 1 + i_x
        else:
            o_row_out = o_y - i_y
            o_column_out = o_x - i_x
        m_seen = m_pixel & (o_row_out >= 0) & (o_row_out < out_h) & (o_column_out >= 0) & (o_column_out < out_w)
        b_grad = tl.load(
            p_grad_out + o_out[None, :] * (out_h * out_w) + (o_row_out * out_w + o_column_out)[:, None],
            mask=m_seen[:, None] & m_out[None, :],
            other=0.0,
        )
        p_taps = p_weight + (o_out[:, None] * channels + o_channel[None, :]) * (KERNEL_H * KERNEL_W)
        m_weight = m_out[:, None] & m_channel[None, :]
        if SUMMED:
            # What 2×2 pixels see of one row (column) of the output: taps 2, 1 and 2, 0 and 1, or 0.
            first_tap_y = tl.maximum(2 - i_y, 0) * KERNEL_W
            last_tap_y = tl.minimum(3 - i_y, 2) * KERNEL_W
            first_tap_x = tl.maximum(2 - i_x, 0)
            last_tap_x = tl.minimum(3 - i_x, 2)
            m_y = m_weight.to(tl.int32) * (last_tap_y - first_tap_y) > 0
            m_x = m_weight.to(tl.int32) * (last_tap_x - first_tap_x) > 0
            b_weight = tl.load(p_taps + first_tap_y + first_tap_x, mask=m_weight, other=0.0)
            b_weight += tl.load(p_taps + first_tap_y + last_tap_x, mask=m_x, other=0.0)
            b_weight += tl.load(p_taps + last_tap_y + first_tap_x, mask=m_y, other=0.0)
            b_weight += tl.load(p_taps + last_tap_y + last_tap_x, mask=m_y & m_x, other=0.0)
        else:
            i_tap = (tap_y + STRIDE * i_y) * KERNEL_W + tap_x + STRIDE * i_x
            b_weight = tl.load(p_taps + i_tap, mask=m_weight, other=0.0)
        b_plane = multiply(b_grad, b_weight, b_plane, PRECISION)

    o_place = (first_y + STRIDE * o_row) * plane_w + first_x + STRIDE * o_column
    p_plane += (i_split * experiments + i_experiment) * channels * plane_h * plane_w
    tl.store(
        p_plane + o_channel[None, :] * (plane_h * plane_w) + o_place[:, None],
        b_plane,
        mask=m_pixel[:, None] & m_channel[None, :],
    )


@triton.jit
def _weight_tile(
    i_row,  # the tile's place: block of channels and tap, block of output channels, split and experiment
    i_column,
    i_part,
    p_grad_out,  # pointer to the output's gradient, shape (E, out_channels, out_h * out_w)
    p_x,  # pointer to x, shape (E, channels, height, width)
    p_load,  # pointer to loads, shape (E, channels, 5); not read unless LOAD
    p_grad_weight,  # pointer to output, shape (splits, E, out_channels, channels, KERNEL_H * KERNEL_W)
    experiments,
    channels,
    height,
    width,
    out_channels,
    out_h,
    out_w,
    iterations,  # of the loop over blocks of pixels that a split does
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    MODE: tl.constexpr,
    UPSAMPLE: tl.constexpr,
    BOX: tl.constexpr,
    LOAD: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,  # channels: the rows of the product
    BLOCK_N: tl.constexpr,  # output channels
    BLOCK_K: tl.constexpr,  # pixels
    STAGES: tl.constexpr,
):
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    i_tap = i_row % TAPS
    i_experiment = (i_part % experiments).to(tl.int64)
    i_split = i_part // experiments
    o_channel = i_row // TAPS * BLOCK_P + tl.arange(0, BLOCK_P)
    m_channel = o_channel < channels
    o_out = i_column * BLOCK_N + tl.arange(0, BLOCK_N)
    m_out = o_out < out_channels
    pixels = out_h * out_w
    p_grad_out += i_experiment * out_channels * pixels
    p_x += i_experiment * channels * height * width
    p_load += 5 * i_experiment * channels
    last = tl.minimum((i_split + 1) * iterations, tl.cdiv(pixels, BLOCK_K))

    b_sum = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    for i in tl.range(i_split * iterations, last, num_stages=STAGES):
        o_pixel = i * BLOCK_K + tl.arange(0, BLOCK_K)
        m_pixel = o_pixel < pixels
        b_x = load_image(
            p_x + o_channel[:, None] * (height * width),
            m_channel[:, None] & m_pixel[None, :],
            (o_pixel // out_w * STRIDE - PADDING + i_tap // KERNEL_W)[None, :],
            (o_pixel % out_w * STRIDE - PADDING + i_tap % KERNEL_W)[None, :],
            p_load + 5 * o_channel[:, None],
            m_channel[:, None],
            height,
            width,
            MODE,
            UPSAMPLE,
            BOX,
            LOAD,
        )
        b_grad = tl.load(
            p_grad_out + o_out[None, :] * pixels + o_pixel[:, None], mask=m_pixel[:, None] & m_out[None, :], other=0.0
        )
        b_sum = multiply(b_x, b_grad, b_sum, PRECISION)

    p_grad_weight += (i_split * experiments + i_experiment) * out_channels * channels * TAPS
    tl.store(
        p_grad_weight + (o_out[None, :] * channels + o_channel[:, None]) * TAPS + i_tap,
        b_sum,
        mask=m_channel[:, None] & m_out[None, :],
    )


@triton.jit
def _gradients_kernel(
    p_grad_out,  # pointer to the output's gradient, shape (E, out_channels, out_h, out_w)
    p_x,  # pointer to x, shape (E, channels, height, width); not read unless WEIGHT
    p_load,  # pointer to loads, shape (E, channels, 5); not read unless LOAD
    p_weight,  # pointer to weights, shape (E, out_channels, channels, KERNEL_H, KERNEL_W); not read unless PLANE
    p_plane,  # pointers to outputs, see `_plane_tile` and `_weight_tile`
    p_grad_weight,
    experiments,
    channels,
    height,
    width,
    plane_h,
    plane_w,
    out_channels,
    out_h,
    out_w,
    plane_programs,  # the first programs; the others are the weight's
    plane_rows,  # blocks along the first two axes of a tile's place, and iterations of a split
    plane_columns,
    plane_iterations,
    weight_rows,
    weight_columns,
    weight_iterations,
    PLANE: tl.constexpr,  # whether the plane's gradient is wanted
    WEIGHT: tl.constexpr,  # whether the weight's is
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    OFFSET: tl.constexpr,
    SUMMED: tl.constexpr,
    MODE: tl.constexpr,
    UPSAMPLE: tl.constexpr,
    BOX: tl.constexpr,
    LOAD: tl.constexpr,
    PRECISION: tl.constexpr,
    PLANE_P: tl.constexpr,
    PLANE_N: tl.constexpr,
    PLANE_K: tl.constexpr,
    PLANE_STAGES: tl.constexpr,
    WEIGHT_P: tl.constexpr,
    WEIGHT_N: tl.constexpr,
    WEIGHT_K: tl.constexpr,
    WEIGHT_STAGES: tl.constexpr,
):
    i_program = tl.program_id(0)
    if PLANE and i_program < plane_programs:
        _plane_tile(
            i_program % plane_rows, i_program // plane_rows % plane_columns, i_program // (plane_rows * plane_columns),
            p_grad_out, p_weight, p_plane, experiments, channels, plane_h, plane_w, out_channels, out_h, out_w,
            plane_iterations, KERNEL_H, KERNEL_W, STRIDE, OFFSET, SUMMED, PRECISION,
            PLANE_P, PLANE_N, PLANE_K, PLANE_STAGES,
        )  # fmt: skip
    if WEIGHT and i_program >= plane_programs:
        i_program -= plane_programs
        _weight_tile(
            i_program % weight_rows, i_program // weight_rows % weight_columns,
            i_program // (weight_rows * weight_columns),
            p_grad_out, p_x, p_load, p_grad_weight, experiments, channels, height, width, out_channels, out_h, out_w,
            weight_iterations, KERNEL_H, KERNEL_W, STRIDE, PADDING, MODE, UPSAMPLE, BOX, LOAD, PRECISION,
            WEIGHT_P, WEIGHT_N, WEIGHT_K, WEIGHT_STAGES,
        )  # fmt: skip


def gradients(grad_out, x, weight, geometry: Geometry, *, load=None, precision="tf32", of_plane=True, of_weight=True):
    """The parts of both gradients, in one launch: neither alone keeps a GPU busy where the image is small.

    Args:
        grad_out: (E, out, H', W'), float32, contiguous like all others.
        x, weight, geometry, load, precision: the forward's.
        of_plane, of_weight: which are wanted.

    Returns:
        The parts of the gradient of `plane_of`'s plane, (splits, E, channels, plane_h · plane_w), and of the weight,
        (splits, E, out, channels · taps), each to be added over the splits; None where not wanted.
    """
    experiments, channels, *size = x.shape
    out_channels, stride, taps = weight.shape[1], geometry.stride, geometry.kernel_h * geometry.kernel_w
    plane_h, plane_w, offset = plane_of(geometry, x.shape)
    pixels, phase = grad_out.shape[2] * grad_out.shape[3], triton.cdiv(plane_h, stride) * triton.cdiv(plane_w, stride)
    plane, grad_weight = grad_out, grad_out
    blocks = plane_blocks(phase, channels, out_channels, precision, geometry)
    rows, columns = triton.cdiv(phase, blocks["BLOCK_P"]), triton.cdiv(channels, blocks["BLOCK_N"]) * stride**2
    taps_of_phase = triton.cdiv(geometry.kernel_h, stride) * triton.cdiv(geometry.kernel_w, stride)
    taps_of_phase = 16 if geometry.summed else taps_of_phase
    splits, iterations = split(rows * columns, triton.cdiv(out_channels, blocks["BLOCK_K"]) * taps_of_phase)
    programs = plane_programs = rows * columns * splits * experiments if of_plane else 0
    if of_plane:
        plane = grad_out.new_empty(splits, experiments, channels, plane_h * plane_w)
    # 64 rows at least: tensor cores of sm_90 take no fewer.
    own = tile(64, out_channels, pixels, precision, geometry.gathers)
    own_rows, own_columns = triton.cdiv(channels, own["BLOCK_P"]) * taps, triton.cdiv(out_channels, own["BLOCK_N"])
    own_splits, own_iterations = split(own_rows * own_columns, triton.cdiv(pixels, own["BLOCK_K"]))
    if of_weight:
        grad_weight = grad_out.new_empty(own_splits, experiments, out_channels, channels * taps)
        programs += own_rows * own_columns * own_splits * experiments
    _gradients_kernel[(programs,)](
        grad_out, x, x if load is None else load, weight, plane, grad_weight,
        experiments, channels, *size, plane_h, plane_w, out_channels, *grad_out.shape[2:],
        plane_programs, rows, columns, iterations, own_rows, own_columns, own_iterations,
        PLANE=of_plane, WEIGHT=of_weight, OFFSET=offset, SUMMED=geometry.summed, **geometry.constants(),
        LOAD=load is not None, PRECISION=precision, **launch_options(blocks, own),
    )  # fmt: skip
    return plane if of_plane else None, grad_weight if of_weight else None


def plane_blocks(pixels: int, channels: int, out_channels: int, precision: str, geometry: Geometry) -> dict[str, int]:
    """The tile of the plane's product."""
    blocks = tile(pixels, channels, out_channels, precision)
    # Sums of weights take shared memory of their own.
    return blocks | {"num_stages": min(2, blocks["num_stages"])} if geometry.summed else blocks


def launch_options(plane: dict[str, int], weight: dict[str, int]) -> dict[str, int]:
    """Constants and options of `_gradients_kernel` with these two tiles."""
    constants = {"num_warps": max(plane["num_warps"], weight["num_warps"])}
    for name, blocks in (("PLANE", plane), ("WEIGHT", weight)):
        constants |= {f"{name}_{axis}": blocks[f"BLOCK_{axis}"] for axis in "PNK"}
        constants[f"{name}_STAGES"] = blocks["num_stages"]
    return constants


def input_gradient(grad_out, x, weight, geometry: Geometry, precision="tf32"):
    """Gradient by the image that the convolution saw: behind BN and LeakyReLU, where those were applied on load."""
    plane, _ = gradients(grad_out, x, weight, geometry, precision=precision, of_weight=False)
    return fold(plane, geometry, x.shape)


def added(parts):
    """The sum over the splits."""
    return parts[0] if len(parts) == 1 else add_splits(parts)


def weight_gradient(grad_out, x, weight, geometry: Geometry, *, load=None, precision="tf32"):
    """Gradient by the weight, whose values play no part; x and load are the forward's."""
    _, parts = gradients(grad_out, x, weight, geometry, load=load, precision=precision, of_plane=False)
    return added(parts).view(weight.shape)
