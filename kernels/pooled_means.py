"""Triton twin of `sparse_gen.ops.pooled_means`: padding by index, the load applied on the way in; a gather each way."""

import torch
import triton
import triton.language as tl

from sparse_gen.kernels.gather import Geometry, _inside
from sparse_gen.kernels.masked_conv2d_gradients import fold
from sparse_gen.kernels.norm_act import _leaky


@triton.jit
def _loaded(p_image, m_pixel, o_y, o_x, height, width, factor, shift, slope, factor2, shift2, MODE: tl.constexpr):
    """Values of the padded image as a reader sees it."""
    o_y, m_y = _inside(o_y, height, MODE)
    o_x, m_x = _inside(o_x, width, MODE)
    m_load = m_pixel & m_y & m_x
    b_z = tl.load(p_image + o_y * width + o_x, mask=m_load, other=0.0) * factor + shift
    # Padding with zeros comes behind the load.
    return tl.where(m_load, _leaky(b_z, b_z, slope) * factor2 + shift2, 0.0)


@triton.jit
def _means_kernel(
    p_x,  # pointer to x, shape (planes, height, width)
    p_load,  # pointer to loads, shape (planes, 5); not read unless LOAD
    p_out,  # pointer to output, shape (planes, out_h, out_w)
    height,
    width,
    out_h,
    out_w,
    PADDING: tl.constexpr,
    MODE: tl.constexpr,
    LOAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_plane = tl.program_id(0).to(tl.int64)
    o_pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_pixel = o_pixel < out_h * out_w
    o_y = o_pixel // out_w - PADDING
    o_x = o_pixel % out_w - PADDING
    factor, shift, slope, factor2, shift2 = 1.0, 0.0, 1.0, 1.0, 0.0
    if LOAD:
        p_row = p_load + 5 * i_plane
        factor, shift, slope = tl.load(p_row), tl.load(p_row + 1), tl.load(p_row + 2)
        factor2, shift2 = tl.load(p_row + 3), tl.load(p_row + 4)
    p_image = p_x + i_plane * height * width
    b_sum = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(4):
        b_sum += _loaded(
            p_image, m_pixel, o_y + i // 2, o_x + i % 2, height, width, factor, shift, slope, factor2, shift2, MODE
        )
    tl.store(p_out + i_plane * out_h * out_w + o_pixel, 0.25 * b_sum, mask=m_pixel)


def pooled_means(x, load, padding, mode):
    experiments, channels, height, width = x.shape
    out_h, out_w = height + 2 * padding - 1, width + 2 * padding - 1
    out = x.new_empty(experiments, channels, out_h, out_w)
    block = min(triton.next_power_of_2(out_h * out_w), 1024)
    _means_kernel[experiments * channels, triton.cdiv(out_h * out_w, block)](
        x, x if load is None else load, out, height, width, out_h, out_w,
        PADDING=padding, MODE=mode if padding else 0, LOAD=load is not None, BLOCK=block,
    )  # fmt: skip
    return out


def pooled_means_backward(grad_means, padding, mode):
    sizes = (length + 1 - 2 * padding for length in grad_means.shape[2:])
    shape = torch.Size((*grad_means.shape[:2], *sizes))
    return fold(grad_means, Geometry.of((1, 1), 1, padding, mode, 0, True), shape)
