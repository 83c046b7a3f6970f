"""Triton twin of `sparse_gen.ops.norm_load`: what a reader applies, from one or two normalisations, and its gradient.

A channel's image that fits one program's registers is read once, in one launch, whatever the number of normalisations.
Larger ones are summed in a fixed split, one pass a normalisation; the next pass joins the splits in every program.
Without atomics the same bits come out each time.
"""

import torch
import triton
import triton.language as tl

from sparse_gen.kernels import norm_act
from sparse_gen.kernels.norm_act import _join_moments, _leaky, _moments_kernel, _warps
from sparse_gen.kernels.norm_load_gradient import gradient


@triton.jit
def _affine(p_gamma, p_beta, i_row, mean, rstd):
    factor = tl.load(p_gamma + i_row) * rstd
    return factor, tl.load(p_beta + i_row) - mean * factor


@triton.jit
def _store_load(
    p_load, p_moments, i_row, slope, mean, rstd, factor, shift, mean2, rstd2, factor2, shift2,
):  # fmt: skip
    tl.store(p_load + 5 * i_row, factor)
    tl.store(p_load + 5 * i_row + 1, shift)
    tl.store(p_load + 5 * i_row + 2, slope)
    tl.store(p_load + 5 * i_row + 3, factor2)
    tl.store(p_load + 5 * i_row + 4, shift2)
    tl.store(p_moments + 4 * i_row, mean)
    tl.store(p_moments + 4 * i_row + 1, rstd)
    tl.store(p_moments + 4 * i_row + 2, mean2)
    tl.store(p_moments + 4 * i_row + 3, rstd2)


@triton.jit
def _block_moments(b_value, m_value, numel, eps):
    """Mean and 1 / √(variance + eps) of a row that one block holds."""
    mean = tl.sum(tl.where(m_value, b_value, 0.0)) / numel
    b_deviation = tl.where(m_value, b_value - mean, 0.0)
    # The mean's own rounding, which a large mean makes worth having.
    rest = tl.sum(b_deviation) / numel
    b_deviation = tl.where(m_value, b_deviation - rest, 0.0)
    return mean + rest, 1 / tl.sqrt(tl.sum(b_deviation * b_deviation) / numel + eps)


@triton.jit
def _row_load_kernel(
    p_x,  # pointer to x, shape (rows, numel), or to its parts, shape (splits, rows, numel)
    p_bias,  # pointer to a bias a row, shape (rows,), which the parts lack; not read unless BIAS
    p_sum,  # pointer to output, the sum of the parts, shape (rows, numel); not written unless ADD
    p_gamma,  # pointers to the first normalisation's parameters, shape (rows,)
    p_beta,
    p_gamma2,  # to the second's; not read unless SECOND
    p_beta2,
    p_load,  # pointer to output, shape (rows, 5)
    p_moments,  # pointer to output, mean and rstd of both, shape (rows, 4)
    eps,
    slope,
    eps2,
    numel,
    splits,
    SECOND: tl.constexpr,
    ADD: tl.constexpr,  # whether there are parts to add up
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,  # from numel on
):
    i_row = tl.program_id(0).to(tl.int64)
    o_index = tl.arange(0, BLOCK)
    m_index = o_index < numel
    b_x = tl.load(p_x + i_row * numel + o_index, mask=m_index, other=0.0)
    if ADD:
        for i_split in range(1, splits):
            i_part = i_split * tl.num_programs(0) + i_row
            b_x += tl.load(p_x + i_part * numel + o_index, mask=m_index, other=0.0)
        if BIAS:
            b_x += tl.load(p_bias + i_row)
        tl.store(p_sum + i_row * numel + o_index, b_x, mask=m_index)
    mean, rstd = _block_moments(b_x, m_index, numel, eps)
    factor, shift = _affine(p_gamma, p_beta, i_row, mean, rstd)
    mean2, rstd2, factor2, shift2 = 0.0, 1.0, 1.0, 0.0
    if SECOND:
        b_z = b_x * factor + shift
        mean2, rstd2 = _block_moments(_leaky(b_z, b_z, slope), m_index, numel, eps2)
        factor2, shift2 = _affine(p_gamma2, p_beta2, i_row, mean2, rstd2)
    _store_load(p_load, p_moments, i_row, slope, mean, rstd, factor, shift, mean2, rstd2, factor2, shift2)


@triton.jit
def _activated_moments_kernel(
    p_x,  # pointer to x, shape (rows, numel)
    p_first,  # pointer to the splits' moments of x, shape (rows, first_splits, 2)
    p_gamma,  # pointers to the first normalisation's parameters, shape (rows,)
    p_beta,
    p_second,  # pointer to output, the splits' moments of what it gives, shape (rows, splits, 2)
    eps,
    slope,
    numel,
    first_splits,
    splits,
    FIRST_SPAN: tl.constexpr,  # values to a split of the first moments
    FIRST_SPLITS: tl.constexpr,  # a power of two from first_splits on
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,  # blocks to a split of the second
):
    i_split = tl.program_id(1)
    i_row = tl.program_id(0).to(tl.int64)
    mean, squares = _join_moments(p_first + 2 * i_row * first_splits, numel, FIRST_SPAN, FIRST_SPLITS)
    factor, shift = _affine(p_gamma, p_beta, i_row, mean, 1 / tl.sqrt(squares / numel + eps))
    start = i_split * STEPS * BLOCK
    around = tl.load(p_x + i_row * numel + start) * factor + shift
    around = _leaky(around, around, slope)
    b_sum = tl.zeros([BLOCK], tl.float32)
    b_squares = tl.zeros([BLOCK], tl.float32)
    for i_step in range(STEPS):
        o_index = start + i_step * BLOCK + tl.arange(0, BLOCK)
        m_index = o_index < numel
        b_z = tl.load(p_x + i_row * numel + o_index, mask=m_index, other=0.0) * factor + shift
        b_deviation = tl.where(m_index, _leaky(b_z, b_z, slope) - around, 0.0)
        b_sum += b_deviation
        b_squares += b_deviation * b_deviation
    mean2 = tl.sum(b_sum) / tl.minimum(numel - start, STEPS * BLOCK)
    p_out = p_second + 2 * (i_row * splits + i_split)
    tl.store(p_out, around + mean2)
    tl.store(p_out + 1, tl.sum(b_squares) - mean2 * tl.sum(b_sum))


@triton.jit
def _join_load_kernel(
    p_first,  # pointers to the splits' moments of both normalisations, shape (rows, first_splits or splits, 2)
    p_second,
    p_gamma,  # pointers to their parameters, shape (rows,)
    p_beta,
    p_gamma2,
    p_beta2,
    p_load,  # pointer to output, shape (rows, 5)
    p_moments,  # pointer to output, shape (rows, 4)
    eps,
    slope,
    eps2,
    numel,
    first_splits,
    splits,
    SECOND: tl.constexpr,
    FIRST_SPAN: tl.constexpr,  # values to a split
    FIRST_SPLITS: tl.constexpr,
    SPAN: tl.constexpr,
    SPLITS: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    mean, squares = _join_moments(p_first + 2 * i_row * first_splits, numel, FIRST_SPAN, FIRST_SPLITS)
    rstd = 1 / tl.sqrt(squares / numel + eps)
    factor, shift = _affine(p_gamma, p_beta, i_row, mean, rstd)
    mean2, rstd2, factor2, shift2 = 0.0, 1.0, 1.0, 0.0
    if SECOND:
        mean2, squares2 = _join_moments(p_second + 2 * i_row * splits, numel, SPAN, SPLITS)
        rstd2 = 1 / tl.sqrt(squares2 / numel + eps2)
        factor2, shift2 = _affine(p_gamma2, p_beta2, i_row, mean2, rstd2)
    _store_load(p_load, p_moments, i_row, slope, mean, rstd, factor, shift, mean2, rstd2, factor2, shift2)


@triton.jit
def _apply_load_kernel(
    p_x,  # pointer to x, shape (rows, numel)
    p_load,  # pointer to loads, shape (rows, 5)
    p_y,  # pointer to output, shape (rows, numel)
    numel,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    o_index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_index = o_index < numel
    p_row = p_load + 5 * i_row
    b_x = tl.load(p_x + i_row * numel + o_index, mask=m_index, other=0.0)
    b_z = b_x * tl.load(p_row) + tl.load(p_row + 1)
    b_y = _leaky(b_z, b_z, tl.load(p_row + 2)) * tl.load(p_row + 3) + tl.load(p_row + 4)
    tl.store(p_y + i_row * numel + o_index, b_y, mask=m_index)


def norm_load(x, gamma, beta, eps, slope, gamma2, beta2, eps2):
    norms = (gamma, beta, eps, slope, gamma2, beta2, eps2)
    rows, numel = x.shape[0] * x.shape[1], x.shape[2] * x.shape[3]
    if numel <= norm_act.ROW:
        return load_of_parts(x[None], None, *norms)[1:]
    splits, steps = norm_act._split(numel)
    first, block = x.new_empty(*x.shape[:2], splits, 2), norm_act.ROW
    _moments_kernel[rows, splits](x, first, numel, splits, BLOCK=block, STEPS=steps, num_warps=_warps(block))
    return load_of_moments(x, first, block * steps, *norms)


def load_of_parts(parts, bias, gamma, beta, eps, slope, gamma2, beta2, eps2):
    """From the parts of an image of at most `norm_act.ROW` pixels, (splits, E, C, H, W), and a bias (E, C) or None.

    Returns:
        Their sum, the load and the moments.
    """
    splits, rows, numel = len(parts), parts.shape[1] * parts.shape[2], parts.shape[3] * parts.shape[4]
    load, moments = gamma.new_empty(*gamma.shape, 5), gamma.new_empty(*gamma.shape, 4)
    second, add, biased = gamma2 is not None, splits > 1 or bias is not None, bias is not None
    x, block = torch.empty_like(parts[0]) if add else parts[0], triton.next_power_of_2(numel)
    _row_load_kernel[(rows,)](
        parts, bias if biased else parts, x, gamma, beta, gamma2 if second else gamma, beta2 if second else beta,
        load, moments, eps, slope, eps2, numel, splits,
        SECOND=second, ADD=add, BIAS=biased, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return x, load, moments


def load_of_moments(x, first, span, gamma, beta, eps, slope, gamma2, beta2, eps2):
    """The load and the moments from those of every `span` values of x, (E, C, splits, 2)."""
    rows, numel, first_splits = x.shape[0] * x.shape[1], x.shape[2] * x.shape[3], first.shape[2]
    load, moments = gamma.new_empty(*gamma.shape, 5), gamma.new_empty(*gamma.shape, 4)
    second, behind = gamma2 is not None, first
    splits, steps = norm_act._split(numel)
    block, power = norm_act.ROW, triton.next_power_of_2(splits)
    of_first = {"FIRST_SPAN": span, "FIRST_SPLITS": triton.next_power_of_2(first_splits)}
    if second:
        behind = x.new_empty(rows, splits, 2)
        _activated_moments_kernel[rows, splits](
            x, first, gamma, beta, behind, eps, slope, numel, first_splits, splits,
            **of_first, BLOCK=block, STEPS=steps, num_warps=_warps(block),
        )  # fmt: skip
    _join_load_kernel[(rows,)](
        first, behind, gamma, beta, gamma2 if second else gamma, beta2 if second else beta, load, moments,
        eps, slope, eps2, numel, first_splits, splits,
        SECOND=second, **of_first, SPAN=block * steps, SPLITS=power, num_warps=4 if first_splits > 256 else 1,
    )  # fmt: skip
    return load, moments


def apply_load(x, load):
    rows, numel = x.shape[0] * x.shape[1], x.shape[2] * x.shape[3]
    y = torch.empty_like(x)
    block = min(triton.next_power_of_2(numel), norm_act.ROW)
    grid = rows, triton.cdiv(numel, block)
    _apply_load_kernel[grid](x, load, y, numel, BLOCK=block, num_warps=_warps(block))
    return y


def norm_load_backward(grad, x, gamma, beta, slope, gamma2, beta2, moments):
    return gradient(grad, x, gamma, beta, slope, gamma2, moments)
