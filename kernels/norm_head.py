"""Triton twin of `sparse_gen.ops.norm_head`: the normalised image is never stored, neither forward nor backward.

Forward a program mixes all channels of some pixels. Backward it takes one channel, whose gradient all output channels
give it; a first pass leaves every split's sums, which the second joins in every program. No atomics.
"""

import torch
import triton
import triton.language as tl

from sparse_gen.kernels import norm_act
from sparse_gen.kernels.norm_act import _leaky, _moments_kernel, _warps, load_of_moments

# Pixels of a block: with four output channels beside each other, four times as many numbers.
BLOCK = 1024
MAX_SPLITS = 64


@triton.jit
def _head_kernel(
    p_x,  # pointer to x, shape (E, channels, numel)
    p_load,  # pointer to loads, shape (E, channels, 5)
    p_weight,  # pointer to weights, shape (E, out, channels)
    p_bias,  # pointer to biases, shape (E, out); not read unless BIAS
    p_out,  # pointer to output, shape (E, out, numel)
    channels,
    out,
    numel,
    BIAS: tl.constexpr,
    SIGMOID: tl.constexpr,  # whether it is applied to the output
    OUT: tl.constexpr,  # a power of two from out on
    BLOCK: tl.constexpr,
):
    i_experiment = tl.program_id(0).to(tl.int64)
    o_pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_pixel = o_pixel < numel
    o_out = tl.arange(0, OUT)
    m_out = o_out < out
    b_sum = tl.zeros([OUT, BLOCK], tl.float32)
    if BIAS:
        b_sum += tl.load(p_bias + i_experiment * out + o_out, mask=m_out, other=0.0)[:, None]
    p_weight += i_experiment * out * channels
    for i_channel in range(channels):
        i_row = i_experiment * channels + i_channel
        b_x = tl.load(p_x + i_row * numel + o_pixel, mask=m_pixel, other=0.0)
        b_z = b_x * tl.load(p_load + 5 * i_row) + tl.load(p_load + 5 * i_row + 1)
        b_y = _leaky(b_z, b_z, tl.load(p_load + 5 * i_row + 2))
        b_sum += tl.load(p_weight + o_out * channels + i_channel, mask=m_out, other=0.0)[:, None] * b_y[None, :]
    if SIGMOID:
        b_sum = tl.sigmoid(b_sum)
    o_place = (i_experiment * out + o_out)[:, None] * numel + o_pixel[None, :]
    tl.store(p_out + o_place, b_sum, mask=m_out[:, None] & m_pixel[None, :])


@triton.jit
def _read(
    p_grad, p_y, p_x, p_gamma, p_beta, p_weight, p_mean, p_rstd, o_pixel, i_row, channels, out, numel, slope,
    SIGMOID: tl.constexpr, STEP: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """Of a channel's pixels: the output's gradient, what is mixed, its gradient before the activation, normalised x."""
    m_pixel = o_pixel < numel
    i_experiment, i_channel = i_row // channels, i_row % channels
    o_out = tl.arange(0, OUT)
    m_out = o_out < out
    o_place = (i_experiment * out + o_out)[:, None] * numel + o_pixel[None, :]
    b_grad = tl.load(p_grad + o_place, mask=m_out[:, None] & m_pixel[None, :], other=0.0)
    if SIGMOID:
        b_y = tl.load(p_y + o_place, mask=m_out[:, None] & m_pixel[None, :], other=0.0)
        b_grad *= b_y * (1 - b_y)
    b_weight = tl.load(p_weight + (i_experiment * out + o_out) * channels + i_channel, mask=m_out, other=0.0)
    b_x = tl.load(p_x + i_row * numel + o_pixel, mask=m_pixel, other=0.0)
    b_normal = tl.where(m_pixel, (b_x - tl.load(p_mean + STEP * i_row)) * tl.load(p_rstd + STEP * i_row), 0.0)
    b_z = b_normal * tl.load(p_gamma + i_row) + tl.load(p_beta + i_row)
    b_grad_z = _leaky(b_z, tl.sum(b_weight[:, None] * b_grad, axis=0), slope)
    return b_grad, _leaky(b_z, b_z, slope), b_grad_z, b_normal


@triton.jit
def _sums_kernel(
    p_grad,  # pointer to the output's gradient, shape (E, out, numel)
    p_y,  # pointer to the output; not read unless SIGMOID
    p_x,  # pointer to x, shape (E, channels, numel)
    p_gamma,  # pointers to gamma and beta, shape (E, channels)
    p_beta,
    p_weight,  # pointer to weights, shape (E, out, channels)
    p_mean,  # pointers to the forward's mean and rstd, shape (E, channels, STEP), of which the first counts
    p_rstd,
    p_sums,  # pointer to output, sums for beta, gamma, weights and biases, shape (rows, splits, 2 + 2 * OUT)
    slope,
    channels,
    out,
    numel,
    splits,
    SIGMOID: tl.constexpr,
    STEP: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,  # blocks to a split
):
    i_row = tl.program_id(0).to(tl.int64)
    i_split = tl.program_id(1)
    b_beta = tl.zeros([BLOCK], tl.float32)
    b_gamma = tl.zeros([BLOCK], tl.float32)
    b_weights = tl.zeros([OUT, BLOCK], tl.float32)
    b_biases = tl.zeros([OUT, BLOCK], tl.float32)
    for i_step in range(STEPS):
        o_pixel = (i_split * STEPS + i_step) * BLOCK + tl.arange(0, BLOCK)
        b_grad, b_y, b_grad_z, b_normal = _read(
            p_grad, p_y, p_x, p_gamma, p_beta, p_weight, p_mean, p_rstd, o_pixel, i_row, channels, out, numel, slope,
            SIGMOID, STEP, OUT,
        )  # fmt: skip
        b_beta += b_grad_z
        b_gamma += b_grad_z * b_normal
        b_weights += b_grad * b_y[None, :]
        b_biases += b_grad
    p_row = p_sums + (i_row * splits + i_split) * (2 + 2 * OUT)
    tl.store(p_row, tl.sum(b_beta))
    tl.store(p_row + 1, tl.sum(b_gamma))
    tl.store(p_row + 2 + tl.arange(0, OUT), tl.sum(b_weights, axis=1))
    tl.store(p_row + 2 + OUT + tl.arange(0, OUT), tl.sum(b_biases, axis=1))


@triton.jit
def _gradient_kernel(
    p_grad,  # as for `_sums_kernel`
    p_y,
    p_x,
    p_gamma,
    p_beta,
    p_weight,
    p_mean,
    p_rstd,
    p_sums,
    p_grad_x,  # pointer to output, shape (E, channels, numel); may be p_x
    p_grad_gamma,  # pointers to output, shape (E, channels)
    p_grad_beta,
    p_grad_weight,  # pointer to output, shape (E, out, channels)
    p_grad_bias,  # pointer to output, shape (E, out)
    slope,
    channels,
    out,
    numel,
    splits,
    SIGMOID: tl.constexpr,
    STEP: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,  # a power of two from splits on
):
    i_row = tl.program_id(0).to(tl.int64)
    o_pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    _, _, b_grad_z, b_normal = _read(
        p_grad, p_y, p_x, p_gamma, p_beta, p_weight, p_mean, p_rstd, o_pixel, i_row, channels, out, numel, slope,
        SIGMOID, STEP, OUT,
    )  # fmt: skip
    o_split = tl.arange(0, SPLITS)
    m_split = o_split < splits
    p_row = p_sums + (i_row * splits + o_split) * (2 + 2 * OUT)
    grad_beta = tl.sum(tl.load(p_row, mask=m_split, other=0.0))
    grad_gamma = tl.sum(tl.load(p_row + 1, mask=m_split, other=0.0))
    if tl.program_id(1) == 0:
        o_out = tl.arange(0, OUT)
        b_parts = tl.load(p_row[None, :] + 2 + o_out[:, None], mask=m_split[None, :], other=0.0)
        p_place = p_grad_weight + (i_row // channels * out + o_out) * channels + i_row % channels
        tl.store(p_place, tl.sum(b_parts, axis=1), mask=o_out < out)
        if i_row % channels == 0:
            b_parts = tl.load(p_row[None, :] + 2 + OUT + o_out[:, None], mask=m_split[None, :], other=0.0)
            tl.store(p_grad_bias + i_row // channels * out + o_out, tl.sum(b_parts, axis=1), mask=o_out < out)
        tl.store(p_grad_beta + i_row, grad_beta)
        tl.store(p_grad_gamma + i_row, grad_gamma)
    factor = tl.load(p_gamma + i_row) * tl.load(p_rstd + STEP * i_row)
    b_grad_x = (b_grad_z - grad_beta / numel - b_normal * (grad_gamma / numel)) * factor
    tl.store(p_grad_x + i_row * numel + o_pixel, b_grad_x, mask=o_pixel < numel)


def norm_head(x, gamma, beta, weight, bias, eps, slope):
    experiments, channels, height, width = x.shape
    numel = height * width
    splits, steps = norm_act._split(numel)
    moments = x.new_empty(experiments, channels, splits, 2)
    _moments_kernel[experiments * channels, splits](
        x, moments, numel, splits, BLOCK=norm_act.ROW, STEPS=steps, num_warps=_warps(norm_act.ROW)
    )
    load, mean, rstd = load_of_moments(moments, numel, norm_act.ROW * steps, gamma, beta, eps, slope)
    return loaded_head(x, load, weight, bias, False), mean, rstd


def loaded_head(x, load, weight, bias, sigmoid):
    (experiments, channels, height, width), out = x.shape, weight.shape[1]
    numel = height * width
    y = x.new_empty(experiments, out, height, width)
    _head_kernel[experiments, triton.cdiv(numel, BLOCK)](
        x, load, weight, weight if bias is None else bias, y, channels, out, numel,
        BIAS=bias is not None, SIGMOID=sigmoid, OUT=triton.next_power_of_2(out), BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return y


def norm_head_backward(grad_out, x, gamma, beta, weight, mean, rstd, slope):
    grad_x = torch.empty_like(x)
    return grad_x, *_backward(grad_out, None, x, gamma, beta, weight, mean, rstd, slope, grad_x)[:3]


def norm_head_backward_(grad_out, x, gamma, beta, weight, mean, rstd, slope):
    return _backward(grad_out, None, x, gamma, beta, weight, mean, rstd, slope, x)[:3]


def loaded_head_backward_(grad_out, y, x, gamma, beta, weight, moments, slope):
    return _backward(grad_out, y, x, gamma, beta, weight, moments, moments[..., 1:], slope, x)


def _backward(grad_out, y, x, gamma, beta, weight, mean, rstd, slope, grad_x):
    channels, out, numel = x.shape[1], weight.shape[1], x.shape[2] * x.shape[3]
    rows, power = x.shape[0] * channels, triton.next_power_of_2(out)
    steps = triton.next_power_of_2(triton.cdiv(numel, BLOCK * MAX_SPLITS))
    splits = triton.cdiv(numel, BLOCK * steps)
    sums = x.new_empty(rows, splits, 2 + 2 * power)
    grads = torch.empty_like(gamma), torch.empty_like(beta), torch.empty_like(weight), x.new_empty(weight.shape[:2])
    options = {"SIGMOID": y is not None, "STEP": mean.stride(1), "OUT": power, "BLOCK": BLOCK, "num_warps": 8}
    saved = (grad_out, grad_out if y is None else y, x, gamma, beta, weight, mean, rstd, sums)
    _sums_kernel[rows, splits](*saved, slope, channels, out, numel, splits, STEPS=steps, **options)
    _gradient_kernel[rows, triton.cdiv(numel, BLOCK)](
        *saved, grad_x, *grads, slope, channels, out, numel, splits,
        SPLITS=triton.next_power_of_2(splits), **options,
    )  # fmt: skip
    return grads
