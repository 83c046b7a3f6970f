"""Triton twin of `sparse_gen.ops.masked_conv2d`: an implicit product of matrices, pixels × (channels, taps) × outputs.

The loop runs over blocks of channels and, inside, over taps: a tap's neighbours then come out of the L1 cache, the
image's as well as the weight's. Where pixels and outputs make too few programs for a GPU, the loop is split, and the
parts are added in a second kernel; without atomics the same bits come out each time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.nn import functional as F

from sparse_gen.kernels.fold import fold
from sparse_gen.kernels.gather import Geometry, load_image, multiply
from sparse_gen.kernels.masked_conv2d_gradients import added, gradients
from sparse_gen.kernels.splits import add_splits, column_moments, precision_of_torch, split, tile


@triton.jit
def _forward_kernel(
    p_x,  # pointer to x, shape (E, channels, height, width)
    p_weight,  # pointer to weights, shape (E, out_channels, channels, KERNEL_H, KERNEL_W)
    p_bias,  # pointer to biases, shape (E, out_channels); not read unless BIAS
    p_load,  # pointer to loads, shape (E, channels, 5); not read unless LOAD
    p_out,  # pointer to output, shape (splits, E, out_channels, out_h * out_w)
    p_moments,  # pointer to output, shape (E, out_channels, pixel blocks, 2); not written unless MOMENTS
    experiments,
    channels,
    height,
    width,
    out_channels,
    out_h,
    out_w,
    iterations,  # of the loop over channel blocks and taps that a split does
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    MODE: tl.constexpr,
    UPSAMPLE: tl.constexpr,
    BOX: tl.constexpr,
    LOAD: tl.constexpr,
    BIAS: tl.constexpr,
    MOMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,  # pixels
    BLOCK_N: tl.constexpr,  # output channels
    BLOCK_K: tl.constexpr,  # channels
):
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    i_pixel = tl.program_id(0)
    i_experiment = (tl.program_id(2) % experiments).to(tl.int64)
    i_split = tl.program_id(2) // experiments
    pixels = out_h * out_w
    o_pixel = i_pixel * BLOCK_P + tl.arange(0, BLOCK_P)
    m_pixel = o_pixel < pixels
    o_y = (o_pixel // out_w) * STRIDE - PADDING
    o_x = (o_pixel % out_w) * STRIDE - PADDING
    o_out = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_out = o_out < out_channels
    p_x += i_experiment * channels * height * width
    p_weight += i_experiment * out_channels * channels * TAPS
    p_load += 5 * i_experiment * channels
    last = tl.minimum((i_split + 1) * iterations, tl.cdiv(channels, BLOCK_K) * TAPS)

    b_out = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    for i in range(i_split * iterations, last):
        i_tap = i % TAPS
        o_channel = (i // TAPS) * BLOCK_K + tl.arange(0, BLOCK_K)
        m_channel = o_channel < channels
        b_x = load_image(
            p_x + o_channel[None, :] * (height * width),
            m_pixel[:, None] & m_channel[None, :],
            (o_y + i_tap // KERNEL_W)[:, None],
            (o_x + i_tap % KERNEL_W)[:, None],
            p_load + 5 * o_channel[None, :],
            m_channel[None, :],
            height,
            width,
            MODE,
            UPSAMPLE,
            BOX,
            LOAD,
        )
        b_weight = tl.load(
            p_weight + (o_out[None, :] * channels + o_channel[:, None]) * TAPS + i_tap,
            mask=m_out[None, :] & m_channel[:, None],
            other=0.0,
        )
        b_out = multiply(b_x, b_weight, b_out, PRECISION)

    if BIAS:
        b_out += tl.load(p_bias + i_experiment * out_channels + o_out, mask=m_out, other=0.0)[None, :]
    if MOMENTS:
        b_mean, b_squares = column_moments(b_out, m_pixel[:, None], tl.minimum(pixels - i_pixel * BLOCK_P, BLOCK_P))
        p_pair = p_moments + 2 * ((i_experiment * out_channels + o_out) * tl.num_programs(0) + i_pixel)
        tl.store(p_pair, b_mean, mask=m_out)
        tl.store(p_pair + 1, b_squares, mask=m_out)
    p_out += (i_split * experiments + i_experiment) * out_channels * pixels
    tl.store(p_out + o_out[None, :] * pixels + o_pixel[:, None], b_out, mask=m_pixel[:, None] & m_out[None, :])


def convolved_parts(x, weight, bias, geometry: Geometry, *, load=None, moments=False, precision="tf32"):
    """As `convolve`, but for the sum: parts (splits, E, out, H'·W'), without bias and moments where there are several.

    Returns:
        The parts, the moments (there only if there is one part), and how many pixels share one pair of them.
    """
    experiments, out_channels, channels = weight.shape[:3]
    height, width = geometry.output(x)
    blocks = tile(height * width, out_channels, channels, precision, geometry.gathers)
    grid = triton.cdiv(height * width, blocks["BLOCK_P"]), triton.cdiv(out_channels, blocks["BLOCK_N"])
    total = triton.cdiv(channels, blocks["BLOCK_K"]) * geometry.kernel_h * geometry.kernel_w
    splits, iterations = split(grid[0] * grid[1], total)
    pairs = x.new_empty(experiments, out_channels, grid[0], 2) if moments else None
    parts = x.new_empty(splits, experiments, out_channels, height * width)
    whole = splits == 1
    _forward_kernel[(*grid, experiments * splits)](
        x, weight, x if bias is None else bias, x if load is None else load, parts, pairs if moments else x,
        experiments, channels, *x.shape[2:], out_channels, height, width, iterations, **geometry.constants(),
        LOAD=load is not None, BIAS=whole and bias is not None, MOMENTS=whole and moments,
        PRECISION=precision, **blocks,
    )  # fmt: skip
    return parts, pairs, blocks["BLOCK_P"]


def convolve(x, weight, bias, geometry: Geometry, *, load=None, moments=False, precision="tf32"):
    """Convolve with everything that can be done on load and on store.

    Args:
        x: (E, channels, H, W), float32, contiguous like all others.
        weight: (E, out, channels, kernel_h, kernel_w).
        bias: (E, out), or None.
        geometry: padding, resampling and stride.
        load: (E, channels, 5), see `sparse_gen.ops.norm_load`, through which x is read, or None.
        moments: whether mean and sum of squared deviations of the output's blocks are wanted as well.
        precision: "ieee", "tf32" or "bf16".

    Returns:
        The output, (E, out, H', W'), and the moments, (E, out, blocks, 2), or None, and how many pixels
        share one pair of them.
    """
    parts, pairs, span = convolved_parts(
        x, weight, bias, geometry, load=load, moments=moments, precision=precision
    )  # fmt: skip
    out = parts[0] if len(parts) == 1 else add_splits(parts, bias, pairs, span if moments else 1024)
    return out.view(*weight.shape[:2], *geometry.output(x)), pairs, span


def masked_conv2d_loaded(x, weight, bias, stride, padding, mode, upsample, pool, load):
    geometry = Geometry.of(weight.shape[3:], stride, padding, mode, upsample, pool)
    out, _, _ = convolve(x, weight, bias, geometry, load=load, precision=precision_of_torch())
    return F.avg_pool2d(out, 2) if pool and not geometry.box else out


def masked_conv2d_loaded_backward(
    grad_out, x, weight, stride, padding, mode, upsample, pool, load, needs_grad_x, needs_grad_weight
):
    geometry = Geometry.of(weight.shape[3:], stride, padding, mode, upsample, pool)
    grad_out = unpooled(grad_out, x, geometry, pool)
    plane, parts = gradients(
        grad_out, x, weight, geometry, load=load, precision=precision_of_torch(),
        of_plane=needs_grad_x, of_weight=needs_grad_weight,
    )  # fmt: skip
    return (
        fold(plane, geometry, x.shape) if needs_grad_x else x.new_empty(0),
        added(parts).view(weight.shape) if needs_grad_weight else x.new_empty(0),
    )


def unpooled(grad_out, x, geometry: Geometry, pool: bool):
    """The gradient in front of a pool that is not folded."""
    if not pool or geometry.box:
        return grad_out
    convolved = grad_out.new_empty(*grad_out.shape[:2], *geometry.output(x))
    return torch.ops.aten.avg_pool2d_backward(
        grad_out, convolved, [2, 2], [2, 2], [0, 0], False, True, None
    ).contiguous()


def masked_conv2d(x, weight, bias, stride, padding, mode, upsample, pool, _layout):
    return masked_conv2d_loaded(x, weight, bias, stride, padding, mode, upsample, pool, None)


def masked_conv2d_backward(
    grad_out, x, weight, stride, padding, mode, upsample, pool, _layout, needs_grad_x, needs_grad_weight
):
    geometry = (stride, padding, mode, upsample, pool)
    return masked_conv2d_loaded_backward(grad_out, x, weight, *geometry, None, needs_grad_x, needs_grad_weight)
