"""The gradient through one or two normalisations that readers have applied, see `norm_load`.

From behind: a pass that sums for the second normalisation, where there is one, a pass that sums for the first, and a
pass that writes. Each finds everything else again from x.
"""

import torch
import triton
import triton.language as tl

from sparse_gen.kernels import norm_act
from sparse_gen.kernels.fold import fold_tile, plane_of, read_folded, reader_tables
from sparse_gen.kernels.gather import Geometry
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
def _normalised(p_x, o_index, m_index, slope, numbers):
    """First normalised value, its z and second normalised value of a block."""
    mean, rstd, gamma, beta, mean2, rstd2, _ = numbers
    b_x = tl.load(p_x + o_index, mask=m_index, other=0.0)
    b_first = tl.where(m_index, (b_x - mean) * rstd, 0.0)
    factor = gamma * rstd
    b_z = b_x * factor + (beta - mean * factor)
    b_second = tl.where(m_index, (_leaky(b_z, b_z, slope) - mean2) * rstd2, 0.0)
    return b_first, b_z, b_second


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
    p_sums2,  # pointer to the second normalisation's sums, shape (rows, splits2, 2); not read where OF_SECOND
    p_sums,  # pointer to output, the two sums of each split, shape (rows, splits, 2)
    slope,
    numel,
    splits2,
    splits,
    SECOND: tl.constexpr,  # whether there is a second normalisation
    OF_SECOND: tl.constexpr,  # whether the sums are the second's
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,  # blocks to a split
    SPLITS2: tl.constexpr,  # a power of two from splits2 on
):
    i_split = tl.program_id(1)
    i_row = tl.program_id(0).to(tl.int64)
    numbers = _row_numbers(p_gamma, p_beta, p_gamma2, p_moments, i_row, SECOND)
    sum2, product2 = 0.0, 0.0
    if SECOND and not OF_SECOND:
        sum2, product2 = _joined(p_sums2, i_row, splits2, SPLITS2)
    b_sum = tl.zeros([BLOCK], tl.float32)
    b_product = tl.zeros([BLOCK], tl.float32)
    for i_step in range(STEPS):
        o_index = (i_split * STEPS + i_step) * BLOCK + tl.arange(0, BLOCK)
        m_index = o_index < numel
        b_grad = tl.load(p_grad + i_row * numel + o_index, mask=m_index, other=0.0)
        b_first, b_z, b_second = _normalised(p_x + i_row * numel, o_index, m_index, slope, numbers)
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
def _folded_sums_kernel(
    p_plane,  # see `fold_tile`
    p_place_y,
    p_weight_y,
    p_count_y,
    p_place_x,
    p_weight_x,
    p_count_x,
    p_x,  # pointer to x, shape (rows, height * width)
    p_gamma,  # pointers to parameters, shape (rows,); gamma2 is not read unless SECOND
    p_beta,
    p_gamma2,
    p_moments,  # pointer to the forward's moments, shape (rows, 4)
    p_grad,  # pointer to output, the gradient of what readers saw, shape (rows, height * width)
    p_sums,  # pointer to output, the last normalisation's two sums of each tile, shape (rows, tiles, 2)
    slope,
    height,
    width,
    plane_h,
    plane_w,
    parts,
    SECOND: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    o_y = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    o_x = tl.program_id(2) * BLOCK_W + tl.arange(0, BLOCK_W)
    b_grad = fold_tile(
        p_plane + i_row * plane_h * plane_w, tl.num_programs(0) * plane_h * plane_w,
        p_place_y, p_weight_y, p_count_y, p_place_x, p_weight_x, p_count_x,
        o_y, o_x, height, width, plane_w, parts, BLOCK_H, BLOCK_W,
    )  # fmt: skip
    o_index = o_y[:, None] * width + o_x[None, :]
    m_index = (o_y < height)[:, None] & (o_x < width)[None, :]
    tl.store(p_grad + i_row * height * width + o_index, b_grad, mask=m_index)
    numbers = _row_numbers(p_gamma, p_beta, p_gamma2, p_moments, i_row, SECOND)
    b_normal, b_z, b_second = _normalised(p_x + i_row * height * width, o_index, m_index, slope, numbers)
    if SECOND:
        b_normal = b_second
    else:
        b_grad = _leaky(b_z, b_grad, slope)
    i_tile = tl.program_id(1) * tl.num_programs(2) + tl.program_id(2)
    p_out = p_sums + 2 * (i_row * tl.num_programs(1) * tl.num_programs(2) + i_tile)
    tl.store(p_out, tl.sum(b_grad))
    tl.store(p_out + 1, tl.sum(b_grad * b_normal))


@triton.jit
def _add_parts(p_parts, p_sum, i_block, numel, splits, BLOCK: tl.constexpr):
    """One block of the sum of parts, shape (splits, numel)."""
    o_index = i_block * BLOCK + tl.arange(0, BLOCK)
    m_index = o_index < numel
    b_sum = tl.zeros([BLOCK], tl.float32)
    for _ in range(splits):
        b_sum += tl.load(p_parts + o_index, mask=m_index, other=0.0)
        p_parts += numel
    tl.store(p_sum + o_index, b_sum, mask=m_index)


@triton.jit
def _row_gradient(
    i_row, i_block, rows, p_grad, tables, p_x, p_gamma, p_beta, p_gamma2, p_moments, p_sums2, p_sums, p_grad_x,
    p_grads, slope, numel, splits2, splits, parts, width, plane_h, plane_w,
    FOLD: tl.constexpr, SECOND: tl.constexpr, SPLITS2: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    numbers = _row_numbers(p_gamma, p_beta, p_gamma2, p_moments, i_row, SECOND)
    o_index = i_block * BLOCK + tl.arange(0, BLOCK)
    m_index = o_index < numel
    if FOLD:
        b_grad = read_folded(
            p_grad + i_row * plane_h * plane_w, rows * plane_h * plane_w, tables, o_index, m_index,
            numel // width, width, plane_w, parts, BLOCK,
        )  # fmt: skip
    else:
        b_grad = tl.load(p_grad + i_row * numel + o_index, mask=m_index, other=0.0)
    b_first, b_z, b_second = _normalised(p_x + i_row * numel, o_index, m_index, slope, numbers)
    sum2, product2 = 0.0, 0.0
    if SECOND:
        if WHOLE:
            sum2, product2 = tl.sum(b_grad), tl.sum(b_grad * b_second)
        else:
            sum2, product2 = _joined(p_sums2, i_row, splits2, SPLITS2)
    b_grad = _through_second(b_grad, b_second, m_index, numbers, sum2, product2, numel, SECOND)
    b_grad = _leaky(b_z, b_grad, slope)
    if WHOLE:
        sum1, product1 = tl.sum(b_grad), tl.sum(b_grad * b_first)
    else:
        sum1, product1 = _joined(p_sums, i_row, splits, SPLITS)
    if i_block == 0:
        tl.store(p_grads + i_row, product1)
        tl.store(p_grads + rows + i_row, sum1)
        tl.store(p_grads + 2 * rows + i_row, product2)
        tl.store(p_grads + 3 * rows + i_row, sum2)
    _, rstd, gamma, _, _, _, _ = numbers
    b_grad = (b_grad - sum1 / numel - b_first * (product1 / numel)) * (gamma * rstd)
    tl.store(p_grad_x + i_row * numel + o_index, b_grad, mask=m_index)


@triton.jit
def _gradient_kernel(
    p_grad,  # pointer to the gradient of what readers saw, shape (rows, numel), or where FOLD to the plane's parts
    p_place_y,  # where FOLD, see `fold_tile`
    p_weight_y,
    p_count_y,
    p_place_x,
    p_weight_x,
    p_count_x,
    p_x,  # pointer to x, shape (rows, numel)
    p_gamma,  # pointers to parameters, shape (rows,); gamma2 is not read unless SECOND
    p_beta,
    p_gamma2,
    p_moments,  # pointer to the forward's moments, shape (rows, 4)
    p_sums2,  # pointers to the splits' sums, shape (rows, splits2 or splits, 2); not read where WHOLE
    p_sums,
    p_grad_x,  # pointer to output, shape (rows, numel)
    p_grads,  # pointer to output, gradients of gamma, beta, gamma2 and beta2, shape (4, rows)
    p_more,  # pointer to other parts, shape (more_splits, more), which further programs add up; not read unless ADD
    p_more_sum,  # pointer to output, their sum, shape (more,); not written unless ADD
    slope,
    rows,
    blocks,  # of a row
    numel,
    splits2,
    splits,
    parts,
    width,
    plane_h,
    plane_w,
    more,
    more_splits,
    FOLD: tl.constexpr,  # whether the gradient has yet to be carried back from a plane
    ADD: tl.constexpr,  # whether there are other parts
    SECOND: tl.constexpr,
    SPLITS2: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,  # whether the block is the whole row, whose sums it can then form itself
    ADD_BLOCK: tl.constexpr,
):
    i_program = tl.program_id(0)
    if ADD and i_program >= rows * blocks:
        _add_parts(p_more, p_more_sum, i_program - rows * blocks, more, more_splits, ADD_BLOCK)
    else:
        _row_gradient(
            (i_program // blocks).to(tl.int64), i_program % blocks, rows,
            p_grad, (p_place_y, p_weight_y, p_count_y, p_place_x, p_weight_x, p_count_x),
            p_x, p_gamma, p_beta, p_gamma2, p_moments, p_sums2, p_sums, p_grad_x, p_grads, slope, numel,
            splits2, splits, parts, width, plane_h, plane_w, FOLD, SECOND, SPLITS2, SPLITS, BLOCK, WHOLE,
        )  # fmt: skip


def gradient(grad, x, gamma, beta, slope, gamma2, moments):
    """The gradients of x, gamma, beta, gamma2 and beta2; the last two are 0 where gamma2 is None."""
    grad_x, grads, _ = _finish(grad, None, x, gamma, beta, slope, gamma2, moments)
    return (grad_x, *grads)


def folded_gradient(parts, geometry: Geometry, x, gamma, beta, slope, gamma2, moments, more=None):
    """The same from the parts of the gradient of the plane that a convolution of the normalised image slid over.

    Args:
        parts: (splits, E, channels, plane_h · plane_w), see `fold`.
        geometry: that convolution's.
        more: other parts, (splits, …), to be added up in the same launch, or None.

    Returns:
        The gradients, five, and the sum of the other parts.
    """
    if x.shape[2] * x.shape[3] <= norm_act.ROW:
        grad_x, grads, added = _finish(parts, geometry, x, gamma, beta, slope, gamma2, moments, more=more)
        return (grad_x, *grads), added
    rows, (height, width) = x.shape[0] * x.shape[1], x.shape[2:]
    plane_h, plane_w, _ = plane_of(geometry, x.shape)
    block_h, block_w = 16, 64
    grid = rows, triton.cdiv(height, block_h), triton.cdiv(width, block_w)
    grad, sums = torch.empty_like(x), x.new_empty(rows, grid[1] * grid[2], 2)
    second = gamma2 is not None
    _folded_sums_kernel[grid](
        parts, *reader_tables(geometry, x.shape, x.device), x, gamma, beta, gamma2 if second else gamma, moments,
        grad, sums, slope, height, width, plane_h, plane_w, len(parts), SECOND=second, BLOCK_H=block_h, BLOCK_W=block_w,
    )  # fmt: skip
    grad_x, grads, added = _finish(grad, None, x, gamma, beta, slope, gamma2, moments, last=sums, more=more)
    return (grad_x, *grads), added


def _finish(grad, geometry, x, gamma, beta, slope, gamma2, moments, *, last=None, more=None):
    """The passes that are left; `last` has the last normalisation's sums, (rows, splits, 2), if they are known."""
    rows, numel = x.shape[0] * x.shape[1], x.shape[2] * x.shape[3]
    grad_x, grads = torch.empty_like(x), gamma.new_empty(4, *gamma.shape)
    second, whole = gamma2 is not None, numel <= norm_act.ROW
    block = triton.next_power_of_2(numel) if whole else norm_act.ROW
    saved = (x, gamma, beta, gamma2 if second else gamma, moments)
    sums2 = sums = last
    if whole:
        sums2 = sums = x.new_empty(0, 1, 2)
    else:
        splits, steps = norm_act._split(numel)
        options = {"BLOCK": block, "STEPS": steps, "num_warps": _warps(block)}
        wanted = ([True] if second and last is None else []) + ([False] if second or last is None else [])
        for of_second in wanted:
            sums = x.new_empty(rows, splits, 2)
            known = sums if sums2 is None else sums2
            _sums_kernel[rows, splits](
                grad, *saved, known, sums, slope, numel, known.shape[1], splits, SECOND=second, OF_SECOND=of_second,
                SPLITS2=triton.next_power_of_2(known.shape[1]), **options,
            )  # fmt: skip
            sums2 = sums if of_second or sums2 is None else sums2
    add = more is not None and len(more) > 1
    added = more if more is None else more.new_empty(more.shape[1:]) if add else more[0]
    blocks, further = triton.cdiv(numel, block), triton.cdiv(more[0].numel(), 1024) if add else 0
    tables, parts, plane_h, plane_w = (gamma,) * 6, 1, 0, 0
    if geometry is not None:
        tables, parts = reader_tables(geometry, x.shape, x.device), len(grad)
        plane_h, plane_w, _ = plane_of(geometry, x.shape)
    _gradient_kernel[(rows * blocks + further,)](
        grad, *tables, *saved, sums2, sums, grad_x, grads, more if add else grad, added if add else grad, slope,
        rows, blocks, numel, sums2.shape[1], sums.shape[1], parts, x.shape[3], plane_h, plane_w,
        more[0].numel() if add else 0, len(more) if add else 0,
        FOLD=geometry is not None, ADD=add, SECOND=second, SPLITS2=triton.next_power_of_2(sums2.shape[1]),
        SPLITS=triton.next_power_of_2(sums.shape[1]), BLOCK=block, WHOLE=whole, ADD_BLOCK=1024,
        num_warps=_gradient_warps(block, geometry is not None),
    )  # fmt: skip
    return grad_x, grads, added


def _gradient_warps(block: int, folds: bool) -> int:
    """Folding a whole row of 4096 pixels, eight warps would need 226 registers a thread."""
    return max(4, _warps(block)) * (2 if folds else 1)
