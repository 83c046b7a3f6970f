"""Triton twin of `sparse_gen.ops.norm_act`: a channel's image that fits one program's registers is read once.

Larger images are summed in a fixed split first, one pair of numbers a split; the second kernel joins them in every
program, which costs less than a launch of its own. Without atomics the same bits come out each time.
"""

import torch
import triton
import triton.language as tl

# 4096 floats are 16 registers a thread of eight warps. Up to 64² an image is read once, in one launch.
ROW = 4096
# Splits that the second kernel joins: 64 pairs of numbers beside the 4096 values it reads anyway.
MAX_SPLITS = 64


@triton.jit
def _leaky(b_z, b_value, slope):
    """The value where z is positive, slope times it elsewhere: LeakyReLU of z, or of a gradient its derivative."""
    return tl.where(b_z > 0, b_value, slope * b_value)


@triton.jit
def _join_moments(p_moments, numel, SPAN: tl.constexpr, SPLITS: tl.constexpr):
    """Mean and sum of squared deviations of a row from those of its splits (Chan, Golub & LeVeque 1983)."""
    o_split = tl.arange(0, SPLITS)
    # A split beyond the row holds nothing; the kernel before has not written its moments.
    b_count = tl.minimum(tl.maximum(numel - o_split * SPAN, 0), SPAN).to(tl.float32)
    m_split = b_count > 0
    b_mean = tl.load(p_moments + 2 * o_split, mask=m_split, other=0.0)
    b_squares = tl.load(p_moments + 2 * o_split + 1, mask=m_split, other=0.0)
    # Around the first split's mean: with a large mean, a plain sum of means would round away the difference.
    first = tl.load(p_moments)
    mean = first + tl.sum(b_count * (b_mean - first)) / numel
    return mean, tl.sum(b_squares + b_count * (b_mean - mean) * (b_mean - mean))


@triton.jit
def _join_kernel(
    p_moments,  # pointer to the splits' moments, shape (rows, splits, 2)
    p_gamma,  # pointer to gamma, shape (rows,)
    p_beta,  # pointer to beta, shape (rows,)
    p_load,  # pointer to output, what readers apply, shape (rows, 5)
    p_mean,  # pointer to output, shape (rows,)
    p_rstd,  # pointer to output, shape (rows,)
    eps,
    slope,
    numel,
    splits,
    SPAN: tl.constexpr,  # values to a split
    SPLITS: tl.constexpr,  # a power of two from splits on
):
    i_row = tl.program_id(0).to(tl.int64)
    mean, squares = _join_moments(p_moments + 2 * i_row * splits, numel, SPAN, SPLITS)
    rstd = 1 / tl.sqrt(squares / numel + eps)
    factor = tl.load(p_gamma + i_row) * rstd
    tl.store(p_load + 5 * i_row, factor)
    tl.store(p_load + 5 * i_row + 1, tl.load(p_beta + i_row) - mean * factor)
    tl.store(p_load + 5 * i_row + 2, slope)
    tl.store(p_load + 5 * i_row + 3, 1.0)
    tl.store(p_load + 5 * i_row + 4, 0.0)
    tl.store(p_mean + i_row, mean)
    tl.store(p_rstd + i_row, rstd)


@triton.jit
def _moments_kernel(
    p_x,  # pointer to x, shape (rows, numel)
    p_moments,  # pointer to output, mean and sum of squared deviations, shape (rows, splits, 2)
    numel,
    splits,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,  # blocks to a split
):
    i_split = tl.program_id(1)
    i_row = tl.program_id(0).to(tl.int64)
    start = i_split * STEPS * BLOCK
    p_row = p_x + i_row * numel
    o_index = start + tl.arange(0, BLOCK)
    b_x = tl.load(p_row + o_index, mask=o_index < numel, other=0.0)
    shift = tl.sum(b_x) / tl.minimum(numel - start, BLOCK)
    b_sum = tl.zeros([BLOCK], tl.float32)
    b_squares = tl.zeros([BLOCK], tl.float32)
    for i_step in range(STEPS):
        o_index = start + i_step * BLOCK + tl.arange(0, BLOCK)
        m_index = o_index < numel
        b_deviation = tl.where(m_index, tl.load(p_row + o_index, mask=m_index, other=0.0) - shift, 0.0)
        b_sum += b_deviation
        b_squares += b_deviation * b_deviation
    mean = tl.sum(b_sum) / tl.minimum(numel - start, STEPS * BLOCK)
    p_out = p_moments + 2 * (i_row * splits + i_split)
    tl.store(p_out, shift + mean)
    tl.store(p_out + 1, tl.sum(b_squares) - mean * tl.sum(b_sum))


@triton.jit
def _apply_kernel(
    p_x,  # pointer to x, shape (rows, numel)
    p_moments,  # pointer to the splits' moments, shape (rows, splits, 2)
    p_gamma,  # pointer to gamma, shape (rows,)
    p_beta,  # pointer to beta, shape (rows,)
    p_y,  # pointer to output, shape (rows, numel)
    p_mean,  # pointer to output, shape (rows,)
    p_rstd,  # pointer to output, shape (rows,)
    eps,
    slope,
    numel,
    splits,
    SPAN: tl.constexpr,  # values to a split
    SPLITS: tl.constexpr,  # a power of two from splits on
    BLOCK: tl.constexpr,
):
    i_block = tl.program_id(1)
    i_row = tl.program_id(0).to(tl.int64)
    mean, squares = _join_moments(p_moments + 2 * i_row * splits, numel, SPAN, SPLITS)
    rstd = 1 / tl.sqrt(squares / numel + eps)
    if i_block == 0:
        tl.store(p_mean + i_row, mean)
        tl.store(p_rstd + i_row, rstd)
    o_index = i_block * BLOCK + tl.arange(0, BLOCK)
    m_index = o_index < numel
    b_x = tl.load(p_x + i_row * numel + o_index, mask=m_index, other=0.0)
    b_z = (b_x - mean) * (tl.load(p_gamma + i_row) * rstd) + tl.load(p_beta + i_row)
    tl.store(p_y + i_row * numel + o_index, _leaky(b_z, b_z, slope), mask=m_index)


@triton.jit
def _row_kernel(
    p_x,  # pointer to x, shape (rows, numel)
    p_gamma,  # pointer to gamma, shape (rows,)
    p_beta,  # pointer to beta, shape (rows,)
    p_y,  # pointer to output, shape (rows, numel)
    p_mean,  # pointer to output, shape (rows,)
    p_rstd,  # pointer to output, shape (rows,)
    eps,
    slope,
    numel,
    BLOCK: tl.constexpr,  # from numel on
):
    i_row = tl.program_id(0).to(tl.int64)
    o_index = tl.arange(0, BLOCK)
    m_index = o_index < numel
    b_x = tl.load(p_x + i_row * numel + o_index, mask=m_index, other=0.0)
    mean = tl.sum(b_x) / numel
    b_deviation = tl.where(m_index, b_x - mean, 0.0)
    # The mean's own rounding, which a large mean makes worth having.
    rest = tl.sum(b_deviation) / numel
    b_deviation = tl.where(m_index, b_deviation - rest, 0.0)
    rstd = 1 / tl.sqrt(tl.sum(b_deviation * b_deviation) / numel + eps)
    tl.store(p_mean + i_row, mean + rest)
    tl.store(p_rstd + i_row, rstd)
    b_z = b_deviation * (tl.load(p_gamma + i_row) * rstd) + tl.load(p_beta + i_row)
    tl.store(p_y + i_row * numel + o_index, _leaky(b_z, b_z, slope), mask=m_index)


@triton.jit
def _gradient_block(p_grad_y, p_x, gamma, beta, mean, rstd, slope, o_index, m_index):
    """Gradient before the activation and normalised value of one block; both 0 beyond the row."""
    b_x = tl.load(p_x + o_index, mask=m_index, other=0.0)
    b_normalised = tl.where(m_index, (b_x - mean) * rstd, 0.0)
    b_grad = tl.load(p_grad_y + o_index, mask=m_index, other=0.0)
    return _leaky(b_normalised * gamma + beta, b_grad, slope), b_normalised


@triton.jit
def _gradient_sums_kernel(
    p_grad_y,  # pointer to the output's gradient, shape (rows, numel)
    p_x,  # pointer to x, shape (rows, numel)
    p_gamma,  # pointer to gamma, shape (rows,)
    p_beta,  # pointer to beta, shape (rows,)
    p_mean,  # pointer to the forward's mean, shape (rows,)
    p_rstd,  # pointer to the forward's rstd, shape (rows,)
    p_sums,  # pointer to output, the two sums of each split, shape (rows, splits, 2)
    slope,
    numel,
    splits,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,  # blocks to a split
):
    i_split = tl.program_id(1)
    i_row = tl.program_id(0).to(tl.int64)
    gamma, beta = tl.load(p_gamma + i_row), tl.load(p_beta + i_row)
    mean, rstd = tl.load(p_mean + i_row), tl.load(p_rstd + i_row)
    b_sum = tl.zeros([BLOCK], tl.float32)
    b_product = tl.zeros([BLOCK], tl.float32)
    for i_step in range(STEPS):
        o_index = (i_split * STEPS + i_step) * BLOCK + tl.arange(0, BLOCK)
        b_grad, b_normalised = _gradient_block(
            p_grad_y + i_row * numel, p_x + i_row * numel, gamma, beta, mean, rstd, slope, o_index, o_index < numel
        )
        b_sum += b_grad
        b_product += b_grad * b_normalised
    p_out = p_sums + 2 * (i_row * splits + i_split)
    tl.store(p_out, tl.sum(b_sum))
    tl.store(p_out + 1, tl.sum(b_product))


@triton.jit
def _gradient_kernel(
    p_grad_y,  # pointer to the output's gradient, shape (rows, numel)
    p_x,  # pointer to x, shape (rows, numel)
    p_gamma,  # pointer to gamma, shape (rows,)
    p_beta,  # pointer to beta, shape (rows,)
    p_mean,  # pointer to the forward's mean, shape (rows,)
    p_rstd,  # pointer to the forward's rstd, shape (rows,)
    p_sums,  # pointer to the splits' sums, shape (rows, splits, 2); not read where WHOLE
    p_grad_x,  # pointer to output, shape (rows, numel)
    p_grad_gamma,  # pointer to output, shape (rows,)
    p_grad_beta,  # pointer to output, shape (rows,)
    slope,
    numel,
    splits,
    SPLITS: tl.constexpr,  # a power of two from splits on
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,  # whether the block is the whole row, whose sums it can then form itself
):
    i_block = tl.program_id(1)
    i_row = tl.program_id(0).to(tl.int64)
    gamma, beta = tl.load(p_gamma + i_row), tl.load(p_beta + i_row)
    mean, rstd = tl.load(p_mean + i_row), tl.load(p_rstd + i_row)
    o_index = i_block * BLOCK + tl.arange(0, BLOCK)
    m_index = o_index < numel
    b_grad, b_normalised = _gradient_block(
        p_grad_y + i_row * numel, p_x + i_row * numel, gamma, beta, mean, rstd, slope, o_index, m_index
    )
    if WHOLE:
        grad_beta = tl.sum(b_grad)
        grad_gamma = tl.sum(b_grad * b_normalised)
    else:
        o_split = tl.arange(0, SPLITS)
        p_row = p_sums + 2 * (i_row * splits + o_split)
        grad_beta = tl.sum(tl.load(p_row, mask=o_split < splits, other=0.0))
        grad_gamma = tl.sum(tl.load(p_row + 1, mask=o_split < splits, other=0.0))
    if i_block == 0:
        tl.store(p_grad_gamma + i_row, grad_gamma)
        tl.store(p_grad_beta + i_row, grad_beta)
    b_grad = (b_grad - grad_beta / numel - b_normalised * (grad_gamma / numel)) * (gamma * rstd)
    tl.store(p_grad_x + i_row * numel + o_index, b_grad, mask=m_index)


def _split(numel: int) -> tuple[int, int]:
    """How many splits a row is summed in, and how many blocks each has; it depends on the row's length alone."""
    steps = triton.next_power_of_2(triton.cdiv(numel, ROW * MAX_SPLITS))
    return triton.cdiv(numel, ROW * steps), steps


def norm_act(x, gamma, beta, eps, slope):
    rows, numel = x.shape[0] * x.shape[1], x.shape[2] * x.shape[3]
    y, mean, rstd = torch.empty_like(x), torch.empty_like(gamma), torch.empty_like(gamma)
    if numel <= ROW:
        block = triton.next_power_of_2(numel)
        _row_kernel[(rows,)](x, gamma, beta, y, mean, rstd, eps, slope, numel, BLOCK=block, num_warps=_warps(block))
        return y, mean, rstd
    splits, steps = _split(numel)
    moments = x.new_empty(rows, splits, 2)
    _moments_kernel[rows, splits](x, moments, numel, splits, BLOCK=ROW, STEPS=steps, num_warps=_warps(ROW))
    _apply_kernel[rows, triton.cdiv(numel, ROW)](
        x, moments, gamma, beta, y, mean, rstd, eps, slope, numel, splits,
        SPAN=ROW * steps, SPLITS=triton.next_power_of_2(splits), BLOCK=ROW, num_warps=_warps(ROW),
    )  # fmt: skip
    return y, mean, rstd


def norm_act_backward(grad_y, x, gamma, beta, mean, rstd, slope):
    rows, numel = x.shape[0] * x.shape[1], x.shape[2] * x.shape[3]
    grad_x, grad_gamma, grad_beta = torch.empty_like(x), torch.empty_like(gamma), torch.empty_like(gamma)
    whole = numel <= ROW
    block = triton.next_power_of_2(numel) if whole else ROW
    splits, steps = (1, 1) if whole else _split(numel)
    sums = x.new_empty(0 if whole else rows, splits, 2)
    saved = (grad_y, x, gamma, beta, mean, rstd)
    if not whole:
        _gradient_sums_kernel[rows, splits](
            *saved, sums, slope, numel, splits, BLOCK=block, STEPS=steps, num_warps=_warps(block)
        )
    _gradient_kernel[rows, triton.cdiv(numel, block)](
        *saved, sums, grad_x, grad_gamma, grad_beta, slope, numel, splits,
        SPLITS=triton.next_power_of_2(splits), BLOCK=block, WHOLE=whole, num_warps=_warps(block),
    )  # fmt: skip
    return grad_x, grad_gamma, grad_beta


def load_of_moments(moments, numel, span, gamma, beta, eps, slope):
    """The normalisation that the next convolution applies on load, from the moments that the last one left.

    Args:
        moments: (E, C, splits, 2), mean and sum of squared deviations of every span of values.
        numel: values of a channel.
        span: values of a split; the last one has what is left.
        gamma, beta: (E, C).
        eps: added to the variance.
        slope: of the LeakyReLU behind it.

    Returns:
        The load, (E, C, 5), and mean and rstd, (E, C).
    """
    load, mean, rstd = gamma.new_empty(*gamma.shape, 5), torch.empty_like(gamma), torch.empty_like(gamma)
    splits = moments.shape[2]
    _join_kernel[(gamma.numel(),)](
        moments, gamma, beta, load, mean, rstd, eps, slope, numel, splits,
        SPAN=span, SPLITS=triton.next_power_of_2(splits),
    )  # fmt: skip
    return load, mean, rstd


def _warps(block: int) -> int:
    return min(8, max(1, block // 256))
