"""The gradient through one or two normalisations that readers have applied, see `norm_load`.

From behind: a pass that sums for the second normalisation, where there is one, a pass that sums for the first, and a
pass that writes. Each finds everything else again from x.
"""

import torch
import triton
import triton.language as tl

from sparse_gen.kernels import norm_act
from sparse_gen.kernels.norm_act import _leaky, _warps


@triton.jit
def _row_numbers(p_gamma, p_beta, p_gamma2, p_moments, i_row, SECOND: tl.constexpr):
    """What a row's passes need: mean, rstd, gamma, beta, mean2, rstd2, gamma2."""
    p_row = p_moments + 4 * i_row
    gamma2 = 1.0
    if SECOND:
        gamma2 = tl.load(p_gamma2 + i_row)
    return (
        tl.load(p_row), tl.load(p_row + 1), tl.load(p_gamma + i_row), tl.load(p_beta + i_row),
        tl.load(p_row + 2), tl.load(p_row + 3), gamma2,
    )  # fmt: skip


@triton.jit
def _read(p_grad, p_x, o_index, m_index, slope, numbers):
    """Gradient of what readers saw, first normalised value, its z and second normalised value of a block."""
    mean, rstd, gamma, beta, mean2, rstd2, _ = numbers
    b_x = tl.load(p_x + o_index, mask=m_index, other=0.0)
    b_grad = tl.load(p_grad + o_index, mask=m_index, other=0.0)
    b_first = tl.where(m_index, (b_x - mean) * rstd, 0.0)
    factor = gamma * rstd
    b_z = b_x * factor + (beta - mean * factor)
    b_second = tl.where(m_index, (_leaky(b_z, b_z, slope) - mean2) * rstd2, 0.0)
    return b_grad, b_first, b_z, b_second


@triton.jit
def _through_second(b_grad, b_second, m_index, numbers, sum2, product2, numel, SECOND: tl.constexpr):
    """The gradient in front of the second normalisation, 0 beyond the row."""
    if SECOND:
        _, _, _, _, _, rstd2, gamma2 = numbers
        b_grad = (b_grad - sum2 / numel - b_second * (product2 / numel)) * (gamma2 * rstd2)
        b_grad = tl.where(m_index, b_grad, 0.0)
    return b_grad


@triton.jit
def _joined(p_sums, i_row, splits, SPLITS: tl.constexpr):
    """Both sums of a row from those of its splits, shape (rows, splits, 2)."""
    o_split = tl.arange(0, SPLITS)
    p_row = p_sums + 2 * (i_row * splits + o_split)
    total = tl.sum(tl.load(p_row, mask=o_split < splits, other=0.0))
    return total, tl.sum(tl.load(p_row + 1, mask=o_split < splits, other=0.0))


@triton.jit
def _sums_kernel(
    p_grad,  # pointer to the gradient of what readers saw, shape (rows, numel)
    p_x,  # pointer to x, shape (rows, numel)
    p_gamma,  # pointers to parameters, shape (rows,); gamma2 is not read unless SECOND
    p_beta,
    p_gamma2,
    p_moments,  # pointer to the forward's moments, shape (rows, 4)
    p_sums2,  # pointer to the second normalisation's sums, shape (rows, splits, 2); not read where OF_SECOND
    p_sums,  # pointer to output, the two sums of each split, shape (rows, splits, 2)
    slope,
    numel,
    splits,
    SECOND: tl.constexpr,  # whether there is a second normalisation
    OF_SECOND: tl.constexpr,  # whether the sums are the second's
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,  # blocks to a split
    SPLITS: tl.constexpr,  # a power of two from splits on
):
    i_split = tl.program_id(1)
    i_row = tl.program_id(0).to(tl.int64)
    numbers = _row_numbers(p_gamma, p_beta, p_gamma2, p_moments, i_row, SECOND)
    sum2, product2 = 0.0, 0.0
    if SECOND and not OF_SECOND:
        sum2, product2 = _joined(p_sums2, i_row, splits, SPLITS)
    b_sum = tl.zeros([BLOCK], tl.float32)
    b_product = tl.zeros([BLOCK], tl.float32)
    for i_step in range(STEPS):
        o_index = (i_split * STEPS + i_step) * BLOCK + tl.arange(0, BLOCK)
        m_index = o_index < numel
        b_grad, b_first, b_z, b_second = _read(
            p_grad + i_row * numel, p_x + i_row * numel, o_index, m_index, slope, numbers
        )
        if OF_SECOND:
            b_sum += b_grad
            b_product += b_grad * b_second
        else:
            b_grad = _through_second(b_grad, b_second, m_index, numbers, sum2, product2, numel, SECOND)
            b_grad = _leaky(b_z, b_grad, slope)
            b_sum += b_grad
            b_product += b_grad * b_first
    p_out = p_sums + 2 * (i_row * splits + i_split)
    tl.store(p_out, tl.sum(b_sum))
    tl.store(p_out + 1, tl.sum(b_product))


@triton.jit
def _gradient_kernel(
    p_grad,  # pointer to the gradient of what readers saw, shape (rows, numel)
    p_x,  # pointer to x, shape (rows, numel)
    p_gamma,  # pointers to parameters, shape (rows,); gamma2 is not read unless SECOND
    p_beta,
    p_gamma2,
    p_moments,  # pointer to the forward's moments, shape (rows, 4)
    p_sums2,  # pointers to the splits' sums, shape (rows, splits, 2); not read where WHOLE
    p_sums,
    p_grad_x,  # pointer to output, shape (rows, numel)
    p_grads,  # pointer to output, gradients of gamma, beta, gamma2 and beta2, shape (4, rows)
    slope,
    numel,
    splits,
    SECOND: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,  # whether the block is the whole row, whose sums it can then form itself
):
    i_block = tl.program_id(1)
    i_row = tl.program_id(0).to(tl.int64)
    numbers = _row_numbers(p_gamma, p_beta, p_gamma2, p_moments, i_row, SECOND)
    o_index = i_block * BLOCK + tl.arange(0, BLOCK)
    m_index = o_index < numel
    b_grad, b_first, b_z, b_second = _read(
        p_grad + i_row * numel, p_x + i_row * numel, o_index, m_index, slope, numbers
    )
    sum2, product2 = 0.0, 0.0
    if SECOND:
        if WHOLE:
            sum2, product2 = tl.sum(b_grad), tl.sum(b_grad * b_second)
        else:
            sum2, product2 = _joined(p_sums2, i_row, splits, SPLITS)
    b_grad = _through_second(b_grad, b_second, m_index, numbers, sum2, product2, numel, SECOND)
    b_grad = _leaky(b_z, b_grad, slope)
    if WHOLE:
        sum1, product1 = tl.sum(b_grad), tl.sum(b_grad * b_first)
    else:
        sum1, product1 = _joined(p_sums, i_row, splits, SPLITS)
    if i_block == 0:
        rows = tl.num_programs(0)
        tl.store(p_grads + i_row, product1)
        tl.store(p_grads + rows + i_row, sum1)
        tl.store(p_grads + 2 * rows + i_row, product2)
        tl.store(p_grads + 3 * rows + i_row, sum2)
    _, rstd, gamma, _, _, _, _ = numbers
    b_grad = (b_grad - sum1 / numel - b_first * (product1 / numel)) * (gamma * rstd)
    tl.store(p_grad_x + i_row * numel + o_index, b_grad, mask=m_index)


def gradient(grad, x, gamma, beta, slope, gamma2, moments):
    """The gradients of x, gamma, beta, gamma2 and beta2; the last two are 0 where gamma2 is None."""
    rows, numel = x.shape[0] * x.shape[1], x.shape[2] * x.shape[3]
    grad_x, grads = torch.empty_like(x), gamma.new_empty(4, *gamma.shape)
    second, whole = gamma2 is not None, numel <= norm_act.ROW
    block = triton.next_power_of_2(numel) if whole else norm_act.ROW
    splits, steps = (1, 1) if whole else norm_act._split(numel)
    power = triton.next_power_of_2(splits)
    saved = (grad, x, gamma, beta, gamma2 if second else gamma, moments)
    sums2 = sums = moments
    if not whole:
        options = {"BLOCK": block, "STEPS": steps, "SPLITS": power, "num_warps": _warps(block)}
        if second:
            sums2 = x.new_empty(rows, splits, 2)
            _sums_kernel[rows, splits](
                *saved, moments, sums2, slope, numel, splits, SECOND=True, OF_SECOND=True, **options
            )
        sums = x.new_empty(rows, splits, 2)
        _sums_kernel[rows, splits](*saved, sums2, sums, slope, numel, splits, SECOND=second, OF_SECOND=False, **options)
    _gradient_kernel[rows, triton.cdiv(numel, block)](
        *saved, sums2, sums, grad_x, grads, slope, numel, splits,
        SECOND=second, SPLITS=power, BLOCK=block, WHOLE=whole, num_warps=_warps(block),
    )  # fmt: skip
    return (grad_x, *grads)
