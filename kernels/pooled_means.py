"""Triton twin of `sparse_gen.ops.pooled_means`: padding by index, the load applied on the way in; a gather each way."""

import torch
import triton
import triton.language as tl

from sparse_gen.kernels.fold import fold
from sparse_gen.kernels.gather import Geometry, load_image


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
    b_mean = load_image(
        p_x + i_plane * height * width, m_pixel, o_y, o_x, p_load + 5 * i_plane, i_plane >= 0, height, width,
        MODE, 0, True, LOAD,
    )  # fmt: skip
    tl.store(p_out + i_plane * out_h * out_w + o_pixel, b_mean, mask=m_pixel)


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
    return fold(grad_means[None], Geometry.of((1, 1), 1, padding, mode, 0, True), shape)
